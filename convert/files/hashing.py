"""The sha256 of large files, remembered between runs."""

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from convert.files.own_files import make_private, open_own
from sd.files import cache_folder, written_whole

CHUNK = 4 << 20
LEAST_URGENT = 19  # as setpriority(2) counts
OLD_HASH_START, OLD_HASH_BYTES = 0x100000, 0x10000
KEPT = 1000  # files whose hash is remembered
SHA256 = re.compile("[0-9a-f]{64}")


def file_sha256(path: Path, *, read: bool = False, start: int = 0) -> str:
    """The sha256 of a file, as 64 hex digits; of what follows its first `start` bytes.

    Computed once: a file with the same path, size, times of change and inode is not read again, unless `read` is set.
    """
    *_, digest = _hashing(Path(path).resolve(), read, start)
    return digest


def _hashing(path: Path, read: bool = False, start: int = 0) -> Iterator[str | None]:
    """The work of `file_sha256` in pieces: yields None after each, and the hash at the end."""
    state = path.stat()
    key = _key(path, state, start)
    if not read and (known := remembered().get(key)):
        yield known
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            yield None
    if _key(path, path.stat(), start) == key:
        _remember({**remembered(), key: digest.hexdigest()})
    yield digest.hexdigest()


def remembered_sha256(path: Path, known: Mapping[str, str] | None = None) -> str | None:
    """The cached sha256 of a file; None if the file would have to be read.

    known  what `remembered` gave, for whoever asks for many files
    """
    path = Path(path).resolve()
    return (remembered() if known is None else known).get(_key(path, path.stat()))


def old_hash(path: Path) -> str | None:
    """The "model hash" of 8 hex digits that tools showed before they took the whole file's sha256.

    It is over 64 KiB behind the first MiB; None for a file that ends before, since all such files had the same one.

    AUTOMATIC1111/stable-diffusion-webui, modules/sd_models.py, model_hash.
    """
    with open(path, "rb") as file:
        file.seek(OLD_HASH_START)
        data = file.read(OLD_HASH_BYTES)
    return hashlib.sha256(data).hexdigest()[:8] if data else None


class FileHash:
    """The sha256 of a file as it is now, computed at the first call; other calling threads wait for it.

    None if the file can no longer be read or has changed.
    """

    def __init__(self, path: Path):
        self.path = Path(path).resolve()  # now: the working folder may change before the call
        self.digest: str | None = None
        self._lock = threading.Lock()
        self._called = threading.Event()
        self._before = self._state()
        self._work: Iterator[str | None] | None = None

    def __getstate__(self) -> dict:
        """Copies and pickles go on from the same state of the file, with a lock of their own."""
        return {"path": self.path, "digest": self.digest, "_before": self._before}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])
        vars(self).update(state)

    def __call__(self) -> str | None:
        self._called.set()
        with self._lock:
            while self._goes_on():
                pass
            return self.digest

    def work_ahead(self) -> None:
        """Compute the hash until it is complete or a caller takes over."""
        goes_on = True
        while goes_on and not self._called.is_set():
            with self._lock:
                goes_on = self._goes_on()

    def _goes_on(self) -> bool:
        """Do one piece of the work; False if none is left."""
        if self.digest is not None:
            return False
        work, self._work = self._work or _hashing(self.path), None
        try:
            digest = next(work)
        except OSError:
            return False
        if digest is None:
            self._work = work
        elif self._state() == self._before:
            self.digest = digest
        return digest is None

    def _state(self) -> str | None:
        try:
            return _key(self.path, self.path.stat())
        except OSError:
            return None


def hashed_meanwhile(path: Path) -> Callable[[], str]:
    """Start computing the sha256 of a file in a thread; the returned function waits for it.

    It raises OSError if the file can no longer be read.
    """
    digest = FileHash(path)
    # a daemon: if the conversion fails, nothing waits for the hash
    threading.Thread(target=digest, daemon=True).start()
    return lambda: digest() or file_sha256(path)


def compute_aside(digest: FileHash) -> None:
    """Compute a hash in a thread of the lowest priority (on Linux).

    A caller that needs the hash finishes the work itself and does not wait for that thread.
    """

    def compute() -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            with suppress(OSError):  # where a sandbox does not let it have one
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_URGENT)
        digest.work_ahead()

    threading.Thread(target=compute, daemon=True).start()


def _key(path: Path, state: os.stat_result, start: int = 0) -> str:
    changes = [str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    return json.dumps(changes + [start] * bool(start))


def _cache_file() -> Path:
    """Raises RuntimeError if the user has no home folder."""
    return cache_folder() / "sha256.json"


def remembered() -> dict[str, str]:
    """All cached hashes, by file and state."""
    try:
        with open(open_own(_cache_file()), encoding="utf-8") as file:
            known = json.load(file)
    except (OSError, ValueError, RuntimeError):
        return {}  # none yet, or damaged: hashes are computed again
    if not isinstance(known, dict):
        return {}
    return {key: digest for key, digest in known.items() if isinstance(digest, str) and SHA256.fullmatch(digest)}


def _remember(hashes: dict[str, str]) -> None:
    newest = dict(list(hashes.items())[-KEPT:])
    try:
        cache = _cache_file()
        make_private(cache.parent)
        with written_whole(cache, force=True) as file:
            file.write(json.dumps(newest, indent=1).encode())
    except (OSError, RuntimeError):
        return  # no home, or a read-only one: the hash is computed again next time
