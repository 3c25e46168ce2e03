"""The pictures of `sd explain` in the README and docs/explain.md: the page's first screen at step 5, in Chromium.

python scripts/figures/draw_explain.py
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, find_browser  # noqa: E402

PROMPT, STEP = "a red circle to the left of a white star on a blue background", 5
SCREENS = {  # file in docs: width and height, light or dark
    "explain.webp": (1200, 1120, "light"),
    "explain-tablet.webp": (820, 1180, "dark"),
    "explain-phone.webp": (390, 1180, "light"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.parse_args()
    executable = find_browser()
    if executable is None:
        sys.exit("draw_explain needs Chromium in PATH. Install it, for example with: apt install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "page.html"), Path(folder, "page.png")
        command = [sys.executable, "-m", "sd", "explain", PROMPT, "--steps", "12", "-s", "1", "-q", "-o", page]
        subprocess.run(command, cwd=ROOT, check=True)
        browser = Browser(executable, Path(folder, "profile"))
        try:
            for name, (width, height, scheme) in SCREENS.items():
                browser.open(page, width=width, height=height, scheme=scheme)
                browser.run(f"go({STEP})")
                browser.press("Escape")  # waits until it is drawn
                browser.screenshot(shot)
                with Image.open(shot) as picture:
                    picture.convert("RGB").save(ROOT / "docs" / name, quality=80, method=6)
                print(ROOT / "docs" / name)
        finally:
            browser.close()


if __name__ == "__main__":
    main()
