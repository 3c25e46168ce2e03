"""Who may ask what: before any route, each request is checked for its host, its origin, its token and its size.

A page elsewhere can make a browser send requests to a server on the same machine. It cannot forge the headers that say
where it is from: the host that was asked for, and the origin.
"""

import base64
import binascii
import hmac
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sd.app.web.http import error_response
from sd.app.web.limits import ADDRESSES, BODY_SECONDS, GUESSES, MOST_BODY, PAUSE_SECONDS, PER_SECOND

WITHOUT_TOKEN = {"/api/health"}
LOCAL = {"localhost", "127.0.0.1", "::1"}
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


@dataclass(kw_only=True)
class Rules:
    """What a server demands.

    token    that each request must bear; None: none
    hosts    names under which it may be asked for, beside those of this machine and addresses in numbers
    origins  of pages elsewhere that may use it, such as "https://chat.example"
    """

    token: str | None = None
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    guesses: "Guesses" = field(default_factory=lambda: Guesses())

    def check(self, request: Request) -> None:
        """Raise HTTPException for a request that is not allowed."""
        headers = request.headers
        if len(headers.getlist("host")) != 1 or not self.is_ours(headers["host"]):
            raise HTTPException(403, "this server is not known by that name. Start it with --allow-host NAME.")
        if not self.is_from_here(request):
            raise HTTPException(403, "pages of other sites may not use this server. Start it with --allow-origin URL.")
        if self.token is not None and request.url.path not in WITHOUT_TOKEN and request.method != "OPTIONS":
            self.check_token(request)

    def is_ours(self, host: str) -> bool:
        """Whether a Host header names this server. A name that anybody can register may have been pointed here."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in LOCAL or name.endswith(".localhost") or name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)  # nobody can point one elsewhere
        except ValueError:
            return False
        return True

    def is_from_here(self, request: Request) -> bool:
        """Whether a request comes from this server's own page, from an allowed one, or from no browser."""
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
        if origin is not None:
            try:
                parts = urlsplit(origin)
            except ValueError:
                return False
            own = parts.scheme in ("http", "https") and parts.netloc == request.headers["host"]
            return own or origin in self.origins
        opened = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
        return site in (None, "none", "same-origin") or opened

    def check_token(self, request: Request) -> None:
        address = request.client.host if request.client else ""
        wait = self.guesses.wait(address)
        if wait > 0:
            raise HTTPException(429, "too many wrong tokens. Try again later.", {"Retry-After": str(math.ceil(wait))})
        given = token_in(request.headers.get("authorization", ""))
        if given is None or not hmac.compare_digest(given, self.token.encode()):
            if given is not None:
                self.guesses.failed(address)
            wanted = {"WWW-Authenticate": 'Basic realm="sd serve", charset="UTF-8"'}
            problem = "no token given" if given is None else "the token is wrong"
            raise HTTPException(401, f"{problem}. Send Authorization: Bearer TOKEN, or TOKEN as a password.", wanted)


def token_in(header: str) -> bytes | None:
    """The token in an Authorization header: of Bearer, or the password of Basic with any name. None without one."""
    scheme, _, value = header.partition(" ")
    value = value.strip().encode("latin-1", "replace")
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() == "basic":
        try:
            _, _, password = base64.b64decode(value, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return b""
        return password
    return None


class Guesses:
    """Slows down whoever tries tokens: each address has so many, which come back with time."""

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address -> guesses left, and when

    def wait(self, address: str) -> float:
        """Seconds until this address may try again; 0 if it may now."""
        left = self._now(self._group(address))
        return 0.0 if left >= 1 else (1 - left) / PER_SECOND

    def failed(self, address: str) -> None:
        address = self._group(address)
        self._left[address] = (self._now(address) - 1, self._clock())
        self._left.move_to_end(address)
        while len(self._left) > ADDRESSES:
            self._left.popitem(last=False)

    def _now(self, address: str) -> float:
        left, then = self._left.get(address, (GUESSES, self._clock()))
        return min(GUESSES, left + (self._clock() - then) * PER_SECOND)

    def _group(self, address: str) -> str:
        """An address as one owner has it: of IPv6, the first half."""
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return address
        return address if found.version == 4 else str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))


class Guard:
    """The outermost layer of the server: applies rules, and bounds what is read of a body."""

    def __init__(self, app: ASGIApp, rules: Rules):
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        origin = request.headers.get("origin")
        added = dict(SAFE_HEADERS)
        if origin is not None and origin in self.rules.origins:
            added |= cross_origin(origin, request.headers)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                more = [(name.lower().encode(), value.encode()) for name, value in added.items()]
                message["headers"] = [*message["headers"], *(row for row in more if row[0] not in present)]
            await send(message)

        try:
            self.rules.check(request)
            check_length(request.headers)
        except HTTPException as error:
            headers = {**(error.headers or {}), "Connection": "close"}
            response = error_response(request, error.status_code, error.detail, headers)
            await response(scope, receive, send_safely)
            return
        if request.method == "OPTIONS" and "access-control-request-method" in request.headers:  # may it ask?
            await Response(status_code=204)(scope, receive, send_safely)
            return
        await self.app(scope, bounded(receive), send_safely)


def cross_origin(origin: str, headers: Headers) -> dict[str, str]:
    """What tells a browser that a page of this origin may read the answer."""
    asked = headers.get("access-control-request-headers", "Authorization, Content-Type")
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        "Access-Control-Allow-Headers": asked,
        "Access-Control-Allow-Private-Network": "true",
        "Access-Control-Max-Age": "600",
        "Cross-Origin-Resource-Policy": "cross-origin",
        "Vary": "Origin",
    }


def check_length(headers: Headers) -> None:
    """Raise HTTPException for a body that is said to be too long, or is packed."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > MOST_BODY:
        raise too_long()
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "the body is compressed; send it as it is.")


def too_long() -> HTTPException:
    return HTTPException(413, f"the body is too long: at most {MOST_BODY >> 20} MB are read.", {"Connection": "close"})


def bounded(receive: Receive) -> Receive:
    """The same messages, as long as the body does not get too long, and comes in time."""
    read, end, complete = 0, time.monotonic() + BODY_SECONDS, False

    async def receive_bounded() -> Message:
        nonlocal read, complete
        if complete:  # what comes is the end of the connection
            return await receive()
        try:
            with anyio.fail_after(min(PAUSE_SECONDS, max(0, end - time.monotonic()))):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, "the body did not come in time.", {"Connection": "close"}) from None
        if message["type"] == "http.request":
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > MOST_BODY:
                raise too_long()
        return message

    return receive_bounded


def allowed(values: Iterable[str]) -> frozenset[str]:
    """Hosts or origins as they are compared: in small letters, without a slash at the end."""
    return frozenset(value.strip().lower().rstrip("/") for value in values)
