"""A partly downloaded file: kept between runs, with a note of its version."""

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

from convert.files.own_files import UntrustedError, open_own
from sd.files import written_whole

try:
    import fcntl
except ImportError:  # Windows: two downloads of one file at a time end with a wrong hash there
    fcntl = None

CHUNK = 1 << 20
ADDING = os.O_RDWR | os.O_APPEND
LONGEST_NOTES = 100_000  # characters


class BusyError(OSError):
    """Another process is writing the file."""


class PartialFile:
    """The bytes so far, their hash, and the version of the file they belong to."""

    def __init__(self, target: Path, address: str):
        self.path = target.with_name(f"{target.name}.partial")
        self.notes = target.with_name(f"{target.name}.partial.json")
        self.address = address
        self.file: BinaryIO = open(self._opened(), "a+b")  # noqa: SIM115 - closed by __exit__
        try:
            self._lock()
            self.validator = self._noted()
            self.size = 0
            self.digest = hashlib.sha256()
            if self.validator is None:
                self.restart()
            else:
                self.file.seek(0)
                while chunk := self.file.read(CHUNK):
                    self.digest.update(chunk)
                    self.size += len(chunk)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.path.exists() and not self.path.stat().st_size:
            self.remove()

    def write(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.digest.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self.file.truncate(0)
        self.size = 0
        self.digest = hashlib.sha256()
        self.validator = None
        self.notes.unlink(missing_ok=True)

    def note(self, validator: str | None) -> None:
        """Remember the version of the next bytes, which another run needs to resume."""
        if validator and validator != self.validator:
            with written_whole(self.notes, force=True) as file:
                file.write(json.dumps({"address": self.address, "validator": validator}).encode())
        self.validator = validator

    def becomes(self, target: Path) -> None:
        """Give the complete file its name."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.path, target)
        self.notes.unlink(missing_ok=True)

    def remove(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)

    def _opened(self) -> int:
        """The descriptor of the file, new or ours from before: never what a link leads to. Raises UntrustedError."""
        try:
            return os.open(self.path, ADDING | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except FileExistsError:
            try:
                return open_own(self.path, ADDING)
            except UntrustedError as error:
                raise UntrustedError(f"{error} Remove it, or give another folder with -o.") from None

    def _noted(self) -> str | None:
        try:
            with open(open_own(self.notes), encoding="utf-8") as file:
                notes = json.loads(file.read(LONGEST_NOTES))
            return notes["validator"] if notes["address"] == self.address else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # missing or damaged: the download starts again

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"{self.path} is being written by another download. Wait for it.") from None
