"""From one layout to another: the tensors of a model, copied as they are unless another precision is asked for."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from convert.checkpoint import FORMAT, FORMAT_VERSION, Checkpoint, match_shapes, read_checkpoint
from convert.errors import shown
from convert.hashing import file_sha256
from convert.reader import CheckpointFile, open_checkpoint
from convert.records import DTYPE_WIDTHS, TensorRecord
from convert.safetensors_writer import write_safetensors
from sd.files import written_whole

if TYPE_CHECKING:
    from torch import Tensor

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
LAYOUTS = ("sd-zoo", "original")
PICKLES = (".ckpt", ".pt")
CHUNK = 16 << 20


class TargetError(ValueError):
    """What was asked for cannot be written."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done."""

    checkpoint: Checkpoint
    layout: str  # of the new file
    tensors: int
    nbytes: int  # of all tensors
    parameters: int


def convert(
    source: Path,
    target: Path,
    *,
    layout: str | None = None,
    precision: str = "keep",
    weights: str = "auto",
    force: bool = False,
    on_bytes: Callable[[int], None] | None = None,
    on_start: Callable[[int], None] | None = None,
) -> Conversion:
    """Write the model of one file as another, complete or not at all.

    target     `.safetensors`; or `.ckpt` or `.pt`, a pickle in the original layout
    layout     "sd-zoo" or "original"; by default the original one for a pickle, else the other one than the source's
    precision  "keep", or "fp32", "fp16", "bf16" for all tensors
    weights    "model", "ema", or "auto": the model's own unless the file has only averaged ones
    force      replace the target if it exists
    on_start, on_bytes  called with the number of bytes that will be, and that were just written

    Raises `convert.errors.CheckpointError` for the source; TargetError, FileExistsError or OSError for the target.
    """
    if precision != "keep" and precision not in PRECISIONS:
        raise TargetError(f"precision must be keep, {', '.join(PRECISIONS)}, got {precision!r}")
    if layout is not None and layout not in LAYOUTS:
        raise TargetError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    suffix = target.suffix.lower()
    if suffix not in (".safetensors", *PICKLES):
        raise TargetError(f"{target} must end in .safetensors, .ckpt or .pt.")
    if not target.absolute().parent.is_dir():
        raise TargetError(f"the folder of {target} does not exist. Make it first.")
    if suffix in PICKLES and layout is None:
        layout = "original"
    if source.exists() and target.exists() and source.samefile(target):
        raise TargetError(f"{target} is the source itself, which would be lost. Give another name.")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already. Give another name, or --force to replace it.")
    with open_checkpoint(source) as file:
        checkpoint = read_checkpoint(file, weights=weights)
        layout = layout or ("original" if checkpoint.layout == FORMAT else "sd-zoo")
        if suffix in PICKLES and layout != "original":
            raise TargetError(f"{target} would be a pickle, which only the original layout is. Name it .safetensors.")
        checkpoint = match_shapes(checkpoint, _shapes(checkpoint))
        tensors = _in_layout(checkpoint, layout)
        dtypes = {name: PRECISIONS.get(precision, record.dtype) for name, record in tensors.items()}
        total = sum(record.numel * DTYPE_WIDTHS[dtypes[name]] for name, record in tensors.items())
        free = shutil.disk_usage(target.resolve().parent).free
        if free < total + CHUNK:
            raise OSError(
                f"{target.resolve().parent} has {free / 1e9:.2f} GB free, the file needs {total / 1e9:.2f} GB."
            )
        if on_start:
            on_start(total)
        with written_whole(target, force=force) as out:
            reporting = _Reporting(out, total, on_bytes)
            converted = _converted(file, tensors, dtypes, precision)
            if suffix in PICKLES:
                _write_pickle(reporting, converted, checkpoint)
            else:
                metadata = _metadata(source, checkpoint, precision) if layout == "sd-zoo" else {"format": "pt"}
                entries = {name: (dtypes[name], record.shape) for name, record in tensors.items()}
                write_safetensors(reporting, entries, _bytes_of(converted), metadata)
            reporting.report(total)  # tensors that share their bytes are written once
    return Conversion(
        checkpoint=checkpoint,
        layout=layout,
        tensors=len(tensors),
        nbytes=total,
        parameters=sum(record.numel for record in tensors.values()),
    )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    from sd.networks import build_networks, parameter_shapes  # torch takes a second to import: not before it is needed

    return parameter_shapes(build_networks(checkpoint.config))


def _in_layout(checkpoint: Checkpoint, layout: str) -> dict[str, TensorRecord]:
    """The tensors with the names and shapes of a layout."""
    if layout == "sd-zoo":
        return checkpoint.tensors
    named = {}
    for ours, record in checkpoint.tensors.items():
        name, axes = checkpoint.names[ours]
        unit = (1,) * axes
        named[name] = replace(record, shape=record.shape + unit, stride=record.stride + unit)
    return named


def _metadata(source: Path, checkpoint: Checkpoint, precision: str) -> dict[str, str]:
    dtypes = sorted({record.dtype for record in checkpoint.tensors.values()})
    step = {} if checkpoint.global_step is None else {"global_step": str(checkpoint.global_step)}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "family": checkpoint.config.family,
        "config": json.dumps(checkpoint.config.to_dict()),
        "precision": PRECISIONS.get(precision, "+".join(dtypes)),
        "weights": checkpoint.weights,
        "source_file": shown(source.name),  # safetensors metadata must be valid Unicode
        "source_sha256": file_sha256(source),
        **step,
    }


def _converted(
    file: CheckpointFile, tensors: Mapping[str, TensorRecord], dtypes: Mapping[str, str], precision: str
) -> "Iterator[tuple[str, Tensor]]":
    """One tensor after the other in its new precision, row by row; what needs no change lies in the mapped file.

    Raises CorruptFileError for a wrong checksum, WeightMismatchError for values that another precision has no room for.
    """
    import torch

    from convert.tensors import as_tensor, in_range, out_of_range, release_after_last

    release = release_after_last(file, tensors.values())
    unusable = []
    for name, record in tensors.items():
        file.verify(record)
        stored, dtype = as_tensor(file, record), getattr(torch, dtypes[name])
        if stored.dtype != dtype and not in_range(stored, dtype):
            unusable.append(name)
        yield name, stored.to(dtype).contiguous()
        release(record)
    if unusable:
        raise out_of_range(unusable, precision)


def _bytes_of(weights: "Iterable[tuple[str, Tensor]]") -> Iterator[memoryview]:
    from convert.tensors import raw_bytes

    for _, tensor in weights:
        yield raw_bytes(tensor)


def _write_pickle(out: BinaryIO, weights: "Iterable[tuple[str, Tensor]]", checkpoint: Checkpoint) -> None:
    """The container that the original code reads with `torch.load`."""
    import torch

    # Of a tensor that is a window into a larger storage, torch would write the whole storage.
    state = {name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for name, t in weights}
    beside = {"global_step": checkpoint.global_step or 0, "native_size": checkpoint.config.native_size}
    try:
        torch.save({"state_dict": state, **beside}, out)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a full disk, which torch hides behind a fault of its own
            raise error.__context__ from None
        raise


class _Reporting:
    """A file that tells how many bytes were just written, altogether as many as were announced."""

    def __init__(self, out: BinaryIO, announced: int, on_bytes: Callable[[int], None] | None):
        self.out, self.left, self.on_bytes = out, announced, on_bytes

    def write(self, data: bytes | memoryview) -> int:
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self.out.write(chunk)
            self.report(len(chunk))
        return len(data)

    def flush(self) -> None:
        self.out.flush()

    def report(self, count: int) -> None:
        count = min(count, self.left)  # a file is a little longer than its tensors
        self.left -= count
        if self.on_bytes and count:
            self.on_bytes(count)
