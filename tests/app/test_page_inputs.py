"""The page at /: a picture to begin with, and a painted mask."""

import base64

import numpy as np
import page_in_browser
import pytest
from page_in_browser import SMALL, arrive, make, pixels
from PIL import Image

opened, url, worker = page_in_browser.opened, page_in_browser.url, page_in_browser.worker  # fixtures


@pytest.mark.slow
def test_paint_is_repainted_and_the_rest_stays(opened, worker):
    (first,) = make(opened, seed="50", steps="2")
    opened.click("#from")
    opened.wait_for("input")
    opened.click("[name=task][value=inpaint]")
    opened.run("byId('canvas').scrollIntoView({block: 'center'})")
    box = opened.run("mask.getBoundingClientRect().toJSON()")
    left = [(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * share / 10) for share in range(11)]
    opened.drag(*left)
    painted = (
        "(() => { const copy = new OffscreenCanvas(mask.width, mask.height).getContext('2d');"
        "copy.drawImage(mask, 0, 0);"
        "const {data} = copy.getImageData(0, 0, mask.width, mask.height);"
        "return data.filter((value, i) => i % 4 === 3 && value > 127).length / data.length * 4 })()"
    )
    share = opened.run(painted)
    assert 0.1 < share < 0.5
    opened.click("#invert")
    assert opened.run(painted) == pytest.approx(1 - share, abs=0.02)
    opened.click("#undo")
    assert opened.run(painted) == pytest.approx(share, abs=0.02)
    (second,) = make(opened, seed="51", steps="4", **SMALL)
    assert worker.latest()[0].pictures[0].settings["task"] == "inpaint"
    changed = np.abs(pixels(worker, first).astype(int) - pixels(worker, second)).max(axis=2)
    side = changed.shape[1]
    assert changed[:, : side // 5].mean() > 1
    assert changed[:, side * 3 // 4 :].max() == 0
    arrive(opened, opened.run("location.href"))  # the strokes come back with the picture
    opened.click("#gallery li:not(#live) button")
    opened.wait_for("input && fields.seed.value === '51'")
    assert opened.run("[task(), input.strokes.length]") == ["inpaint", 1]
    assert opened.run(painted) == pytest.approx(share, abs=0.02)
    assert make(opened, seed="52", steps="4", **SMALL) != [second]


@pytest.mark.slow
def test_a_mask_can_be_painted_with_keys(opened):
    make(opened, steps="2")
    opened.click("#from")
    opened.wait_for("input")
    opened.click("[name=task][value=inpaint]")
    opened.run("mask.focus()")
    for key in (" ", "ArrowRight", "ArrowDown", " ", "u"):
        opened.press(key)
    assert opened.run("input.strokes.length") == 1
    assert opened.run("input.strokes[0].points") == opened.run("[mask.width / 2, mask.height / 2]")
    opened.press(" ")
    middle, second = opened.run("input.strokes.map(stroke => stroke.points)")
    assert second[0] > middle[0]
    assert second[1] > middle[1]


@pytest.mark.slow
def test_nothing_painted_is_said_and_not_sent(opened, worker):
    make(opened, steps="2")
    opened.click("#from")
    opened.wait_for("input")
    opened.click("[name=task][value=inpaint]")
    jobs = len(worker.jobs)
    opened.click("#run")
    assert "Paint over the part to repaint" in opened.wait_for("byId('problem').textContent")
    assert len(worker.jobs) == jobs


DROP = """(() => {
  const files = new DataTransfer(), bytes = Uint8Array.from(atob("DATA"), letter => letter.charCodeAt(0));
  files.items.add(new File([bytes], "moon.png", {type: "image/png"}));
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
})()"""


def picture_file(path):
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("way", ["drop", "button"])
def test_a_picture_to_begin_with_comes_by_drop_or_by_the_file_button(opened, worker, tmp_path, way):
    file = picture_file(tmp_path / "moon.png")
    if way == "drop":
        data = base64.b64encode(file.read_bytes()).decode()
        opened.run(DROP.replace("DATA", data))
    else:
        node = opened.call("Runtime.evaluate", expression="byId('file')")["result"]["objectId"]
        opened.call("DOM.setFileInputFiles", files=[str(file)], objectId=node)
    opened.wait_for("input")
    assert opened.run("byId('begin').open && !byId('editor').hidden")
    make(opened, steps="4", strength="0.5", **SMALL)
    settings = worker.latest()[0].pictures[0].settings
    assert (settings["task"], settings["strength"]) == ("img2img", 0.5)
    opened.click("#without")
    assert opened.run("task()") == "txt2img"


@pytest.mark.slow
def test_a_file_that_is_no_picture_is_refused_with_a_sentence(opened):
    opened.run("tried(give)(new File(['<svg/>'], 'a.svg', {type: 'image/svg+xml'}), 'a.svg')")
    assert opened.run("byId('problem').textContent").startswith(
        "a.svg is not a picture of a kind that can be used: PNG,"
    )
    opened.run("tried(give)(new File(['GIF'], 'b.png', {type: 'image/png'}), 'b.png')")
    assert opened.wait_for("byId('problem').textContent") == "b.png cannot be read as a picture."
