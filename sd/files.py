"""Files that are complete or not there."""

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LONGEST = 100  # characters of a name that its temporary file shows


@contextmanager
def written_whole(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name once it is complete and on the disk; after an error there is none.

    Raises FileExistsError where a file of that name exists, unless forced.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already. Give another name, or --force to replace it.")
    temporary = path.with_name(f".{path.name[:LONGEST]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
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
    """Give a file its name, but not one that another process has taken meanwhile."""
    taken = FileExistsError(f"{path} was written by somebody else meanwhile. Give another name.")
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise taken from None
    except OSError:  # a file system without links: between the look and the renaming, another may still come first
        if path.exists():
            raise taken from None
        os.rename(temporary, path)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove the half-written files of these names that a killed process left behind."""
    by_folder: dict[Path, set[str]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, set()).add(path.name[:LONGEST])
    for folder, names in by_folder.items():
        for path in list(folder.iterdir()):
            match = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.tmp", path.name, re.DOTALL)
            if match and match[1] in names and path.is_file():
                path.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to write files into, which gets its name once the block ends; after an error there is none.

    Raises FileExistsError where something of that name exists, unless forced; then that is replaced as a whole.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already. Give another name, or --force to replace it.")
    mark = secrets.token_hex(4)
    temporary, before = (path.with_name(f".{path.name[:100]}.{mark}.{end}") for end in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if force and path.exists():
            os.rename(path, before)
        try:
            os.rename(temporary, path)
        except OSError:
            if before.exists():
                os.rename(before, path)
            elif path.exists():
                raise FileExistsError(f"{path} was written by somebody else meanwhile. Give another name.") from None
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)
