"""Files that only this user can change: what is loaded from a cache, and downloads that are not complete.

Where others can write, a name may stand for something else by the time it is opened. So every folder on the way is
opened and checked, and it is the open file that is checked and then used.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

MOST_LINKS = 40  # on the way to a folder, as Linux counts


class UntrustedError(OSError):
    """A file or folder of our own that somebody else could have put there or could change."""


def open_trusted_folder(path: Path) -> int:
    """The descriptor of a folder that no other user can change or replace; it is made where it is missing.

    Every folder on the way, also behind links, must be ours or root's, and closed to other writers unless it is sticky,
    as /tmp is. Raises UntrustedError, OSError.
    """
    if not hasattr(os, "O_DIRECTORY"):
        raise UntrustedError(f"{path} cannot be checked on this system.")
    todo, links, place = list(path.absolute().parts), 0, -1
    try:
        while todo:
            part = todo.pop(0)
            if not os.path.isabs(part):
                state = _entry(part, place)
                if stat.S_ISLNK(state.st_mode):
                    links += 1
                    if state.st_uid not in (0, os.geteuid()) or links > MOST_LINKS:
                        raise UntrustedError(f"{path}: {part} is a link that cannot be trusted.")
                    todo = [*Path(os.readlink(part, dir_fd=place)).parts, *todo]
                    continue
            before, at = place, None if place < 0 else place
            place = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            if before >= 0:
                os.close(before)
            state = os.fstat(place)
            writers = state.st_mode & (0o002 if is_private_group(state.st_gid) else 0o022)
            if state.st_uid not in (0, os.geteuid()) or (writers and not (todo and state.st_mode & stat.S_ISVTX)):
                raise UntrustedError(f"{path}: other users can change the folder {part}.")
        return place
    except BaseException:
        if place >= 0:
            os.close(place)
        raise


def is_private_group(number: int) -> bool:
    """Whether a group has the user as its only member, as many systems make one for each user."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except KeyError:  # users of containers often have no name
        return False
    return (user.pw_gid, user.pw_name) == (number, group.gr_name) and {*group.gr_mem} <= {user.pw_name}


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for the user only, as the XDG specification says."""
    if not folder.exists():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def _entry(name: str, folder: int) -> os.stat_result:
    """What a name in an open folder stands for; a new folder of ours where it is missing."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        with suppress(FileExistsError):  # another process was faster
            os.mkdir(name, 0o700, dir_fd=folder)
        return os.stat(name, dir_fd=folder, follow_symlinks=False)


def open_own(path: str | Path, flags: int = os.O_RDONLY, folder: int | None = None) -> int:
    """The descriptor of a regular file of ours. Follows no link, waits for no pipe.

    folder  the open folder that the path is in; None: the working folder

    Raises UntrustedError for anything else, FileNotFoundError.
    """
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags | safe, 0o644, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        kind = "a link" if error.errno == errno.ELOOP else "a folder" if error.errno == errno.EISDIR else error.strerror
        raise UntrustedError(f"{path} is not a file of ours ({kind}).") from None
    state = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(state.st_mode):
        problem = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe or a device"
    elif state.st_nlink > 1:
        problem = "it has a second name"
    elif hasattr(os, "geteuid") and state.st_uid != os.geteuid():
        problem = "another user owns it"
    if problem:
        os.close(descriptor)
        raise UntrustedError(f"{path} is not a file of ours ({problem}).")
    return descriptor
