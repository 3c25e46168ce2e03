"""Files that are either complete or absent, and where the project's own are.

An unfinished file lies next to its destination as `.NAME.0123abcd.tmp`, locked by its writer. A killed writer leaves
the file behind unlocked, so `remove_leftovers` can tell the two apart.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: no locks, and leftovers stay
    fcntl = None

EMBEDDED = "sd-shapes.ckpt"  # the small model that comes with the package, trained on drawn shapes
LONGEST = 100  # characters of the name kept in the name of its temporary file
LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(?:tmp|old)", re.DOTALL)


def cache_folder() -> Path:
    """The folder for what can be rebuilt, kept between runs. Raises RuntimeError if the home folder is unknown."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd-zoo"


def embedded_model() -> Path:
    """The model used where no other is asked for: in the installed package, or in the checkout beside it."""
    package = Path(__file__).parent
    installed = package / "weights" / EMBEDDED
    return installed if installed.exists() else package.parent / "weights" / EMBEDDED


@contextmanager
def written_whole(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Open a file that gets its name only once it is complete and on disk; an error leaves no file.

    Raises FileExistsError if the name is taken, unless forced.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already. Give another name, or --force to replace it.")
    temporary = path.with_name(_start(path) + f"{secrets.token_hex(4)}.tmp")
    try:
        with _new_file(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if force:
            os.replace(temporary, path)
        else:
            _name_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _name_new(temporary: Path, path: Path) -> None:
    """Rename a file, but never onto a file that another process has written meanwhile."""
    taken = FileExistsError(f"{path} was just written by another process. Give another name.")
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise taken from None
    except OSError:  # a file system without hard links: here another process may still win between check and rename
        if path.exists():
            raise taken from None
        os.rename(temporary, path)


@contextmanager
def folder_written_whole(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Make a folder that gets its name only when the block ends; an error leaves no folder.

    Raises FileExistsError if the name is taken, unless forced; then the old folder is replaced as a whole.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already. Give another name, or --force to replace it.")
    mark = secrets.token_hex(4)
    temporary, before = (path.with_name(_start(path) + f"{mark}.{end}") for end in ("tmp", "old"))
    temporary.mkdir()
    try:
        with _locked(temporary):
            yield temporary
            if force and path.exists():
                os.rename(path, before)
            try:
                os.rename(temporary, path)
            except OSError:
                if before.exists():
                    os.rename(before, path)
                elif path.exists():
                    taken = f"{path} was just written by another process. Give another name."
                    raise FileExistsError(taken) from None
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove what killed writers of these paths left behind; files still being written stay.

    A folder that was moved aside for a replacement that never came gets its name back.
    """
    if fcntl is None:
        return
    by_folder: dict[Path, dict[str, Path]] = {}
    for path in map(Path, paths):
        by_folder.setdefault(path.parent, {})[path.name[:LONGEST]] = path
    for folder, names in by_folder.items():
        for entry in list(folder.iterdir()):
            match = LEFTOVER.fullmatch(entry.name)
            if match and match[1] in names:
                _remove_leftover(entry, names[match[1]])


def _remove_leftover(entry: Path, path: Path) -> None:
    writing = entry.with_suffix(".tmp")
    with _locked(writing if writing.exists() else entry) as is_free:
        if not is_free:
            return
        if entry.suffix == ".old" and not path.exists():
            os.rename(entry, path)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _start(path: Path) -> str:
    return f".{path.name[:LONGEST]}."


def _new_file(path: Path) -> BinaryIO:
    """A new file, locked while it is open."""
    while True:
        file = open(path, "xb")  # noqa: SIM115 - the caller closes it
        _lock(file.fileno(), wait=True)
        if fcntl is None or os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # before the lock was taken, another process removed the file as a leftover


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file or folder; yields False if another process holds it or locks do not exist."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # removed meanwhile, or a folder on Windows
        yield False
        return
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file and say whether that worked; the lock ends with the process, however that ends."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another process, or a file system without locks
        return False
    return True
