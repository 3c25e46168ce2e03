"""How the tensors of two files differ: which are in one file only, and how far apart the others are.

The distance is the norm of the difference relative to the first, |a - b| / |a|, over a tensor or a block.
Sums are in float64, over a piece at a time; needs numpy, no torch.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.actions.tensor_set import original_weights, tensors_of
from convert.checkpoint import FLOATS, Checkpoint, read_checkpoint
from convert.errors import CheckpointError, WeightMismatchError
from convert.files.arrays import decoded, in_step, raw_pieces, rounded
from convert.files.reader import CheckpointFile, open_checkpoint
from convert.files.records import DTYPE_WIDTHS, TensorRecord, trimmed
from convert.layouts.names import OPTIONAL, PREFIXES

STEMS = ("time_embed", "label_emb", "middle_block", "out")  # blocks of the UNet that are one row each
PARTS = {prefix: part for part, prefix in (*PREFIXES.items(), *OPTIONAL.items())} | {"model_ema.": "ema"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """Two tensors of one name, or the tensors of a block together."""

    same: bool  # precision and bits are
    norm: float  # of the first
    difference: float  # norm of the difference
    rounding: bool  # only the precision differs: one is the other, rounded to the nearest
    not_finite: int  # numbers that are NaN or infinite in one of the two and differ; not in the norms

    @property
    def relative(self) -> float:
        if self.difference in (0.0, math.inf):
            return self.difference
        return self.difference / self.norm if self.norm else math.inf


@dataclass(frozen=True, kw_only=True)
class Block:
    """One row of the picture."""

    part: str  # "unet", "vae", "text_encoder", "text_encoder_2", "depth_network", "ema", or "other"
    name: str  # "input_blocks.4"
    tensors: int
    changed: int
    change: Change


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Everything that differs. Names are those of the original layout where both files are understood."""

    understood: bool  # both hold a complete model; else tensors go by their names in the files
    added: tuple[str, ...]  # in the second file only
    removed: tuple[str, ...]  # in the first file only
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # of the tensors whose shapes differ
    dtypes: dict[str, int]  # "float32 -> float16": how many tensors
    changed: dict[str, Change]
    same: int  # tensors with the same bits
    blocks: tuple[Block, ...]  # in the order of the first file
    not_compared: tuple[str, ...]  # tensors that the layout of the other file cannot hold
    averages: tuple[str, ...]  # "first" or "second": whose UNet is the EMA average in the other file

    @property
    def is_same(self) -> bool:
        return not (self.added or self.removed or self.shapes or self.changed)

    @property
    def is_rounding(self) -> bool:
        """Whether only the precision differs."""
        return (
            bool(self.changed)
            and not (self.added or self.removed or self.shapes)
            and all(change.rounding for change in self.changed.values())
        )


def diff(
    first: Path,
    second: Path,
    *,
    on_start: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Diff:
    """Compare two files. Reads both of them whole.

    on_start, on_bytes  called with the number of bytes that will be, and that were just compared

    Raises `convert.errors.CheckpointError` for files that cannot be read, or with a wrong checksum.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(open_checkpoint(path)) for path in (first, second)]
        models = [_model(file) for file in files]
        (a, b), left_out = _sides(files, models)
        common = sorted(a.keys() & b.keys(), key=lambda name: (a[name].storage.offset, a[name].offset, name))
        if on_start:
            on_start(sum(a[name].nbytes for name in common))
        shapes, dtypes, changes = {}, Counter(), {}
        for name in common:
            x, y = a[name], b[name]
            if trimmed(x.shape) != trimmed(y.shape):
                shapes[name] = (x.shape, y.shape)
            else:
                changes[name] = compare(files[0], x, files[1], y)
                dtypes.update([f"{x.dtype} -> {y.dtype}"] if x.dtype != y.dtype else [])
                files[0].release(x)
                files[1].release(y)
            if on_bytes:
                on_bytes(x.nbytes)
        changed = {name: change for name, change in changes.items() if not change.same}
        return Diff(
            understood=all(models),
            added=tuple(sorted(b.keys() - a.keys())),
            removed=tuple(sorted(a.keys() - b.keys())),
            shapes=shapes,
            dtypes=dict(dtypes),
            changed=changed,
            same=len(changes) - len(changed),
            blocks=_blocks([name for name in a if name in changes], changes),
            not_compared=left_out,
            averages=_averages(files, models) if any(name.startswith(PREFIXES["unet"]) for name in changed) else (),
        )


def _sides(
    files: list[CheckpointFile], models: list[Checkpoint | None]
) -> tuple[list[dict[str, TensorRecord]], tuple[str, ...]]:
    """The tensors of both files under common names, and the names that cannot be compared."""
    if not all(models):
        return [tensors_of(file.root) for file in files], ()
    weights = [original_weights(model) for model in models]
    everything = [_everything(*side) for side in zip(files, models, weights, strict=True)]
    if models[0].layout == models[1].layout:
        return everything, ()
    return weights, tuple(sorted((everything[0].keys() | everything[1].keys()) - weights[0].keys() - weights[1].keys()))


def _everything(
    file: CheckpointFile, model: Checkpoint, weights: Mapping[str, TensorRecord]
) -> dict[str, TensorRecord]:
    """The weights of a model and the tensors beside them."""
    if model.layout != "original":
        return dict(weights)
    used = {(record.storage, record.offset) for record in weights.values()}
    others = {
        name: record for name, record in tensors_of(file.root).items() if (record.storage, record.offset) not in used
    }
    return others | weights


def compare(file_a: CheckpointFile, a: TensorRecord, file_b: CheckpointFile, b: TensorRecord) -> Change:
    """How far two tensors of as many numbers are apart. Raises CorruptFileError for a wrong checksum."""
    file_a.verify(a)
    file_b.verify(b)
    norm = difference = 0.0
    not_finite, same = 0, a.dtype == b.dtype
    rounding = _goes_into(a.dtype, b.dtype) or _goes_into(b.dtype, a.dtype)
    for raw_a, raw_b in in_step(raw_pieces(file_a, a), raw_pieces(file_b, b)):
        x = decoded(raw_a, a.dtype).astype("f8")
        norm += _sum_of_squares(x[np.isfinite(x)])
        if a.dtype == b.dtype and np.array_equal(raw_a, raw_b):
            continue
        same = False
        y = decoded(raw_b, b.dtype).astype("f8")
        finite = np.isfinite(x) & np.isfinite(y)
        equal = (x == y) | (np.isnan(x) & np.isnan(y))
        not_finite += int((~finite & ~equal).sum())
        difference += _sum_of_squares(np.where(finite, x, 0) - np.where(finite, y, 0))
        rounding = rounding and _is_rounding(x, a.dtype, y, b.dtype)
    precision_only = a.dtype != b.dtype and not not_finite and (rounding or not difference)
    return Change(
        same=same,
        norm=math.sqrt(norm),
        difference=math.sqrt(difference),
        rounding=precision_only,
        not_finite=not_finite,
    )


def block_of(name: str) -> tuple[str, str]:
    """The network and the block of a tensor: its name up to the first number."""
    prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), "")
    parts = name.removeprefix(prefix).split(".")
    if prefix == "model_ema.":
        return "ema", "all"
    if parts[0] in STEMS:
        return PARTS.get(prefix, "other"), parts[0]
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    kept = parts[: number + 1] if number is not None and number < 4 else parts[: max(1, min(2, len(parts) - 1))]
    return PARTS.get(prefix, "other"), ".".join(kept)


def _model(file: CheckpointFile) -> Checkpoint | None:
    try:
        return read_checkpoint(file)
    except CheckpointError:
        return None


def _averages(files: list[CheckpointFile], models: list[Checkpoint | None]) -> tuple[str, ...]:
    """Which of the two UNets equals, up to rounding, the EMA average in the other file."""
    if not all(models):
        return ()
    found = []
    for side, name in ((0, "second"), (1, "first")):
        model, other = models[side], models[1 - side]
        if model.other_weights != "ema":
            continue
        try:
            averaged = read_checkpoint(files[side], weights="ema").tensors
        except WeightMismatchError:
            continue
        pairs = [(averaged[n], other.tensors[n]) for n in averaged if n.startswith("unet.") and n in other.tensors]
        changes = (
            compare(files[side], a, files[1 - side], b) if trimmed(a.shape) == trimmed(b.shape) else None
            for a, b in pairs
        )
        if pairs and all(change and (change.same or change.rounding) for change in changes):
            found.append(name)
    return tuple(found)


def _blocks(names: list[str], changes: Mapping[str, Change]) -> tuple[Block, ...]:
    """The blocks with a changed tensor, each with all of its tensors."""
    members: dict[tuple[str, str], list[str]] = {}
    for name in names:
        members.setdefault(block_of(name), []).append(name)
    blocks = []
    for (part, block), inside in sorted(members.items(), key=lambda item: item[0][1] == "out"):  # the last of the UNet
        changed = [name for name in inside if not changes[name].same]
        if changed:
            together = Change(
                same=False,
                norm=math.hypot(*(changes[name].norm for name in inside)),
                difference=math.hypot(*(changes[name].difference for name in inside)),
                rounding=all(changes[name].rounding for name in changed),
                not_finite=sum(changes[name].not_finite for name in inside),
            )
            blocks.append(Block(part=part, name=block, tensors=len(inside), changed=len(changed), change=together))
    return tuple(blocks)


def _goes_into(dtype: str, narrower: str) -> bool:
    """Whether both are floats and the second is narrower."""
    return dtype in FLOATS and narrower in FLOATS and DTYPE_WIDTHS[dtype] > DTYPE_WIDTHS[narrower]


def _is_rounding(x: np.ndarray, dtype_x: str, y: np.ndarray, dtype_y: str) -> bool:
    """Whether the less precise numbers are the nearest ones to the others."""
    if _goes_into(dtype_y, dtype_x):
        return _is_rounding(y, dtype_y, x, dtype_x)
    with np.errstate(invalid="ignore"):
        error, least = np.abs(x - y), np.abs(x - rounded(x, dtype_y))
    return bool(((error <= least) | (x == y) | np.isnan(x) & np.isnan(y)).all())


def _sum_of_squares(values: np.ndarray) -> float:
    with np.errstate(over="ignore"):  # float64 has room for any weight, but not for the square of every number
        return float(np.dot(values, values))
