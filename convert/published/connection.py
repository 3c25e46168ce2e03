"""HTTP connections that end: none waits long for a host, for endless headers, or for a trickle of bytes."""

import http.client
import io
import math
import socket
import time
import urllib.request
from urllib.parse import urljoin, urlsplit

from convert.errors import shown

CONNECT = 10  # seconds until a host has to answer
HEAD = 1 << 20  # bytes before the body, redirects' pages included
PERIOD = 60  # seconds of waiting in which at least so many bytes must arrive:
LEAST = 60_000


class DownloadError(OSError):
    """A failed download: why, and what to do. The bytes so far are kept unless the text says otherwise."""


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


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https; the token goes along within one host only, never from https to http."""

    def http_error_302(self, request, file, code, message, headers):
        old, address = urlsplit(request.full_url), headers.get("Location") or headers.get("URI") or ""
        if not address:
            raise DownloadError(f"{old.hostname} redirects, and does not say where to (HTTP {code}).")
        new = urlsplit(urljoin(request.full_url, address))
        if new.scheme not in ("http", "https") or new.port == 0:  # a port that is none raises ValueError
            raise DownloadError(f"{old.hostname} redirects to {shown(address)}, which is not a web address.")
        if old.scheme == "https" and new.scheme != "https":
            raise DownloadError(f"{old.hostname} redirects to {shown(address)}, which is not encrypted; not followed.")
        return super().http_error_302(request, file, code, message, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, request, file, code, message, headers, address):
        following = super().redirect_request(request, file, code, message, headers, address)
        old, new = urlsplit(request.full_url), urlsplit(address)
        authorization = request.unredirected_hdrs.get("Authorization")
        if following and authorization and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            following.add_unredirected_header("Authorization", authorization)
        return following


def opened(request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    """The response whose headers are complete, behind all redirects; any number of bytes may follow.

    timeout  seconds without a byte

    Raises DownloadError, SlowError, urllib.error.URLError, http.client.HTTPException.
    """
    try:
        response = urllib.request.build_opener(_Redirects, HttpHandler, HttpsHandler).open(request, timeout=timeout)
    except (ValueError, OverflowError, http.client.InvalidURL) as error:  # of brackets, ports and names that cannot be
        raise DownloadError(f"{shown(request.full_url)} leads to an invalid address: {shown(str(error))}.") from None
    response.stream.head = math.inf
    return response
