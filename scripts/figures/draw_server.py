"""The pictures of the server's page in its docs, in Chromium: docs/server-page.webp and docs/server-phone.webp.

python scripts/figures/draw_server.py
"""

from chromium import ROOT, chromium, save, screenshot
from page_in_browser import arrive, make
from PIL import Image
from served import listening_server, working

PICTURES = {  # prompt -> seed, from the oldest in the gallery to the one that is shown
    "a red circle on a blue background": "1",
    "a large green heart on a white background": "2",
    "an orange ring above a blue square on a white background": "3",
    "a yellow star on a striped purple background": "5",
    "a (yellow:1.2) star on a striped purple background": "4",
}
BRUSH = ((0.4, 0.3), (0.6, 0.6))  # over a part of the star: the ends of the stroke, as shares of the picture
GAP = 20  # pixels between the two phones


def main() -> None:
    with (
        chromium(__doc__) as (browser, folder),
        working(ROOT / "weights/sd-shapes.ckpt", folder / "pictures") as worker,
        listening_server(worker) as port,
    ):
        address = f"http://127.0.0.1:{port}/"
        arrive(browser, address, width=1280, height=860)
        for prompt, seed in PICTURES.items():
            make(browser, prompt=prompt, seed=seed)
        browser.run("fields.steps.closest('details').open = true; fields.prompt.scrollIntoView({block: 'end'})")
        save(screenshot(browser), "server-page.webp")
        arrive(browser, address, width=390, height=844, scheme="dark")
        browser.click("#gallery li:not(#live) button")
        browser.run("document.querySelectorAll('details').forEach(each => { each.open = false }); scrollTo(0, 0)")
        left = screenshot(browser)
        browser.click("#from")
        browser.wait_for("input")
        browser.click("[name=task][value=inpaint]")
        browser.run("byId('canvas').closest('details').scrollIntoView()")
        box = browser.run("mask.getBoundingClientRect().toJSON()")
        browser.drag(*((box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in BRUSH))
        save(side_by_side(left, screenshot(browser)), "server-phone.webp")


def side_by_side(first: Image.Image, second: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (first.width + GAP + second.width, first.height), "white")
    sheet.paste(first, (0, 0))
    sheet.paste(second, (first.width + GAP, 0))
    return sheet


if __name__ == "__main__":
    main()
