"""The pictures of `sd play` in its docs, in Chromium: docs/play.webp and docs/play-phone.webp.

python scripts/figures/draw_play.py
"""

import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from sd.app.jobs.static_server import FolderServer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, find_browser  # noqa: E402

DESK = "#prompt=a red circle to the left of a white star on a blue background&seed=1&steps=12"
PHONE = "#prompt2=a green star on a yellow background&seed=3&tool=mix"
STATE = "import(new URL('page_state.js', location)).then(all => Object.assign(window, all)).then(() => true)"
READY = "window.app && !app.running && app.states.at(-1)?.exact"


def main() -> None:
    executable = find_browser()
    if executable is None:
        sys.exit("draw_play needs Chromium in PATH. Install it, for example with: apt install chromium")
    with tempfile.TemporaryDirectory() as folder:
        play = Path(folder, "play")
        subprocess.run([sys.executable, "-m", "sd", "play", "-q", "-o", play], cwd=ROOT, check=True)
        browser = Browser(executable, Path(folder, "profile"))
        try:
            with served(play) as address:
                open_page(browser, address + DESK, 1400, 960)
                browser.click("#strip .word:nth-child(10)")  # "star"
                browser.click("#film button:nth-child(7)")
                browser.run("scrollTo(0, 0)")
                save(screenshot(browser), ROOT / "docs/play.webp", 1200)
                open_page(browser, address + PHONE, 390, 844)
                browser.click("#mix-way")
                browser.wait_for("byId('way').children.length === 5 && !app.running")
                browser.run("byId('way').scrollIntoView({block: 'end'})")
                save(screenshot(browser), ROOT / "docs/play-phone.webp", 390)
        finally:
            browser.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder on a free port of this machine."""
    with FolderServer(folder, socket.create_server(("127.0.0.1", 0))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def open_page(browser: Browser, address: str, width: int, height: int) -> None:
    browser.open("about:blank")
    browser.open(address, width=width, height=height)
    browser.run(STATE)
    browser.wait_for(READY)


def screenshot(browser: Browser) -> Image.Image:
    browser.run("document.activeElement.blur()")
    browser.press("Escape")  # waits until it is drawn
    with tempfile.TemporaryDirectory() as folder:
        browser.screenshot(Path(folder, "shot.png"))
        return Image.open(Path(folder, "shot.png")).convert("RGB")


def save(picture: Image.Image, target: Path, width: int) -> None:
    size = (width, round(picture.height * width / picture.width))
    picture.resize(size, Image.Resampling.LANCZOS).save(target, quality=85, method=6)
    print(target)


if __name__ == "__main__":
    main()
