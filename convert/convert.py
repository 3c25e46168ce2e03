"""From one layout to another: the tensors of a model, copied as they are unless another precision is asked for."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from convert.checkpoint import FORMAT, FORMAT_VERSION, Checkpoint, match_shapes, read_checkpoint
from convert.diffusers_folder import INDEX
from convert.diffusers_names import diffusers_names
from convert.diffusers_writer import WEIGHTS, write_settings
from convert.errors import shown
from convert.family import recognise
from convert.hashing import file_sha256, hashed_meanwhile
from convert.reader import CheckpointFile, CheckpointFolder, open_checkpoint
from convert.records import DTYPE_WIDTHS, TensorRecord
from convert.safetensors_writer import write_safetensors
from sd.files import folder_written_whole, written_whole

if TYPE_CHECKING:
    from torch import Tensor

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
LAYOUTS = ("sd-zoo", "original", "diffusers")
PICKLES = (".ckpt", ".pt")
CHUNK = 16 << 20
OUR_METADATA = {"format", "format_version", "family", "config", "precision", "weights", "global_step"}
OUR_METADATA |= {"source_file", "source_sha256", "source_files"}


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

    source     a file, or a folder of the diffusers library
    target     `.safetensors`; or `.ckpt` or `.pt`, a pickle in the original layout; or a folder for diffusers' layout
    layout     "sd-zoo", "original" or "diffusers"; by default the original one for a pickle and for what is ours, else
               ours
    precision  "keep", or "fp32", "fp16", "bf16" for all tensors
    weights    "model", "ema", or "auto": the model's own unless the file has only averaged ones
    force      replace the target if it exists; of folders, only one with a diffusers model in it
    on_start, on_bytes  called with the number of bytes that will be, and that were just written

    Raises `convert.errors.CheckpointError` for the source; TargetError, FileExistsError or OSError for the target.
    """
    if precision != "keep" and precision not in PRECISIONS:
        raise TargetError(f"precision must be keep, {', '.join(PRECISIONS)}, got {precision!r}")
    if layout is not None and layout not in LAYOUTS:
        raise TargetError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    _check_target(source, target, layout, force)
    suffix = target.suffix.lower()
    if suffix in PICKLES and layout is None:
        layout = "original"
    with open_checkpoint(source) as file:
        checkpoint = read_checkpoint(file, weights=weights)
        layout = layout or ("original" if checkpoint.layout == FORMAT else "sd-zoo")
        if suffix in PICKLES and layout != "original":
            raise TargetError(f"{target} would be a pickle, which only the original layout is. Name it .safetensors.")
        checkpoint = match_shapes(checkpoint, _shapes(checkpoint))
        if layout == "original":
            _check_original_has_room(checkpoint)
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
        reporting = _Reporting(total, on_bytes)
        if layout == "diffusers":
            with folder_written_whole(target, force=force) as folder:
                _write_folder(folder, reporting, file, checkpoint, tensors, dtypes, precision)
        else:
            with written_whole(target, force=force) as reporting.out:
                converted = _converted(file, tensors, dtypes, precision)
                if suffix in PICKLES:
                    _write_pickle(reporting, converted, checkpoint)
                else:
                    metadata = _publisher_metadata(file) | (
                        _metadata(file, checkpoint, precision) if layout == "sd-zoo" else {"format": "pt"}
                    )
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


def _check_target(source: Path, target: Path, layout: str | None, force: bool) -> None:
    """Raises TargetError or FileExistsError for a target that cannot or should not be written."""
    suffix = target.suffix.lower()
    if layout != "diffusers" and suffix not in (".safetensors", *PICKLES):
        raise TargetError(f"{target} must end in .safetensors, .ckpt or .pt; for a folder, ask for --to diffusers.")
    if layout == "diffusers" and suffix in (".safetensors", *PICKLES):
        raise TargetError(f"{target} has the name of a file, but diffusers' layout is a folder. Give another name.")
    if not target.absolute().parent.is_dir():
        raise TargetError(f"the folder of {target} does not exist. Make it first.")
    if source.exists() and target.exists() and source.samefile(target):
        raise TargetError(f"{target} is the source itself, which would be lost. Give another name.")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already. Give another name, or --force to replace it.")
    if target.is_dir() and layout != "diffusers":
        raise TargetError(f"{target} is a folder. Give another name.")
    if target.exists() and layout == "diffusers":
        if target.resolve() in source.resolve().parents:
            raise TargetError(f"{target} has the source in it, which would be lost. Give another name.")
        if not (target / INDEX).is_file():
            raise TargetError(
                f"{target} is no folder with a diffusers model, so it is not replaced. Give another name."
            )


def _check_original_has_room(checkpoint: Checkpoint) -> None:
    """In the original layout nothing but the shapes tells what a model is. Raises TargetError if that is not enough."""
    ours = checkpoint.config
    shapes = {checkpoint.names[name].name: record.shape for name, record in checkpoint.tensors.items()}
    told = recognise(shapes)
    for what, found, usual in (
        ("what the UNet predicts", ours.prediction, told.prediction),
        ("the noise schedule", ours.schedule, told.schedule),
        ("the latent scale", ours.vae.latent_scale, told.vae.latent_scale),
        ("the UNet's heads", ours.unet.heads, told.unet.heads),
        ("the text encoder's heads", ours.text_encoder.heads, told.text_encoder.heads),
        ("the text encoder's activation", ours.text_encoder.activation, told.text_encoder.activation),
    ):
        if found != usual:
            raise TargetError(
                f"the original layout has no place for {what}: {found}, where whoever reads it expects {usual}. "
                "Use --to sd-zoo or --to diffusers."
            )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    from sd.networks import build_networks, parameter_shapes  # torch takes a second to import: not before it is needed

    return parameter_shapes(build_networks(checkpoint.config))


def _in_layout(checkpoint: Checkpoint, layout: str) -> dict[str, TensorRecord]:
    """The tensors with the names and shapes of a layout."""
    if layout == "sd-zoo":
        return checkpoint.tensors
    named = {}
    names = diffusers_names(checkpoint.config) if layout == "diffusers" else checkpoint.names
    for ours, record in checkpoint.tensors.items():
        name, axes = names[ours]
        unit = (1,) * axes
        named[name] = replace(record, shape=record.shape + unit, stride=record.stride + unit)
    return named


def _metadata(file: CheckpointFile, checkpoint: Checkpoint, precision: str) -> dict[str, str | Callable[[], str]]:
    dtypes = sorted({record.dtype for record in checkpoint.tensors.values()})
    step = {} if checkpoint.global_step is None else {"global_step": str(checkpoint.global_step)}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "family": checkpoint.config.family,
        "config": json.dumps(checkpoint.config.to_dict()),
        "precision": PRECISIONS.get(precision, "+".join(dtypes)),
        "weights": checkpoint.weights,
        "source_file": shown(file.path.name),  # safetensors metadata must be valid Unicode
        **_source_hashes(file),
        **step,
    }


def _publisher_metadata(file: CheckpointFile) -> dict[str, str]:
    """What the publisher said of the model (title, licence, how it was merged), without checksums of the old file."""
    return {name: text for name, text in file.metadata.items() if name not in OUR_METADATA and "hash" not in name}


def _source_hashes(file: CheckpointFile) -> dict[str, str | Callable[[], str]]:
    """The sha256 of the source; of a folder, those of its weights by their place in it, as JSON."""
    if not isinstance(file, CheckpointFolder):
        return {"source_sha256": hashed_meanwhile(file.path)}  # it takes about as long as the writing
    hashes = {shown(part.path.relative_to(file.path).as_posix()): file_sha256(part.path) for part in file.files}
    return {"source_files": json.dumps(hashes)}


def _write_folder(
    folder: Path,
    reporting: "_Reporting",
    file: CheckpointFile,
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorRecord],
    dtypes: Mapping[str, str],
    precision: str,
) -> None:
    write_settings(folder, checkpoint.config)
    for component, place in WEIGHTS.items():
        prefix = f"{component}."
        mine = {name: record for name, record in tensors.items() if name.startswith(prefix)}
        entries = {name.removeprefix(prefix): (dtypes[name], record.shape) for name, record in mine.items()}
        with written_whole(folder / place) as reporting.out:
            converted = _converted(file, mine, dtypes, precision)
            write_safetensors(reporting, entries, _bytes_of(converted), {"format": "pt"})


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

    out: BinaryIO

    def __init__(self, announced: int, on_bytes: Callable[[int], None] | None):
        self.left, self.on_bytes = announced, on_bytes

    def write(self, data: bytes | memoryview) -> int:
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self.out.write(chunk)
            self.report(len(chunk))
        return len(data)

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        return self.out.seek(position, whence)

    def flush(self) -> None:
        self.out.flush()

    def report(self, count: int) -> None:
        count = min(count, self.left)  # a file is a little longer than its tensors
        self.left -= count
        if self.on_bytes and count:
            self.on_bytes(count)
