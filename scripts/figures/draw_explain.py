"""The pictures of `sd explain` in the README and docs/explain.md: the page's first screen at step 5, in Chromium.

python scripts/figures/draw_explain.py
"""

import subprocess
import sys

from chromium import ROOT, chromium, save, screenshot

PROMPT, STEP = "a red circle to the left of a white star on a blue background", 5
SCREENS = {  # file in docs: width and height, light or dark
    "explain.webp": (1200, 1120, "light"),
    "explain-tablet.webp": (820, 1180, "dark"),
    "explain-phone.webp": (390, 1180, "light"),
}


def main() -> None:
    with chromium(__doc__) as (browser, folder):
        page = folder / "page.html"
        command = [sys.executable, "-m", "sd", "explain", PROMPT, "--steps", "12", "-s", "1", "-q", "-o", page]
        subprocess.run(command, cwd=ROOT, check=True)
        for name, (width, height, scheme) in SCREENS.items():
            browser.open(page, width=width, height=height, scheme=scheme)
            browser.run(f"go({STEP})")
            save(screenshot(browser), name, quality=80)


if __name__ == "__main__":
    main()
