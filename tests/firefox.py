"""A headless Firefox, driven through Marionette: its own protocol on a port of this machine."""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

NAMES = ("firefox-esr", "firefox")
PATIENCE = 180  # seconds for an answer, on a busy machine


def find_firefox() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Firefox:
    """One page. A message is its length, a colon, and a list as JSON: [0, number, command, arguments]."""

    def __init__(self, executable: str, profile: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        preferences = {"marionette.port": port, "browser.shell.checkDefaultBrowser": False}
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in preferences.items()]
        (profile / "user.js").write_text("".join(lines))
        command = [executable, "--headless", "--marionette", "--no-remote", "--profile", str(profile)]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self._process = subprocess.Popen(command, env={**os.environ, "HOME": str(profile)}, **streams)
        self._socket, self._number, self._rest = _connected(port), 0, b""
        self._answer()  # who it is
        self.call("WebDriver:NewSession")
        self.call("WebDriver:SetTimeouts", script=1000 * PATIENCE)

    def call(self, command: str, **arguments):
        self._number += 1
        text = json.dumps([0, self._number, command, arguments]).encode()
        self._socket.sendall(b"%d:%s" % (len(text), text))
        _, _, error, result = self._answer()
        assert error is None, error
        return result

    def open(self, address: str) -> None:
        self.call("WebDriver:Navigate", url=address)

    def run(self, script: str):
        """The value of an expression in the page; a promise is awaited."""
        code = f"Promise.resolve().then(() => {script}).then(arguments[0], error => arguments[0](String(error)));"
        return self.call("WebDriver:ExecuteAsyncScript", script=code, args=[])["value"]

    def _answer(self):
        while b":" not in self._rest:
            self._receive()
        length, _, self._rest = self._rest.partition(b":")
        while len(self._rest) < int(length):
            self._receive()
        message, self._rest = self._rest[: int(length)], self._rest[int(length) :]
        return json.loads(message)

    def _receive(self) -> None:
        more = self._socket.recv(1 << 16)
        assert more, "Firefox has closed the connection"
        self._rest += more

    def close(self) -> None:
        self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _connected(port: int) -> socket.socket:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "Firefox does not start"
            time.sleep(0.2)
