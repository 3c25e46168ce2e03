"""The checkpoints that the authors of Stable Diffusion published, and whether a file is one of them.

The table is `convert/published/known.json`. Each size and sha256 in it stands beside the public page that states it;
values that no page states are null.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from convert.files.hashing import file_sha256

TABLE = Path(__file__).with_name("known.json")


@dataclass(frozen=True, kw_only=True)
class Known:
    """One published file."""

    file: str
    family: str
    about: str
    bytes: int | None
    sha256: str | None
    licence: str
    address: str  # where its authors, or those who took their place, offer it
    sources: dict[str, str | None]  # "bytes" and "sha256" -> page that states it


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a file is a published one."""

    matches: bool
    known: Known | None  # the file that it is, or that its name promises
    problem: str | None  # where it does not match
    sha256: str | None  # of the file; None where its size was enough to tell


@cache
def known_checkpoints() -> tuple[Known, ...]:
    """All of them, in the order of their versions."""
    return tuple(Known(**row) for row in json.loads(TABLE.read_text(encoding="utf-8"))["checkpoints"])


def find_by_sha256(sha256: str | None) -> Known | None:
    return next((known for known in known_checkpoints() if sha256 and known.sha256 == sha256), None)


def find_by_name(name: str) -> Known | None:
    """By file name, or by file name without its ending, of which .safetensors is preferred; capitals do not matter."""
    name = name.lower()
    exact = [known for known in known_checkpoints() if known.file.lower() == name]
    stems = [known for known in known_checkpoints() if Path(known.file.lower()).stem == name]
    stems.sort(key=lambda known: not known.file.endswith(".safetensors"))
    return next(iter(exact + stems), None)


def known_named(name: str) -> list[Known]:
    """The one of that name, else all that have it in theirs."""
    found = find_by_name(name)
    return [found] if found else [known for known in known_checkpoints() if name and name.lower() in known.file.lower()]


def verify(path: Path) -> Verdict:
    """Compare a file with the table: by its sha256, whatever its name is.

    The file is read, whatever hash is remembered, unless its size alone rules out both the file of that name and every
    other one.

    Raises OSError.
    """
    expected = find_by_name(path.name)
    size = path.stat().st_size
    other_size = expected is not None and expected.bytes not in (None, size)
    sha256 = None
    if not other_size or size in {known.bytes for known in known_checkpoints()}:
        sha256 = file_sha256(path, read=True)
        if found := find_by_sha256(sha256):
            return Verdict(matches=True, known=found, problem=None, sha256=sha256)
    if expected is None:
        problem = "is not one of the known checkpoints: a fine-tune, or another model"
    elif other_size:
        problem = f"has {size} bytes; {expected.file} has {expected.bytes}"
    else:
        problem = f"has the sha256 {sha256}; that of {expected.file} is {expected.sha256}"
    return Verdict(matches=False, known=expected, problem=problem, sha256=sha256)
