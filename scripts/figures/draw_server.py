"""The pictures of the server's page in its docs, in Chromium: docs/server-page.webp and docs/server-phone.webp.

python scripts/figures/draw_server.py
"""

import sys
import tempfile
from pathlib import Path

from draw_play import ROOT, save, screenshot
from PIL import Image

sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, find_browser
from page_in_browser import arrive, make
from served import listening_server, working

PICTURES = {  # prompt -> seed, from the oldest in the gallery to the one that is shown
    "a red circle on a blue background": "1",
    "a large green heart on a white background": "2",
    "an orange ring above a blue square on a white background": "3",
    "a yellow star on a striped purple background": "5",
    "a (yellow:1.2) star on a striped purple background": "4",
}
BRUSH = ((0.4, 0.3), (0.6, 0.6))  # over a part of the star: the ends of the stroke, as shares of the picture
PHONE = {"width": 390, "height": 844, "scheme": "dark"}
GAP = 20  # pixels between the two phones


def main() -> None:
    executable = find_browser()
    if executable is None:
        sys.exit("draw_server needs Chromium in PATH. Install it, for example with: apt install chromium")
    with (
        tempfile.TemporaryDirectory() as folder,
        working(ROOT / "weights/sd-shapes.ckpt", Path(folder, "pictures")) as worker,
        listening_server(worker) as port,
    ):
        browser, address = Browser(executable, Path(folder, "profile")), f"http://127.0.0.1:{port}/"
        try:
            arrive(browser, address, width=1280, height=860)
            for prompt, seed in PICTURES.items():
                make(browser, prompt=prompt, seed=seed)
            browser.run("fields.steps.closest('details').open = true; fields.prompt.scrollIntoView({block: 'end'})")
            save(screenshot(browser), ROOT / "docs/server-page.webp", 1280)
            arrive(browser, address, **PHONE)
            browser.click("#gallery li:not(#live) button")
            browser.run("document.querySelectorAll('details').forEach(each => { each.open = false }); scrollTo(0, 0)")
            left = screenshot(browser)
            browser.click("#from")
            browser.wait_for("input")
            browser.click("[name=task][value=inpaint]")
            browser.run("byId('canvas').closest('details').scrollIntoView()")
            box = browser.run("mask.getBoundingClientRect().toJSON()")
            browser.drag(*((box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in BRUSH))
            save(side_by_side(left, screenshot(browser)), ROOT / "docs/server-phone.webp", 2 * PHONE["width"] + GAP)
        finally:
            browser.close()


def side_by_side(first: Image.Image, second: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (first.width + GAP + second.width, first.height), "white")
    sheet.paste(first, (0, 0))
    sheet.paste(second, (first.width + GAP, 0))
    return sheet


if __name__ == "__main__":
    main()
