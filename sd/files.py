"""Files that are complete or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name once it is complete and on the disk; after an error there is none.

    Raises FileExistsError where a file of that name exists, unless forced.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already. Give another name, or --force to replace it.")
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - it is closed before it gets its name
        prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent, delete=False
    )
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o666 & ~_umask())
        if force:
            os.replace(file.name, path)
        else:
            _name_new(file.name, path)
    finally:
        Path(file.name).unlink(missing_ok=True)


def _name_new(temporary: str, path: Path) -> None:
    """Give a file its name; unlike a rename, this fails if another process has taken the name meanwhile."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path} was written by somebody else meanwhile. Give another name.") from None
    except OSError:  # a file system without links
        os.rename(temporary, path)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
