"""The page of `sd play` with its model in a browser: what people do there."""

import base64
import json

import numpy as np
import pytest
import test_play_in_browsers
from PIL import Image
from test_architecture_page import LOOKS

from sd.app.jobs.stored import read

folder, asked = test_play_in_browsers.folder, test_play_in_browsers.asked  # fixtures
address = test_play_in_browsers.address
pytestmark = pytest.mark.slow
STATE = "import(new URL('page_state.js', location)).then(all => Object.assign(window, all)).then(() => true)"
READY = "window.app && !app.running && app.states.length > 1 && app.states.at(-1).exact"
IDLE = "!app.running && app.states.at(-1)?.exact"
PIXELS = "btoa(String.fromCharCode(...app.states.at(-1).picture.data))"


@pytest.fixture
def opened(browser, address):
    """The page with its first picture; afterwards, nothing was said, and nothing was asked of others."""
    browser.requests.clear()
    browser.problems.clear()
    arrive(browser, address + "/#steps=6&seed=1")
    yield browser
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith((address, "data:", f"blob:{address}"))] == []


def arrive(browser, url, **look):
    browser.open("about:blank")
    browser.open(url, **look)
    browser.run(STATE)
    browser.wait_for(READY)
    assert browser.run("byId('problem').textContent") == ""


def fill(browser, **values):
    for name, value in values.items():
        browser.run(
            f"byId({name!r}).value = {json.dumps(value)};"
            f"byId({name!r}).dispatchEvent(new Event('input', {{bubbles: true}}))"
        )


def drawn(browser):
    """The picture once the run that was asked for is over."""
    browser.wait_for("app.running")
    browser.wait_for(IDLE)
    assert browser.run("byId('problem').textContent") == ""
    return pixels(browser)


def pixels(browser):
    return decoded(browser.run(PIXELS))


def decoded(text):
    """A picture of the page, (128, 128, 3)."""
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(128, 128, 4)[:, :, :3].astype(int)


def stroke(browser, *points):
    """Paint over points of the picture, each (across, down) from 0 to 1."""
    browser.run("byId('frame').scrollIntoView({block: 'center'})")
    box = browser.run("byId('paint').getBoundingClientRect().toJSON()")
    browser.drag(*[(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in points])


def test_a_prompt_becomes_a_picture_step_by_step(opened):
    first = pixels(opened)
    assert opened.run("byId('film').children.length") == 7
    assert opened.run("byId('badge').textContent") == "finished"
    assert opened.run("byId('said').textContent").startswith("The picture is ready: 6 steps in ")
    fill(opened, prompt="a green star on a yellow background")
    second = drawn(opened)
    assert np.abs(first - second).mean() > 20
    fill(opened, prompt="a red circle on a blue background")
    assert (drawn(opened) == first).all()
    opened.click("#film button:nth-child(3)")
    assert opened.run("byId('now').textContent").startswith("step 2 of 6, timestep ")
    shown = "[...byId('picture').getContext('2d').getImageData(64, 64, 1, 1).data]"
    assert opened.run(shown) == opened.run("[...app.states[2].picture.data.slice(4 * (64 * 128 + 64)).slice(0, 4)]")


def test_a_run_stops_at_a_step_and_goes_on_as_if_it_had_not(opened):
    fill(opened, steps="20")
    whole = drawn(opened)
    opened.click("#draw")
    opened.wait_for("app.states.length > 3")
    opened.click("#draw")
    opened.wait_for("!app.running")
    held = opened.run("app.held")
    assert 3 <= held < 20
    assert opened.run("byId('go').textContent") == f"Go on from step {held}"
    opened.click("#go")
    assert (drawn(opened) == whole).all()


def test_a_word_that_is_changed_at_a_held_step_changes_what_comes_after(opened):
    before = pixels(opened)
    opened.click("#film button:nth-child(3)")
    opened.click("#hold")
    opened.run("window.kept = app.states.slice(0, 3)")
    fill(opened, prompt="a red circle on a green background")
    after = drawn(opened)
    assert np.abs(before - after).mean() > 2
    assert opened.run("kept.every((state, i) => state === app.states[i]) && app.states.length === 7")
    fill(opened, seed="2")
    drawn(opened)
    assert opened.run("app.held") is None


def test_words_show_where_they_are_read(opened):
    words = opened.run("[...byId('strip').querySelectorAll('b')].map(word => word.textContent)")
    assert words == ["a", "red", "circle", "on", "a", "blue", "background", "the rest"]
    opened.click("#strip .word:nth-child(3)")
    map_now = "byId('heat').toDataURL()"
    circle = opened.run(map_now)
    assert opened.run("byId('heat-note').textContent").startswith("“circle” gets ")
    assert not opened.run("byId('heat').hidden")
    opened.click("#strip .word:nth-child(7)")
    assert opened.run(map_now) != circle
    opened.click("#strip .word:nth-child(7)")
    assert opened.run("byId('heat').hidden")
    shares = opened.run(
        "[...Array(8).keys()].map(k => { const {maps, side} = app.states[6].attention;"
        "return maps.slice(k * side ** 2, (k + 1) * side ** 2).reduce((a, b) => a + b) / side ** 2 })"
    )
    assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_the_timestep_can_be_dragged_over_the_finished_picture(opened):
    picture = pixels(opened)
    opened.click("#tab-time")
    opened.wait_for("app.guess?.label === 'one guess at t = 500'")
    guesses = []
    for timestep in (20, 990):
        fill(opened, time=str(timestep))
        opened.wait_for(f"app.guess?.label === 'one guess at t = {timestep}'")
        data = opened.run("btoa(String.fromCharCode(...app.guess.picture.data))")
        guesses.append(decoded(data))
    quick = opened.run(
        "app.engine.decode(app.states.at(-1).latents, {quick: true})"
        ".then(({data}) => btoa(String.fromCharCode(...data)))"
    )
    near, far = (np.abs(decoded(quick) - guess).mean() for guess in guesses)
    assert near < 5
    assert near < far
    opened.click("#tab-inside")
    assert opened.run("app.guess") is None
    assert (pixels(opened) == picture).all()


def test_what_is_painted_into_latents_is_drawn_on_from_there(opened):
    before = pixels(opened)
    opened.click("#tab-latents")
    opened.click("#film button:nth-child(5)")
    opened.wait_for("!byId('paint').hidden")
    opened.run("window.latents = [...app.states[4].latents].join()")
    opened.click("#colours [value=yellow]")
    stroke(opened, (0.2, 0.2), (0.8, 0.2))
    opened.wait_for("app.guess")
    assert opened.run("[...app.states[4].latents].join() !== latents")
    opened.click("#latents-undo")
    assert opened.run("[...app.states[4].latents].join() === latents")
    stroke(opened, (0.2, 0.2), (0.8, 0.2))
    opened.click("#latents-go")
    after = drawn(opened)
    changed = np.abs(after - before).mean(axis=2)
    assert changed[16:36, 32:96].mean() > 5 * max(1, changed[100:].mean())


def test_a_channel_painted_at_the_end_is_decoded_at_once(opened):
    before = pixels(opened)
    opened.click("#tab-latents")
    opened.click("[name=brush][value=channel]")
    opened.wait_for("!byId('paint').hidden")
    stroke(opened, (0.5, 0.8), (0.7, 0.8))
    opened.wait_for("app.guess")
    changed = np.abs(pixels(opened) - before).mean(axis=2)
    assert changed[90:116, 60:96].mean() > 2 * max(1, changed[:30].mean())  # the decoder's norms carry some of it away
    assert opened.run("byId('latents-go').disabled")


def test_two_prompts_mix_and_the_ends_are_the_prompts_alone(opened):
    first = pixels(opened)
    other = "a green star on a yellow background"
    opened.click("#tab-mix")
    fill(opened, prompt2=other)
    opened.click("#mix-way")
    opened.wait_for("byId('way').children.length === 5 && !app.running")
    ways = "[...byId('way').querySelectorAll('canvas')].map(one => one.toDataURL())"
    assert len(set(opened.run(ways))) == 5
    assert opened.run("app.settings.mix") == 1
    last = pixels(opened)
    fill(opened, mix="0")
    assert (drawn(opened) == first).all()
    fill(opened, prompt=other)
    assert np.abs(drawn(opened) - last).max() <= 2


def test_paint_is_repainted_and_the_rest_stays_to_the_bit(opened):
    before = pixels(opened)
    opened.click("#tab-repaint")
    opened.click("#repaint")
    assert "Paint over the part to repaint" in opened.run("byId('problem').textContent")
    stroke(opened, (0.1, 0.5), (0.3, 0.5), (0.3, 0.9), (0.1, 0.9))
    opened.click("#mask-invert")
    opened.click("#mask-undo")
    opened.run("byId('words').value = 'a yellow star on a green background'")
    opened.click("#repaint")
    after = drawn(opened)
    changed = np.abs(after - before).max(axis=2)
    assert changed[:, 64:].max() == 0
    assert changed[64:110, 10:30].mean() > 20
    assert "repainted: a yellow star" in opened.run("import('./page_save.js').then(({parameters}) => parameters())")


def test_pictures_drawn_before_come_back_with_their_steps_and_settings(opened):
    first = pixels(opened)
    assert opened.run("byId('before').hidden")
    fill(opened, seed="2", guidance="5")
    second = drawn(opened)
    labels = "[...byId('shelf').children].map(button => button.innerText.trim())"
    assert opened.run(labels) == ["seed 2, guidance 5", "“a red circle on a blue…”"]
    opened.click("#shelf button:nth-child(2)")
    assert (pixels(opened) == first).all()
    assert opened.run("[app.settings.seed, byId('guidance').value, app.running, app.place]") == [1, "3", False, 6]
    opened.click("#shelf button:first-child")
    assert (pixels(opened) == second).all()
    assert opened.run("byId('shelf').children.length") == 2


def test_keys_alone_draw_stop_paint_and_choose_tools(opened):
    def reach(id):
        for _ in range(80):
            opened.press("Tab")
            if opened.run("document.activeElement.id") == id:
                outline = opened.run("getComputedStyle(document.activeElement).outlineStyle")
                return outline
        raise AssertionError(f"Tab does not lead to {id}")

    opened.run("document.activeElement.blur(); scrollTo(0, 0)")
    assert reach("prompt") == "solid"
    opened.run("document.activeElement.select()")
    opened.write("a purple heart on a white background")
    opened.press("Enter")
    opened.wait_for("app.running && app.states.length > 1")
    opened.press("Escape")
    opened.wait_for("!app.running")
    assert opened.run("app.held") < 6
    reach("draw")
    opened.press("Enter")
    drawn(opened)
    reach("tab-inside")
    opened.press("ArrowRight")
    assert opened.run("document.activeElement.id") == "tab-time"
    opened.press("End")
    assert opened.run("[document.activeElement.id, byId('tool-repaint').hidden]") == ["tab-repaint", False]
    opened.run("byId('seed').focus()")
    reach("paint")
    for key in (" ", "ArrowRight", "ArrowDown", " ", "u"):
        opened.press(key)
    opened.run("byId('words').value = 'a black square on a white background'")
    before = pixels(opened)
    reach("repaint")
    opened.press("Enter")
    assert (drawn(opened) != before).any()


def test_settings_are_in_the_address_and_a_link_brings_the_picture_back(opened, address):
    fill(opened, prompt="a white ring, (black:1.2) & 50 % background", seed="77", guidance="4.5", sampler="ddim")
    picture = drawn(opened)
    link = opened.wait_for("location.hash.includes('4.5') && location.href")
    arrive(opened, link)
    assert opened.run("byId('prompt').value") == "a white ring, (black:1.2) & 50 % background"
    assert opened.run("[app.settings.seed, app.settings.sampler, byId('guidance').value]") == [77, "ddim", "4.5"]
    assert (pixels(opened) == picture).all()
    arrive(opened, address + "/#steps=999&seed=-3&guidance=much&sampler=none&tool=none")
    named = opened.run("[app.settings.steps, app.settings.seed, app.settings.guidance, app.settings.sampler]")
    assert named == [40, 0, 3, "dpmpp_2m"]


def test_a_saved_picture_carries_its_settings(opened, tmp_path):
    fill(opened, prompt="a red circle: “big”, on blue", negative="a star")
    picture = drawn(opened)
    data = opened.run(
        "import('./page_save.js').then(({png}) => png()).then(blob => blob.arrayBuffer())"
        ".then(bytes => btoa(String.fromCharCode(...new Uint8Array(bytes))))"
    )
    file = tmp_path / "saved.png"
    file.write_bytes(base64.b64decode(data))
    with Image.open(file) as saved:
        assert (np.asarray(saved.convert("RGB")) == picture).all()
    found, _ = read(file)
    settings = found.settings
    assert settings["prompt"] == "a red circle: “big”, on blue"
    assert settings["negative_prompt"] == "a star"
    assert (settings["seed"], settings["steps"], settings["sampler"]) == (1, 6, "dpmpp_2m")


def test_every_task_sets_its_controls_and_says_what_to_look_for(opened):
    count = opened.run("byId('tasks').children.length")
    assert count >= 8
    for place in range(1, count + 1):
        opened.click(f"#tasks li:nth-child({place}) button")
        opened.wait_for("app.running || !app.states.length")
        opened.wait_for(IDLE)
        assert opened.run("document.activeElement.id") == "task"
        assert opened.run("byId('task-look').textContent.length") > 60
        assert opened.run("location.hash.includes('task=' + app.task)")
    opened.run("location.hash = '#task=stop'")
    opened.wait_for("app.task === 'stop' && app.held === 3 && app.place === 3")
    opened.click("#task-close")
    assert opened.run("[byId('task').hidden, location.hash.includes('task')]") == [True, False]


def test_a_prompt_with_markup_stays_text_and_a_bad_weight_is_said(opened):
    fill(opened, prompt="<img src=x onerror=alert(1)> $circle")
    drawn(opened)
    assert opened.run("document.querySelectorAll('img').length") == 0
    fill(opened, prompt="a (red:99) circle")
    assert "99" in opened.wait_for("byId('problem').textContent")


def test_screen_readers_learn_what_each_control_is(opened):
    opened.run("document.querySelectorAll('details').forEach(box => { box.open = true })")
    opened.call("Accessibility.enable")
    active = {"button", "textbox", "spinbutton", "combobox", "slider", "radio", "checkbox", "link", "image", "tab"}
    seen = set()
    for tool in ("inside", "time", "latents", "mix", "repaint"):
        opened.click(f"#tab-{tool}")
        if tool == "latents":
            opened.click("[name=brush][value=channel]")
        nodes = [node for node in opened.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
        controls = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
        assert [role for role, name in controls if role in active and not name.strip()] == []
        seen |= set(controls)
    assert {("textbox", "Prompt"), ("slider", "Guidance scale"), ("slider", "Timestep t"), ("slider", "Step")} <= seen
    assert {("radio", "Channel 1"), ("button", "Another seed")} <= seen
    assert any(role == "status" for role, _ in seen)


@LOOKS
def test_page_fits_the_window_with_everything_open(opened, address, width, scheme):
    arrive(opened, address + "/#steps=20&prompt=" + "x" * 200, width=width, height=844, scheme=scheme)
    opened.run("document.querySelectorAll('details').forEach(box => { box.open = true })")
    for tool in ("inside", "time", "latents", "mix", "repaint"):
        opened.click(f"#tab-{tool}")
        assert opened.run("document.documentElement.scrollWidth") <= width
    opened.click("#tasks li:first-child button")
    assert opened.run("document.documentElement.scrollWidth") <= width
    dark = opened.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert dark == (scheme == "dark")
