"""Download one large file over HTTP: resumes where it stopped, and gets its name only after a check.

The bytes so far are in NAME.partial; NAME.partial.json says which version of which address they are from.
Resuming asks for the rest of exactly that version (RFC 9110, sections 13.1.5 and 14: If-Range, Range).
"""

import http.client
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from convert.errors import shown, size_text
from convert.published.connection import DownloadError, SlowError, opened
from convert.published.partial_file import CHUNK, PartialFile

TIMEOUT = 30  # seconds without a byte
RETRIES = 5  # in a row, without a byte more
LONGEST_WAIT = 60  # seconds
MARGIN = 64 << 20  # bytes that stay free on the disk
RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
RETRIED = {408, 425, 429, 500, 502, 503, 504}


class _Interrupted(Exception):
    """The connection or the server failed for now; trying again may help."""

    def __init__(self, reason: object, wait: float | None = None):
        super().__init__(str(reason) or type(reason).__name__)
        self.wait = wait  # seconds that the server asks for


class _UnreachableError(_Interrupted):
    """Nobody answers there, so there may be no network at all."""


@dataclass(frozen=True, kw_only=True)
class Downloaded:
    path: Path
    bytes: int
    sha256: str
    resumed_from: int  # bytes that were there from an earlier run


def download(
    address: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    token: str | None = None,
    force: bool = False,
    on_start: Callable[[int | None, int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    on_wait: Callable[[str, float], None] | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> Downloaded:
    """Fetch a file, whole and checked, or leave its beginning as NAME.partial, to resume later.

    size, sha256  what the file must have, where known
    token         sent to the address's own host, never to where it redirects
    force         replace the target if it exists
    on_start      called with the number of bytes of the file, if announced, and those that are there already
    on_bytes      called with the number of bytes that just arrived; a negative number where they had to be dropped
    on_wait       called before another attempt with what went wrong and the seconds until then

    Raises DownloadError; OSError for the disk; FileExistsError.
    """
    if not _is_address(address):
        raise DownloadError(f"{shown(address)} is not an http or https address.")
    if (target.exists() or target.is_symlink()) and not force:
        raise FileExistsError(f"{target} exists already. Give another folder, or --force to replace it.")
    with PartialFile(target, address) as partial:
        resumed_from = partial.size
        source = _Source(address, token, size)
        _fetch_all(source, partial, _Watch(on_start or _ignore, on_bytes or _ignore, on_wait or _ignore, wait))
        _check(partial, size, sha256)
        partial.becomes(target)
        return Downloaded(path=target, bytes=partial.size, sha256=partial.digest.hexdigest(), resumed_from=resumed_from)


@dataclass(frozen=True)
class _Source:
    address: str
    token: str | None
    size: int | None

    @property
    def host(self) -> str:
        return urlsplit(self.address).hostname or ""

    @property
    def through(self) -> str:
        """The host, and the proxy that the environment names for it."""
        proxy = urllib.request.getproxies().get(urlsplit(self.address).scheme)
        if not proxy or urllib.request.proxy_bypass(self.host):
            return self.host
        return f"{self.host}, through the proxy {shown(proxy.rpartition('@')[2])},"


@dataclass
class _Watch:
    """Callbacks, how to wait between attempts, and whether there was an answer yet."""

    on_start: Callable[[int | None, int], object]
    on_bytes: Callable[[int], object]
    on_wait: Callable[[str, float], object]
    wait: Callable[[float], object]
    reached: bool = False


def _ignore(*_: object) -> None:
    """The callback of a caller that gave none."""


def _fetch_all(source: _Source, partial: PartialFile, watch: _Watch) -> None:
    """Ask until everything is there, as long as each time brings something or the failures are few."""
    failures, furthest = 0, partial.size
    while True:
        try:
            _fetch(source, partial, watch)
            return
        except _Interrupted as error:
            if isinstance(error, _UnreachableError) and not watch.reached:
                raise DownloadError(
                    f"{source.through} cannot be reached: {shown(str(error))}. Is there a network?"
                ) from None
            failures = 1 if partial.size > furthest else failures + 1
            furthest = max(furthest, partial.size)
            if failures > RETRIES:
                raise DownloadError(
                    f"the download of {source.address} failed {failures} times in a row: {shown(str(error))}. "
                    f"{size_text(partial.size)} is kept; run the same command again to resume."
                ) from None
            seconds = min(LONGEST_WAIT, 2.0**failures if error.wait is None else error.wait)
            watch.on_wait(shown(str(error)), seconds)
            watch.wait(seconds)


def _fetch(source: _Source, partial: PartialFile, watch: _Watch) -> None:
    """One request, from where we are to the end of the file. Raises _Interrupted where it breaks off."""
    if source.size is not None and partial.size == source.size:
        return
    if partial.validator is None and partial.size:  # what we have may be of another version than what would come
        watch.on_bytes(-partial.size)
        partial.restart()
    try:
        with _open(source, partial) as response:
            watch.reached = True
            total = _accept(source, partial, response, watch)
            watch.on_start(total, partial.size)
            limit = total if total is not None else partial.size + _free(partial.path) - MARGIN
            if total is not None and _free(partial.path) < total - partial.size + MARGIN:
                raise DownloadError(
                    f"{partial.path.absolute().parent} has {size_text(_free(partial.path))} free; "
                    f"{size_text(total - partial.size)} more is needed. Give another folder with -o."
                )
            end = None if response.length is None else partial.size + response.length
            while chunk := _read(response, CHUNK if end is None else min(CHUNK, end - partial.size)):
                if partial.size + len(chunk) > limit:
                    raise DownloadError(f"{source.host} sends more than the {size_text(limit)} that fit on the disk.")
                partial.write(chunk)
                watch.on_bytes(len(chunk))
    except urllib.error.HTTPError as error:
        watch.reached = True
        _refuse(source, partial, error)
        return
    except (SlowError, urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _failure(source, error, partial.size) from None
    if total is not None and partial.size < total:
        raise _Interrupted(f"the connection ended after {partial.size} of {total} bytes")


def _failure(source: _Source, error: Exception, there: int) -> Exception:
    """What to raise for an error of the network, where so many bytes are kept."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, SlowError):
        kept = f" {size_text(there)} is kept; run the same command again to resume." if there else ""
        return DownloadError(f"{source.host} {reason}.{kept} --from ADDRESS downloads it from elsewhere.")
    if isinstance(reason, ssl.SSLCertVerificationError):
        return DownloadError(f"{source.host} has an invalid certificate: {shown(str(reason))}.")
    if isinstance(error, urllib.error.URLError) and isinstance(reason, OSError):
        return _UnreachableError(reason.strerror or reason)
    if isinstance(error, http.client.HTTPException) and not isinstance(error, ConnectionError):
        return DownloadError(f"{source.host} sends an answer that is not valid HTTP: {shown(str(error)) or 'empty'}.")
    return _Interrupted(reason)


def _read(response: http.client.HTTPResponse, most: int) -> bytes:
    """Some bytes, or none at the end. Errors here come from the network, not from the disk."""
    try:
        return response.read1(most)
    except SlowError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(error) from None


def _open(source: _Source, partial: PartialFile) -> http.client.HTTPResponse:
    request = urllib.request.Request(
        source.address, headers={"User-Agent": "sd-zoo", "Accept-Encoding": "identity", "Accept": "*/*"}
    )
    if partial.size:
        request.add_header("Range", f"bytes={partial.size}-")
        request.add_header("If-Range", partial.validator)
    if source.token:
        request.add_unredirected_header("Authorization", f"Bearer {source.token}")
    return opened(request, TIMEOUT)


def _accept(source: _Source, partial: PartialFile, response: http.client.HTTPResponse, watch: _Watch) -> int | None:
    """Check the headers of a response. Returns the size of the whole file, if stated."""
    headers = response.headers
    if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise DownloadError(
            f"{source.host} sends a web page instead of {partial.path.stem}. Open {source.address} in a browser: it "
            "may ask for a login or to accept a licence. With an access token, set HF_TOKEN to it."
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(f"{source.host} sends the file compressed, which was not requested.")
    etag = headers.get("ETag", "")
    validator = etag if etag.startswith('"') else headers.get("Last-Modified")  # a weak ETag says nothing about bytes
    if response.status == 206:
        span = RANGE.fullmatch(headers.get("Content-Range", ""))
        if not span or not _fits(partial.size, *span.groups()):
            raise DownloadError(f"{source.host} sends another part of the file than requested. Try again later.")
        total = None if span[3] == "*" else int(span[3])
    else:  # everything from the start: it is another version now, or the server knows no ranges
        if partial.size:
            watch.on_bytes(-partial.size)
        partial.restart()
        length = headers.get("Content-Length", "")
        total = int(length) if re.fullmatch(r"\d{1,18}", length) else None
    if source.size is not None and total is not None and total != source.size:
        raise DownloadError(
            f"{source.host} announces {total} bytes; {partial.path.stem} has {source.size}. It is another file."
        )
    partial.note(validator)
    return total if total is not None else source.size


def _fits(there: int, first: str, last: str, total: str) -> bool:
    """Whether the numbers of a Content-Range go on where we are."""
    return there == int(first) <= int(last) and (total == "*" or int(last) < int(total))


def _refuse(source: _Source, partial: PartialFile, error: urllib.error.HTTPError) -> None:
    """Raise the error of a response of 400 or above; return if the file is already complete."""
    error.close()
    if 300 <= error.code < 400:  # urllib follows ten
        raise DownloadError(f"{source.address} is redirected without end (HTTP {error.code}).")
    if error.code == 416 and partial.size:  # there is nothing behind what we have
        if error.headers.get("Content-Range", "") == f"bytes */{partial.size}":
            return
        partial.restart()
        raise _Interrupted("the file became shorter")
    if error.code in RETRIED:
        asked = error.headers.get("Retry-After", "")
        raise _Interrupted(f"HTTP {error.code}", float(asked) if re.fullmatch(r"\d{1,4}", asked) else None)
    if error.code in (401, 403):
        token = "and rejects the token" if source.token else "without a login"
        raise DownloadError(
            f"{source.host} refuses {source.address} {token} (HTTP {error.code}). Accept the licence on its page, "
            "make an access token, and set HF_TOKEN to it."
        )
    if error.code in (404, 410):
        raise DownloadError(
            f"{source.address} does not exist (HTTP {error.code}): it was moved or removed. A copy elsewhere can be "
            "downloaded with --from ADDRESS; its sha256 is checked."
        )
    raise DownloadError(f"{source.host} answers {source.address} with HTTP {error.code} {shown(str(error.reason))}.")


def _check(partial: PartialFile, size: int | None, sha256: str | None) -> None:
    """Remove and refuse a complete download that is the wrong file."""
    problem = None
    if not partial.size:
        problem = "is empty"
    elif size is not None and partial.size != size:
        problem = f"has {partial.size} bytes instead of {size}"
    elif sha256 is not None and partial.digest.hexdigest() != sha256:
        problem = f"has the sha256 {partial.digest.hexdigest()} instead of {sha256}"
    if problem:
        partial.remove()
        raise DownloadError(
            f"the download of {partial.path.stem} {problem}. It was removed: it is another file, or was "
            "altered on the way."
        )


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of brackets and ports
        return False


def _free(path: Path) -> int:
    return shutil.disk_usage(path.absolute().parent).free
