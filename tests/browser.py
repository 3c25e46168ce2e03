"""A headless browser, driven through two pipes, and a reader of pages."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    " ": (32, " "),
    "End": (35, ""),
    "Home": (36, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
    "Delete": (46, ""),
    "u": (85, "u"),
}  # code, text


PATIENCE = 120  # seconds for an answer, on a busy machine


class BrowserGone(Exception):
    """The browser does not start, has exited, or does not answer."""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None) if os.name == "posix" else None


class Browser:
    """One page in Chromium; `problems` and `requests` hold its warnings and network requests.

    The protocol: one JSON object after another, each ended by a zero byte, on file descriptors 3 and 4.
    """

    def __init__(self, executable: str, profile: Path):
        (read, ours), (mine, write) = os.pipe(), os.pipe()

        def as_3_and_4():  # in the child, between fork and exec; through high numbers, so that none is overwritten
            for number, target in ((os.dup2(read, 103), 3), (os.dup2(write, 104), 4)):
                os.dup2(number, target)

        options = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-extensions", "--no-proxy-server"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # Chromium's sandbox does not run as root
        self._process = subprocess.Popen(
            [executable, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=as_3_and_4,
        )
        os.close(read)
        os.close(write)
        self._out, self._in = os.fdopen(ours, "wb", buffering=0), os.fdopen(mine, "rb")
        self._number, self._session, self._loaded, self._rest = 0, None, False, b""
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        try:
            self._out.write(json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            raise BrowserGone("it has exited") from None
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], PATIENCE)
            more = os.read(self._in.fileno(), 1 << 16) if ready else b""
            if not more:
                raise BrowserGone("it has exited" if ready else f"no answer for {PATIENCE} seconds")
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(json.dumps(params))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True
        return message

    def open(self, page: Path | str, *, width: int = 1280, height: int = 800, scheme="light", motion="reduce") -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)
        self._loaded = False
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not self._loaded:
            self._read()

    def run(self, script: str):
        """The value of an expression in the page; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, selector: str) -> None:
        """Click the middle of the first matching element."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.run(f"{element}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self._settle()

    def press(self, key: str, *, control: bool = False) -> None:
        code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if kind == "keyDown" and text and not control else {}
            modifiers = 2 * control
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers, **typed
            )
        self._settle()

    def write(self, text: str) -> None:
        """Type a text where the focus is."""
        self.call("Input.insertText", text=text)
        self._settle()

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point of the window, move it over the others, and release it at the last."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        self._settle()

    def wait_for(self, script: str) -> object:
        """The value of an expression in the page, once it is true."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}; {self.problems}"
            time.sleep(0.03)
        return value

    def _settle(self) -> None:
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._session = None
        self._out.write(json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        deadline = time.monotonic() + 10
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._out.close()
        self._in.close()


def data_of(text):
    """The JSON in a page of ours."""
    start = text.index('<script type="application/json" id="data">')
    return json.loads(text[text.index(">", start) + 1 : text.index("</script>", start)])


VOID = {"meta", "link", "br", "input", "img"}


class Reader(HTMLParser):
    """Elements as (tag, attributes), the text of table cells, and tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.cells, self.wrong, self._open = [], [], [], []
        self.feed(text)
        self.wrong += self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data):
        if "td" in self._open:
            self.cells[-1] += data

    def values(self, name, tag=None):
        return [attrs[name] for kind, attrs in self.elements if name in attrs and tag in (None, kind)]
