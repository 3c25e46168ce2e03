"""Where shards go: a folder, or a URL that fsspec knows. A file gets its name once it is complete."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from sd.app.errors import UsageError
from sd.files import remove_leftovers, written_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.I)


class Store(Protocol):
    """What a place for shards offers. Names are those of files in it."""

    def make(self) -> None: ...
    def shown(self, name: str) -> str: ...
    def names(self) -> set[str]: ...
    def size(self, name: str) -> int | None: ...
    def read(self, name: str) -> bytes | None: ...
    def open(self, name: str) -> BinaryIO: ...
    def writing(self, name: str, *, new: bool = False): ...
    def held(self, name: str): ...


def store_at(out: str) -> "Folder | Remote":
    """The place that --out names. Raises UsageError for a URL that cannot be used."""
    url = URL.match(out)
    if url and url[1].lower() == "file":
        return Folder(Path(out[url.end() :] or "/"))
    return Remote(out) if url else Folder(Path(out))


class Folder:
    """A folder of this machine, or one that several share."""

    def __init__(self, path: Path):
        self.path = path

    def make(self) -> None:
        from sd.app.jobs.outputs import try_folder

        try_folder(self.path)

    def shown(self, name: str) -> str:
        return str(self.path / name)

    def names(self) -> set[str]:
        try:
            return {entry.name for entry in os.scandir(self.path)}
        except FileNotFoundError:
            return set()

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")

    @contextmanager
    def writing(self, name: str, *, new: bool = False) -> Iterator[BinaryIO]:
        """A file that gets its name at the end; raises FileExistsError if it must be new and is not."""
        path = self.path / name
        remove_leftovers([path])
        with written_whole(path, force=not new) as file:
            yield file

    @contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """Hold a name, and yield whether nobody else does. Ends with the process, however that ends.

        On a file system without locks, everybody holds it: then the same work may be done twice, with the same result.
        """
        path = self.path / f".{name}.lock"
        while True:
            file = open(path, "ab")  # noqa: SIM115 - closed below
            try:
                if fcntl is not None:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    file.close()
                    yield False
                    return
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    break
            file.close()  # its holder removed it before the lock was ours
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            file.close()


class Remote:
    """A place that fsspec reaches, such as s3://bucket/folder. Stats come last: without them, there is no shard."""

    def __init__(self, url: str):
        try:
            import fsspec
        except ImportError:
            raise UsageError(f"--out {url}: URLs need the package fsspec: pip install fsspec.") from None
        try:
            self.system, self.root = fsspec.core.url_to_fs(url.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise UsageError(f"--out {url} cannot be used: {error}") from None
        self.url = url.rstrip("/")

    def make(self) -> None:
        try:
            self.system.makedirs(self.root, exist_ok=True)
        except OSError as error:
            raise UsageError(f"nothing can be written to {self.url}: {error}. Give another --out.") from None

    def shown(self, name: str) -> str:
        return f"{self.url}/{name}"

    def names(self) -> set[str]:
        self.system.invalidate_cache()
        if not self.system.exists(self.root):
            return set()
        return {path.rstrip("/").rpartition("/")[2] for path in self.system.ls(self.root, detail=False)}

    def size(self, name: str) -> int | None:
        try:
            return self.system.info(f"{self.root}/{name}")["size"]
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        try:
            return self.system.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return None

    def open(self, name: str) -> BinaryIO:
        return self.system.open(f"{self.root}/{name}", "rb")

    @contextmanager
    def writing(self, name: str, *, new: bool = False) -> Iterator[BinaryIO]:
        """The same: written to a temporary file here, and uploaded once it is complete."""
        if new and self.system.exists(f"{self.root}/{name}"):
            raise FileExistsError(self.shown(name))
        with tempfile.NamedTemporaryFile(prefix="sd-shard-") as file:
            yield file
            file.flush()
            self.system.put_file(file.name, f"{self.root}/{name}")
            self.system.invalidate_cache()

    @contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """There are no locks: the same work may be done twice, with the same result."""
        yield True
