"""The pictures of the server's page in its docs, in Chromium: docs/server-page.webp and docs/server-phone.webp.

python scripts/figures/draw_server.py
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, find_browser  # noqa: E402
from page_in_browser import arrive, make  # noqa: E402
from served import listening_server, working  # noqa: E402

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
            save([shot_of(browser, Path(folder, "desk.png"))], ROOT / "docs/server-page.webp")
            arrive(browser, address, **PHONE)
            browser.click("#gallery li:not(#live) button")
            browser.run("document.querySelectorAll('details').forEach(each => { each.open = false }); scrollTo(0, 0)")
            left = shot_of(browser, Path(folder, "left.png"))
            browser.click("#from")
            browser.wait_for("input")
            browser.click("[name=task][value=inpaint]")
            browser.run("byId('canvas').closest('details').scrollIntoView()")
            box = browser.run("mask.getBoundingClientRect().toJSON()")
            browser.drag(*((box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in BRUSH))
            save([left, shot_of(browser, Path(folder, "right.png"))], ROOT / "docs/server-phone.webp")
        finally:
            browser.close()


def shot_of(browser: Browser, path: Path) -> Image.Image:
    browser.run("document.activeElement.blur()")
    browser.press("Escape")  # waits until it is drawn
    browser.screenshot(path)
    with Image.open(path) as picture:
        return picture.convert("RGB")


def save(shots: list[Image.Image], target: Path) -> None:
    """The screenshots side by side."""
    width, height = shots[0].size
    sheet = Image.new("RGB", (len(shots) * (width + GAP) - GAP, height), "white")
    for index, shot in enumerate(shots):
        sheet.paste(shot, (index * (width + GAP), 0))
    sheet.save(target, quality=85, method=6)
    print(target)


if __name__ == "__main__":
    main()
