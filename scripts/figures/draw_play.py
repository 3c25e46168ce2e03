"""The pictures of `sd play` in its docs, in Chromium: docs/play.webp and docs/play-phone.webp.

python scripts/figures/draw_play.py
"""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chromium import ROOT, Browser, chromium, save, screenshot
from PIL import Image

from sd.app.jobs.static_server import FolderServer

DESK = "#prompt=a red circle to the left of a white star on a blue background&seed=1&steps=12"
PHONE = "#prompt2=a green star on a yellow background&seed=3&tool=mix"
STATE = "import(new URL('page_state.js', location)).then(all => Object.assign(window, all)).then(() => true)"
READY = "window.app && !app.running && app.states.at(-1)?.exact"


def main() -> None:
    with chromium(__doc__) as (browser, folder):
        play = folder / "play"
        subprocess.run([sys.executable, "-m", "sd", "play", "-q", "-o", play], cwd=ROOT, check=True)
        with served(play) as address:
            open_page(browser, address + DESK, 1400, 960)
            browser.click("#strip .word:nth-child(10)")  # "star"
            browser.click("#film button:nth-child(7)")
            browser.run("scrollTo(0, 0)")
            save(screenshot(browser).resize((1200, 823), Image.Resampling.LANCZOS), "play.webp")
            open_page(browser, address + PHONE, 390, 844)
            browser.click("#mix-way")
            browser.wait_for("byId('way').children.length === 5 && !app.running")
            browser.run("byId('way').scrollIntoView({block: 'end'})")
            save(screenshot(browser), "play-phone.webp")


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


if __name__ == "__main__":
    main()
