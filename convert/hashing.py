"""The sha256 of large files, remembered between runs."""

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from sd.files import cache_folder, written_whole

CHUNK = 16 << 20
LEAST_URGENT = 19  # as setpriority(2) counts
KEPT = 1000  # files whose hash is remembered
SHA256 = re.compile("[0-9a-f]{64}")


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as 64 hex digits.

    It is computed once: a file that has the same place, size, modification time and inode as before is not read again.
    """
    path = Path(path).resolve()
    state = path.stat()
    key = _key(path, state)
    remembered = _remembered()
    if key in remembered:
        return remembered[key]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) == (state.st_size, state.st_mtime_ns):
        _remember({**remembered, key: digest.hexdigest()})
    return digest.hexdigest()


def remembered_sha256(path: Path) -> str | None:
    """The sha256 of a file where it was computed before; None where the file would have to be read for it."""
    path = Path(path).resolve()
    return _remembered().get(_key(path, path.stat()))


class FileHash:
    """The sha256 of a file, computed at the first call; other threads that call meanwhile wait for it.

    None where the file cannot be read any more.
    """

    def __init__(self, path: Path):
        self.path = Path(path).resolve()  # now: the working folder may change before the call
        self.lock = threading.Lock()
        self.digest: str | None = None

    def __call__(self) -> str | None:
        with self.lock:
            if self.digest is None:
                try:
                    self.digest = file_sha256(self.path)
                except OSError:
                    return None
            return self.digest


def hashed_meanwhile(path: Path) -> Callable[[], str]:
    """Begin to compute the sha256 of a file in a thread of its own; the function returned waits for it.

    It raises OSError where the file cannot be read any more.
    """
    digest = FileHash(path)
    # a daemon: nobody waits for it where the work that wanted the hash has failed
    threading.Thread(target=digest, daemon=True).start()
    return lambda: digest() or file_sha256(path)


def compute_aside(digest: Callable[[], object]) -> None:
    """Have it computed in a thread that leaves the processor to all others, where the system can be told: Linux."""

    def compute() -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_URGENT)
        digest()

    threading.Thread(target=compute, daemon=True).start()


def _key(path: Path, state: os.stat_result) -> str:
    return json.dumps([str(path), state.st_size, state.st_mtime_ns, state.st_ino])


def _cache_file() -> Path:
    """Raises RuntimeError where nobody knows the user's home."""
    return cache_folder() / "sha256.json"


def _remembered() -> dict[str, str]:
    try:
        known = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}  # none yet, or damaged: hashes are computed again
    if not isinstance(known, dict):
        return {}
    return {key: digest for key, digest in known.items() if isinstance(digest, str) and SHA256.fullmatch(digest)}


def _remember(hashes: dict[str, str]) -> None:
    newest = dict(list(hashes.items())[-KEPT:])
    try:
        cache = _cache_file()
        cache.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(cache, force=True) as file:
            file.write(json.dumps(newest, indent=1).encode())
    except (OSError, RuntimeError):
        return  # no home, or a read-only one: the hash is computed again next time
