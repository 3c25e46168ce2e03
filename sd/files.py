"""Files that are either complete or absent, and where the project's own are.

An unfinished file lies next to its destination as `.NAME.0123abcd.tmp`, locked by its writer. A killed writer leaves
the file behind unlocked, so `remove_leftovers` can tell the two apart.
"""

import errno
import os
import re
import secrets
import shutil
import stat
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
NAME_BYTES = 255  # what file systems allow
LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(?:tmp|old)", re.DOTALL)
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # only writing fails so


def cache_folder() -> Path:
    """The folder for what can be rebuilt, kept between runs. Raises RuntimeError if the home folder is unknown."""
    return user_folder("XDG_CACHE_HOME", ".cache")


def user_folder(variable: str, default: str) -> Path:
    """Our folder in one of the user's; a relative path in the variable is ignored, as the XDG specification says.

    variable  of the environment, which names the user's folder
    default   what the user's folder is in the home folder otherwise

    Raises RuntimeError if the home folder is unknown.
    """
    given = Path(os.environ.get(variable, ""))
    folder = given if given.is_absolute() else Path.home() / default
    if not folder.is_absolute():
        raise RuntimeError(f"the home folder {folder} is a relative path.")
    return folder / "sd-zoo"


def embedded_model() -> Path:
    """The model used where no other is asked for: in the installed package, or in the checkout beside it."""
    package = Path(__file__).parent
    installed = package / "weights" / EMBEDDED
    return installed if installed.exists() else package.parent / "weights" / EMBEDDED


def name_problem(path: Path, *, force: bool = False, why: str = "", other: str = "another name") -> str | None:
    """Why a file cannot get this name, as the end of a sentence that begins with the name; None if it can.

    force  whether a file, or a link, of that name may be replaced
    why    what to add to "exists already"
    other  what to ask for
    """
    if problem := length_problem(path):
        return problem
    try:
        kind = os.lstat(path).st_mode
        if stat.S_ISLNK(kind) and not path.exists():
            replaced = f"exists already, as a link to nothing. Give {other}, or --force to replace the link."
            return None if force else replaced
        kind = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"cannot be written: {error.strerror}. Give {other}."
    if not stat.S_ISREG(kind):
        return f"is {'a folder' if stat.S_ISDIR(kind) else 'a device or a pipe'}. Give {other}."
    return None if force else f"exists already{why}. Give {other}, or --force to replace it."


def length_problem(path: Path) -> str | None:
    """Why a name is too long, as the end of a sentence; None if it is not."""
    length = len(os.fsencode(path.name))
    return (
        f"has a name of {length} bytes; {NAME_BYTES} are possible. Give a shorter one." if length > NAME_BYTES else None
    )


@contextmanager
def written_whole(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Open a file that gets its name only once it is complete and on disk; an error leaves no file.

    Raises FileExistsError if the name is taken, unless forced; OSError with the file's name if there is no room.
    """
    path = Path(path)
    if problem := name_problem(path, force=force):
        raise FileExistsError(f"{path} {problem}")
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
    except OSError as error:
        if error.filename == str(temporary) or (error.filename is None and error.errno in NO_ROOM):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
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
        if os.path.lexists(path):
            raise taken from None
        os.rename(temporary, path)


@contextmanager
def folder_written_whole(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Make a folder that gets its name only when the block ends; an error leaves no folder.

    Raises FileExistsError if the name is taken, unless forced; then the old folder is replaced as a whole.
    """
    path = Path(path)
    if os.path.lexists(path) and not force:
        raise FileExistsError(f"{path} exists already. Give another name, or --force to replace it.")
    temporary, before = path.with_name(_start(path) + f"{secrets.token_hex(4)}.tmp"), None
    temporary.mkdir()
    try:
        with _locked(temporary):
            yield temporary
            with _locked(path):  # while it has another name, so that nobody takes it for a leftover
                if force and os.path.lexists(path):
                    before = _aside(path, os.lstat(path).st_ino)
                    os.rename(path, before)
                try:
                    os.rename(temporary, path)
                except OSError:
                    if before is None and os.path.lexists(path):
                        taken = f"{path} was just written by another process. Give another name."
                        raise FileExistsError(taken) from None
                    raise
    except OSError as error:
        if str(error.filename or "").startswith(str(temporary)):
            error.filename = str(error.filename).replace(str(temporary), str(path), 1)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if before is not None:
            _restore_or_remove(before, path)


def _aside(path: Path, inode: int) -> Path:
    """Where a folder is while it is replaced. The inode in the name tells it from what others put there."""
    return path.with_name(_start(path) + f"{inode & 0xFFFFFFFF:08x}.old")


def _restore_or_remove(before: Path, path: Path) -> None:
    if not os.path.lexists(path):
        os.rename(before, path)
    elif before.is_dir() and not before.is_symlink():
        shutil.rmtree(before, ignore_errors=True)
    else:
        before.unlink(missing_ok=True)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove what killed writers of these paths left behind; files still being written stay.

    A folder that was moved aside for a replacement that never came gets its name back.
    """
    if fcntl is None:
        return
    by_folder: dict[Path, dict[str, Path]] = {}
    for path in map(Path, paths):
        by_folder.setdefault(path.parent, {})[_short_name(path)] = path
    for folder, names in by_folder.items():
        for entry in list(folder.iterdir()):
            match = LEFTOVER.fullmatch(entry.name)
            if match and match[1] in names:
                _remove_leftover(entry, names[match[1]])


def _remove_leftover(entry: Path, path: Path) -> None:
    with _locked(entry) as is_free:
        if not is_free:  # still being written, or neither a file nor a folder, and so not ours
            return
        if entry.suffix == ".old":
            if entry == _aside(path, entry.stat().st_ino):
                _restore_or_remove(entry, path)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _short_name(path: Path) -> str:
    """As much of a name as the name of its temporary file has room for."""
    short = path.name[:LONGEST]
    while len(os.fsencode(short)) > NAME_BYTES - len("..01234567.tmp"):
        short = short[:-1]
    return short


def _start(path: Path) -> str:
    return f".{_short_name(path)}."


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
    """Hold the lock of a file or folder; yields False if another process holds it or locks do not exist.

    Links are not followed, and pipes and devices not opened.
    """
    try:
        kind = os.lstat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise OSError(errno.EINVAL, "neither a file nor a folder")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # or removed meanwhile, or a folder on Windows
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
