"""The sha256 of large files, remembered between runs."""

import hashlib
import json
import os
import tempfile
import threading
from pathlib import Path

CHUNK = 16 << 20
KEPT = 1000  # files whose hash is remembered


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as 64 hex digits.

    It is computed once: a file that has the same place, size, modification time and inode as before is not read again.
    """
    path = Path(path).resolve()
    state = path.stat()
    key = json.dumps([str(path), state.st_size, state.st_mtime_ns, state.st_ino])
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


class FileHash:
    """The sha256 of a file, computed at the first call; other threads that call meanwhile wait for it."""

    def __init__(self, path: Path):
        self.path = path
        self.lock = threading.Lock()
        self.digest: str | None = None

    def __call__(self) -> str:
        with self.lock:
            if self.digest is None:
                self.digest = file_sha256(self.path)
            return self.digest


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd-zoo" / "sha256.json"


def _remembered() -> dict[str, str]:
    try:
        known = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # none yet, or damaged: hashes are computed again
    return known if isinstance(known, dict) else {}


def _remember(hashes: dict[str, str]) -> None:
    cache = _cache_file()
    newest = dict(list(hashes.items())[-KEPT:])
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False, encoding="utf-8") as file:
            json.dump(newest, file, indent=1)
        os.replace(file.name, cache)
    except OSError:
        return  # a read-only home: the hash is computed again next time
