"""Read a written file back and compare it with its source, number by number.

It reads through the tables of names, as every reader does, and rounds with numpy where torch rounded. It hashes the
tensors as it goes (`convert.actions.tensor_set`).
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.actions.target import MismatchError
from convert.actions.tensor_set import everything, names_among_everything, original_weights, set_sha256
from convert.actions.writing import NewValue
from convert.checkpoint import Checkpoint, read_checkpoint
from convert.errors import CheckpointError, counted, shown_list
from convert.files.arrays import decoded, in_step, raw_pieces, rounded
from convert.files.reader import CheckpointFile, open_checkpoint, release_after_last
from convert.files.records import TensorRecord, trimmed
from convert.layouts.noise_schedule import MARKERS
from convert.single_part import read_part


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was compared and found equal."""

    same: int  # tensors with the bits of the source
    rounded: int  # tensors with its numbers at another precision
    changed: int  # tensors with the new values that were asked for
    tensors_sha256: str  # over the weights
    everything_sha256: str | None  # including the tensors beside them; None without any


def verify(
    path: Path,
    file: CheckpointFile,
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    values: Mapping[str, NewValue] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Verified:
    """Compare a file or folder with the model that was written to it.

    file, checkpoint  its source, extras included
    dtype             the requested precision, a key of DTYPE_WIDTHS; None: the precision of the source
    values            new values of weights, as in `convert.actions.writing.Changes`; they are computed again
    on_bytes          called with the number of bytes that were just compared

    Raises MismatchError.
    """
    _forget_pages(path)
    try:
        with open_checkpoint(path) as back:
            read = read_part(back, checkpoint.part) if checkpoint.part else read_checkpoint(back)
            return _compare(file, checkpoint, back, read, dtype, values or {}, on_bytes)
    except CheckpointError as error:
        raise MismatchError(f"the new file cannot be read back and was removed: {error}") from None


def _compare(
    file: CheckpointFile,
    source: Checkpoint,
    back: CheckpointFile,
    written: Checkpoint,
    dtype: str | None,
    values: Mapping[str, NewValue],
    on_bytes: Callable[[int], None] | None,
) -> Verified:
    wanted, found = everything(source), everything(written)
    wrong = sorted(wanted.keys() ^ found.keys())
    for what in ("prediction", "schedule") if source.part in (None, "unet") else ():
        if getattr(written.config, what) != getattr(source.config, what):
            raise MismatchError(f"the new file has another {what} than the source and was removed.")
    wrong = [name for name in wrong if name not in MARKERS]  # which only files of the original layout need
    weights = original_weights(written).keys()
    release = [release_after_last(side, table.values()) for side, table in ((file, wanted), (back, found))]
    entries, same = [], 0
    changes = {name: values[ours] for ours, name in names_among_everything(source).items() if ours in values}

    def place(name: str) -> tuple[int, int, int]:
        return found[name].storage.file, found[name].storage.offset, found[name].offset

    for name in sorted(wanted.keys() & found.keys(), key=place):
        a, b = wanted[name], found[name]
        digest = hashlib.sha256()
        right = b.dtype in (a.dtype, dtype) and (b.dtype == (dtype or a.dtype) or name not in weights)
        equal = trimmed(a.shape) == trimmed(b.shape) and right
        if not (equal and _same_numbers(file, a, back, b, digest, changes.get(name))):
            wrong.append(name)
        same += a.dtype == b.dtype and name not in changes
        entries.append((name, b, digest.hexdigest()))
        release[0](a)
        release[1](b)
        if on_bytes:
            on_bytes(b.nbytes)
    if wrong:
        raise MismatchError(
            f"the new file differs from the source in {counted(len(wrong), 'tensor')} and was removed: "
            f"{shown_list(wrong)}. Check the disk and the memory, and try again."
        )
    return Verified(
        same=same,
        rounded=len(entries) - same - len(changes),
        changed=len(changes),
        tensors_sha256=set_sha256(entry for entry in entries if entry[0] in weights),
        everything_sha256=set_sha256(entries) if written.extras else None,
    )


def _same_numbers(
    file_a: CheckpointFile,
    a: TensorRecord,
    file_b: CheckpointFile,
    b: TensorRecord,
    digest,
    change: NewValue | None = None,
) -> bool:
    """Whether b holds the numbers of a, or the new ones, at its own precision. Adds the bytes of b to `digest`."""
    same = True
    if change:
        from convert.files.tensors import as_tensor

        value = change(as_tensor(file_a, a)).contiguous().numpy().reshape(-1)
        start = 0
        for y in raw_pieces(file_b, b):
            digest.update(y)
            expected = as_written(value[start : start + len(y)].astype("f8"), b.dtype)
            same = same and np.array_equal(expected, decoded(y, b.dtype).astype("f8"))
            start += len(y)
        return same
    for x, y in in_step(raw_pieces(file_a, a), raw_pieces(file_b, b)):
        digest.update(y)
        if a.dtype == b.dtype:
            same = same and np.array_equal(x, y)
            continue
        expected = as_written(decoded(x, a.dtype).astype("f8"), b.dtype)
        same = same and np.array_equal(expected, decoded(y, b.dtype).astype("f8"))
    return same


def as_written(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """float64 numbers rounded to another precision as torch rounds them, again in float64."""
    if dtype != "float64":
        numbers = numbers.astype("f4").astype("f8")  # torch rounds to float32 first
    return rounded(numbers, dtype)


def _forget_pages(path: Path) -> None:
    """Make the system read back from the disk, not from its page cache, where it offers that."""
    if not hasattr(os, "posix_fadvise"):
        return
    for place in [path] if path.is_file() else [place for place in path.rglob("*") if place.is_file()]:
        with open(place, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
