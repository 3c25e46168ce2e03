"""A folder behind HTTP on this machine, with the headers that let a page compute in several threads."""

import socket
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HEADERS = {
    # Browsers share memory between threads only in pages that nothing from elsewhere can reach into.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again, and answered with 304 as long as the file is the same
}
TYPES = {  # not left to the system, whose table may say otherwise
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".css": "text/css",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".txt": "text/plain; charset=utf-8",
}


class Handler(SimpleHTTPRequestHandler):
    """Serves files, says nothing, and lists no folders."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for a request
    extensions_map = {"": "application/octet-stream", **TYPES}  # noqa: RUF012 - as the base class has it

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: str) -> None:
        self.send_error(HTTPStatus.NOT_FOUND, "There is no such file")

    def version_string(self) -> str:
        return "sd"

    def log_message(self, *_: object) -> None:
        """Nothing."""


class FolderServer(ThreadingHTTPServer):
    """Serves a folder on a socket that listens already."""

    daemon_threads = True

    def __init__(self, folder: Path, sock: socket.socket):
        super().__init__(sock.getsockname()[:2], partial(Handler, directory=str(folder)), bind_and_activate=False)
        self.socket.close()
        self.socket = sock

    def handle_error(self, *_: object) -> None:
        """A browser that closes a connection is no error."""
