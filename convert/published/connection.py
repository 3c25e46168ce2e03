"""HTTP connections that end: none waits long for a host, for endless headers, or for a trickle of bytes."""

import http.client
import io
import math
import socket
import time
import urllib.request

CONNECT = 10  # seconds until a host has to answer
HEAD = 1 << 20  # bytes before the body, redirects' pages included
PERIOD = 60  # seconds of waiting in which at least so many bytes must arrive:
LEAST = 60_000


class SlowError(OSError):
    """The server sends next to nothing, or no end of headers. Its text is a predicate whose subject is the server."""


class _Stream(io.RawIOBase):
    """What a connection brings, as long as it brings enough and its headers end."""

    def __init__(self, raw: socket.SocketIO):
        self.raw, self.head = raw, HEAD
        self.waited, self.came = 0.0, 0  # seconds and bytes of the current period

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:
        started = time.monotonic()
        count = self.raw.readinto(buffer)
        self.waited += time.monotonic() - started
        self.came += count or 0
        self.head -= count or 0
        if self.head < 0:
            raise SlowError(f"sends more than {HEAD} bytes before the file")
        if self.waited > PERIOD:
            if count and self.came < LEAST:
                raise SlowError(f"sent only {self.came} bytes in {PERIOD} seconds")
            self.waited, self.came = 0.0, 0
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args, **options):
        super().__init__(sock, *args, **options)
        self.stream = _Stream(self.fp.detach())
        self.fp = io.BufferedReader(self.stream)


def body_follows(response: http.client.HTTPResponse) -> None:
    """The headers are complete: from here on, any number of bytes may come."""
    response.stream.head = math.inf


class _QuickToConnect:
    response_class = _Response

    def connect(self) -> None:
        patience, self.timeout = self.timeout, CONNECT
        super().connect()
        self.sock.settimeout(patience)


class _Http(_QuickToConnect, http.client.HTTPConnection):
    """A plain connection."""


class _Https(_QuickToConnect, http.client.HTTPSConnection):
    """An encrypted one."""


class HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Http, request)


class HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Https, request)
