"""Pages in Chromium for the scripts that draw them: the browser, screenshots, and the folder that they end in."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, find_browser  # noqa: E402


@contextmanager
def chromium(description: str) -> Iterator[tuple[Browser, Path]]:
    """The browser and a temporary folder, for a script without options; ends the program without Chromium.

    description  of the script, for --help
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.parse_args()
    executable = find_browser()
    if executable is None:
        sys.exit(f"{Path(sys.argv[0]).stem} needs Chromium in PATH. Install it, for example with: apt install chromium")
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(executable, Path(folder, "profile"))
        try:
            yield browser, Path(folder)
        finally:
            browser.close()


def screenshot(browser: Browser) -> Image.Image:
    browser.run("document.activeElement.blur()")
    browser.press("Escape")  # waits until it is drawn
    with tempfile.TemporaryDirectory() as folder:
        browser.screenshot(Path(folder, "shot.png"))
        return Image.open(Path(folder, "shot.png")).convert("RGB")


def save(picture: Image.Image, name: str, *, quality: int = 85) -> None:
    """Write a picture into docs, as WebP."""
    picture.save(ROOT / "docs" / name, quality=quality, method=6)
    print(ROOT / "docs" / name)
