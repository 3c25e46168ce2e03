"""From one layout to another: the tensors of a model, copied as they are unless another precision is asked for."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from convert.checkpoint import FORMAT, FORMAT_VERSION, Checkpoint, match_shapes, read_checkpoint
from convert.hashing import file_sha256
from convert.reader import CheckpointFile, open_checkpoint
from convert.records import DTYPE_WIDTHS, TensorRecord
from sd.files import written_whole

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
LAYOUTS = ("sd-zoo", "original")
SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
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

    target     `.safetensors`, or `.ckpt` for the original layout
    layout     "sd-zoo" or "original"; the other one than that of the source by default
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
    if target.suffix not in (".safetensors", ".ckpt"):
        raise TargetError(f"{target} must end in .safetensors or .ckpt.")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already. Give another name, or --force to replace it.")
    with open_checkpoint(source) as file:
        checkpoint = read_checkpoint(file, weights=weights)
        layout = layout or ("original" if checkpoint.layout == FORMAT else "sd-zoo")
        if target.suffix == ".ckpt" and layout != "original":
            raise TargetError(f"{target} would be a .ckpt, which only the original layout has. Name it .safetensors.")
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
            if target.suffix == ".ckpt":
                _write_pickle(out, file, tensors, dtypes, checkpoint, on_bytes)
            else:
                metadata = _metadata(source, checkpoint, precision) if layout == "sd-zoo" else {"format": "pt"}
                _write_safetensors(out, file, tensors, dtypes, metadata, on_bytes)
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
        named[name] = TensorRecord(
            dtype=record.dtype,
            shape=record.shape + (1,) * axes,
            stride=record.stride + (1,) * axes,
            storage=record.storage,
            offset=record.offset,
        )
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
        "source_file": source.name,
        "source_sha256": file_sha256(source),
        **step,
    }


def _pieces(
    file: CheckpointFile, tensors: Mapping[str, TensorRecord], dtypes: Mapping[str, str]
) -> Iterator[tuple[str, memoryview]]:
    """The bytes of one tensor after the other, row by row, little-endian, in its new precision."""
    for name, record in tensors.items():
        file.verify(record)
        if record.is_contiguous and record.dtype == dtypes[name] and record.storage.byteorder == "little":
            width = DTYPE_WIDTHS[record.dtype]
            start = record.offset * width
            yield name, file.storage_bytes(record)[start : start + record.nbytes]
        else:
            import torch

            from convert.tensors import as_tensor

            tensor = as_tensor(file, record).to(getattr(torch, dtypes[name])).contiguous()
            yield name, memoryview(tensor.flatten().view(torch.uint8).numpy()).cast("B")
        file.release(record)


def _write_safetensors(
    out: BinaryIO,
    file: CheckpointFile,
    tensors: Mapping[str, TensorRecord],
    dtypes: Mapping[str, str],
    metadata: dict[str, str],
    on_bytes: Callable[[int], None] | None,
) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, record in tensors.items():
        start, end = end, end + record.numel * DTYPE_WIDTHS[dtypes[name]]
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtypes[name]],
            "shape": list(record.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)  # so that the data, and large tensors in it, are aligned in a mapping
    out.write(struct.pack("<Q", len(text)) + text)
    for _, data in _pieces(file, tensors, dtypes):
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            out.write(chunk)
            if on_bytes:
                on_bytes(len(chunk))


def _write_pickle(
    out: BinaryIO,
    file: CheckpointFile,
    tensors: Mapping[str, TensorRecord],
    dtypes: Mapping[str, str],
    checkpoint: Checkpoint,
    on_bytes: Callable[[int], None] | None,
) -> None:
    """The container that the original code reads with `torch.load`."""
    import torch

    from convert.tensors import as_tensor

    weights = {}
    for name, record in tensors.items():
        file.verify(record)
        weights[name] = as_tensor(file, record).to(getattr(torch, dtypes[name])).contiguous()
        if on_bytes:
            on_bytes(record.numel * DTYPE_WIDTHS[dtypes[name]])
    torch.save({"state_dict": weights, "global_step": checkpoint.global_step or 0}, out)
