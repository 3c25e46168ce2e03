"""The picture of `sd explain` in the README: docs/explain.png, the page's first screen at step 5, in Chromium.

python scripts/figures/draw_explain.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, find_browser  # noqa: E402

PROMPT, STEP = "a red circle to the left of a white star on a blue background", 5


def main() -> None:
    executable = find_browser()
    if executable is None:
        sys.exit("draw_explain needs Chromium in PATH. Install it, for example with: apt install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        command = [sys.executable, "-m", "sd", "explain", PROMPT, "--steps", "12", "-s", "1", "-q", "-o", page]
        subprocess.run(command, cwd=ROOT, check=True)
        browser = Browser(executable, Path(folder, "profile"))
        try:
            browser.open(page, width=1200, height=1040)
            browser.run(f"go({STEP})")
            browser.press("Escape")  # waits until it is drawn
            browser.screenshot(Path(folder, "page.png"))
        finally:
            browser.close()
        with Image.open(Path(folder, "page.png")) as picture:
            picture.convert("RGB").quantize(128).save(ROOT / "docs/explain.png", optimize=True)


if __name__ == "__main__":
    main()
