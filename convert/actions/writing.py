"""Write the tensors of an open file, one after the other, in another precision if asked."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from convert.checkpoint import EXTRA, FLOATS, FORMAT, FORMAT_VERSION, Checkpoint
from convert.errors import CorruptFileError, WeightMismatchError, counted, shown, shown_list
from convert.files.hashing import file_sha256, hashed_meanwhile, remembered_sha256
from convert.files.reader import CheckpointFile, CheckpointFolder, JoinedFiles, Span, release_after_last
from convert.files.records import DTYPE_WIDTHS, StorageRecord, TensorRecord
from convert.files.safetensors_writer import write_safetensors
from convert.layouts.joined import is_transposed, joined_names
from convert.layouts.names import PREFIXES, diffusers_names, ema_name
from convert.layouts.noise_levels import marking
from convert.layouts.noise_schedule import ENDS_IN_NOISE, MARKERS, METADATA, PREDICTS_V
from convert.layouts.open_clip import transposed
from convert.layouts.wrapping import OF_CONFIG
from convert.single_part import name_alone
from sd.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
CHUNK = 16 << 20
# between these files, or in this sandbox, or at all
CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
OUR_METADATA = {
    "format",
    "format_version",
    "part",
    "family",
    "config",
    "precision",
    "weights",
    "global_step",
    "zero_terminal_snr",
}
OUR_METADATA |= {*OF_CONFIG, "source_file", "source_sha256", "source_files", "vae_file", "vae_sha256", "vae_files"}


NOTHING = TensorRecord("float32", (0,), (1,), StorageRecord("", 0, 0, "little", None), 0)  # a tensor without elements


NewValue = Callable[["Tensor"], "Tensor"]  # the value of a weight in its source -> the one to write, in float32 or more


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a conversion changes in a model besides its layout and precision."""

    values: Mapping[str, NewValue] = field(default_factory=dict)  # by our name of the weight, in our shape
    metadata: Mapping[str, str] = field(default_factory=dict)  # that says so in the new file


class Planned(NamedTuple):
    """A tensor to write."""

    record: TensorRecord  # its place in the source, with the shape to write
    dtype: str  # to write, a key of DTYPE_WIDTHS
    change: NewValue | None = None  # in the shape to write
    below: "tuple[Planned, ...]" = ()  # what is joined to it along the first axis
    numbers: tuple[float, ...] = ()  # that it holds, if they are not in the source

    @property
    def parts(self) -> "tuple[Planned, ...]":
        return (self, *self.below)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.record.shape if not self.numbers else (len(self.numbers),)
        return (sum(part.record.shape[0] for part in self.parts), *shape[1:]) if self.below else shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_WIDTHS[self.dtype]

    @property
    def is_copy(self) -> bool:
        return not self.numbers and all(part.dtype == part.record.dtype and not part.change for part in self.parts)


Plan = dict[str, Planned]  # by the name to write


def plan_weights(
    checkpoint: Checkpoint, layout: str, precision: str, values: Mapping[str, NewValue] | None = None
) -> Plan:
    """The weights of a model with the names and shapes of a layout; `<component>.<name>` for a diffusers folder.

    values  new ones, as in `Changes`

    Together with the tensors beside the model, the original layout gives every tensor the name that it had in its
    source: averaged weights keep the names of averages. Beside the model, only weights change their precision.

    Raises WeightMismatchError where two tensors would have one name.
    """
    names = diffusers_names(checkpoint.config) if layout == "diffusers" else checkpoint.names
    alone = partial(name_alone, checkpoint.part) if checkpoint.part and layout == "original" else str
    averaged = checkpoint.weights == "ema" and bool(checkpoint.extras) and layout == "original"
    plan = {}
    for ours, record in checkpoint.tensors.items():
        dtype, change = PRECISIONS.get(precision, record.dtype), (values or {}).get(ours)
        if layout == FORMAT:
            plan[ours] = Planned(record, dtype, change)
        else:
            name, axes = names[ours]
            name = ema_name(name) if averaged and ours.startswith("unet.") else name
            unit = (1,) * axes
            plan[alone(name)] = Planned(
                replace(record, shape=record.shape + unit, stride=record.stride + unit),
                dtype,
                partial(_reshaped, change, record.shape) if change and unit else change,
            )
    if layout == "original" and not checkpoint.part:
        for name, parts in joined_names(checkpoint.config).items():
            first, *others = (plan.pop(part) for part in parts)
            plan[name] = _turned(first) if is_transposed(name) else first._replace(below=tuple(others))
    of_folders = kept_names(checkpoint.config) if layout == "diffusers" else {}
    for original, record in checkpoint.extras.items():
        name = EXTRA + original if layout == FORMAT else of_folders.get(original, original)
        if name in plan:
            raise WeightMismatchError(f"holds {shown(original)} twice, as a weight and beside the model.")
        is_weight = record.dtype in FLOATS and original.startswith((PREFIXES["unet"], "model_ema.diffusion_model"))
        plan[name] = Planned(record, PRECISIONS.get(precision, record.dtype) if is_weight else record.dtype)
    if layout == "original" and checkpoint.part in (None, "unet"):
        for marker, numbers in markers(checkpoint).items():
            if numbers is not None:
                plan.setdefault(marker, Planned(NOTHING, NOTHING.dtype, numbers=numbers))
            else:
                plan.pop(marker, None)
    return plan


def kept_names(config: ModelConfig) -> dict[str, str]:
    """Tensors beside a model that a diffusers folder has, too: their original names -> their names there."""
    if not config.depth:
        return {}
    from convert.layouts.depth_layout import unused_names

    return unused_names(config.depth)


def kept_in_folders(checkpoint: Checkpoint) -> dict[str, TensorRecord]:
    """Those of `kept_names` that a checkpoint has."""
    names = kept_names(checkpoint.config)
    return {name: record for name, record in checkpoint.extras.items() if name in names}


def _turned(planned: Planned) -> Planned:
    """A matrix with its rows as columns."""
    change = planned.change and (lambda value: planned.change(value.T).T)
    return planned._replace(record=transposed(planned.record), change=change)


def _reshaped(change: NewValue, shape: tuple[int, ...], value: "Tensor") -> "Tensor":
    """The new value of a weight whose shape in the new file is another than ours."""
    return change(value.reshape(shape)).reshape(value.shape)


def markers(checkpoint: Checkpoint) -> dict[str, tuple[float, ...] | None]:
    """The tensors that say what no shape shows, and their numbers; None for those that a file of this model lacks."""
    levels = marking(checkpoint.config)
    predicts_v = checkpoint.config.prediction == "v" and not levels
    found = {PREDICTS_V: () if predicts_v else None, ENDS_IN_NOISE: () if checkpoint.said.ends_in_noise else None}
    return dict.fromkeys(MARKERS) | found | levels


def our_metadata(
    file: CheckpointFile, checkpoint: Checkpoint, precision: str, hash_source: bool
) -> dict[str, str | Callable[[], str]]:
    """The metadata of a file of ours.

    hash_source  read the source if its sha256 is not known; otherwise leave an unknown sha256 out
    """
    dtypes = sorted({record.dtype for record in checkpoint.tensors.values()})
    step = {} if checkpoint.global_step is None else {"global_step": str(checkpoint.global_step)}
    part = {"part": checkpoint.part} if checkpoint.part else {}
    zero_snr = {"zero_terminal_snr": "true"} if checkpoint.said.ends_in_noise else {}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **part,
        "family": checkpoint.config.family,
        "config": json.dumps(checkpoint.config.to_dict()),
        "precision": PRECISIONS.get(precision, "+".join(dtypes)),
        "weights": checkpoint.weights,
        "source_file": shown(os.path.basename(os.path.abspath(file.path))),  # as valid Unicode, also of "."
        **_source_hashes(file, hash_source),
        **step,
        **zero_snr,
    }


def publisher_metadata(file: CheckpointFile, checkpoint: Checkpoint) -> dict[str, str]:
    """The publisher's metadata (title, licence, merge recipe), without what is no longer true.

    Left out are checksums of the old file, and a prediction that was overruled.
    """
    return {
        name: text
        for name, text in file.metadata.items()
        if name not in OUR_METADATA
        and "hash" not in name
        and METADATA.get(name, {}).get(text.strip().lower()) in (None, checkpoint.config.prediction)
    }


def stated_json(metadata: Mapping[str, str], name: str) -> object:
    """What a file's metadata hold under a name as JSON; None if there is nothing that can be read."""
    try:
        return json.loads(metadata.get(name, "null"))
    except (ValueError, RecursionError):
        return None


def _source_hashes(file: CheckpointFile, compute: bool) -> dict[str, str | Callable[[], str]]:
    """The sha256 of the source; of a folder, those of its weights by their place in it, as JSON.

    compute  whether files are read for those that are not known
    """
    if isinstance(file, JoinedFiles):
        vae = _source_hashes(file.second, compute)
        renamed = {name.replace("source", "vae"): text for name, text in vae.items()}
        return _source_hashes(file.first, compute) | {"vae_file": shown(file.second.path.name), **renamed}
    if not isinstance(file, CheckpointFolder):
        if compute:
            return {"source_sha256": hashed_meanwhile(file.path)}  # it takes about as long as the writing
        known = remembered_sha256(file.path)
        return {"source_sha256": known} if known else {}
    if not compute:
        return {}
    hashes = {shown(part.path.relative_to(file.path).as_posix()): file_sha256(part.path) for part in file.files}
    return {"source_files": json.dumps(hashes)}


def write_plan(
    out: "Reporting",
    file: CheckpointFile,
    plan: Mapping[str, Planned],
    precision: str,
    metadata: Mapping[str, str | Callable[[], str]],
) -> None:
    """Write a `.safetensors`. Raises as `converted` does.

    Bytes that need no change are copied from file to file; their checksums are computed meanwhile, in another thread.
    """
    entries = {name: (planned.dtype, planned.shape) for name, planned in plan.items()}
    places = {
        name: [file.span(part.record) for part in planned.parts] for name, planned in plan.items() if planned.is_copy
    }
    spans = {name: found for name, found in places.items() if all(found)}
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        checks = pool.submit(_verify, file, [part.record for name in spans for part in plan[name].parts], stop)
        try:
            write_safetensors(out, entries, _pieces(file, plan, spans, precision), metadata)
        except BaseException:
            stop.set()
            raise
        checks.result()


def _verify(file: CheckpointFile, records: list[TensorRecord], stop: threading.Event) -> None:
    release = release_after_last(file, records)
    for record in records:
        if stop.is_set():
            return
        file.verify(record)
        release(record)


def _pieces(
    file: CheckpointFile, plan: Mapping[str, Planned], spans: Mapping[str, list[Span]], precision: str
) -> Iterator[memoryview | Span]:
    """The bytes of each tensor in order: places in the source, or converted bytes."""
    others = {name: planned for name, planned in plan.items() if name not in spans}
    if not others:  # and no torch is needed
        yield from chain.from_iterable(spans.values())
        return
    from convert.files.tensors import raw_bytes

    made = converted(file, others, precision)
    for name in plan:
        yield from spans[name] if name in spans else [raw_bytes(next(made)[1])]
    next(made, None)  # raises for values out of range


def converted(file: CheckpointFile, plan: Mapping[str, Planned], precision: str) -> "Iterator[tuple[str, Tensor]]":
    """One tensor after the other in its new precision, row by row; what needs no change lies in the mapped file.

    Raises CorruptFileError for a wrong checksum, WeightMismatchError for values that the precision has no room for.
    """
    import torch

    from convert.files.tensors import as_tensor, in_range, out_of_range

    release = release_after_last(file, (part.record for planned in plan.values() for part in planned.parts))
    unusable, overflown = [], []
    for name, planned in plan.items():
        dtype, values = getattr(torch, planned.dtype), []
        for part in planned.parts:
            file.verify(part.record)
            value = torch.tensor(part.numbers) if part.numbers else as_tensor(file, part.record)
            if part.change:
                value = part.change(value)
                if not in_range(value, dtype):
                    overflown.append(name)
            elif value.dtype != dtype and not in_range(value, dtype):
                unusable.append(name)
            values.append(value.to(dtype))
        yield name, torch.cat(values) if planned.below else values[0].contiguous()
        for part in planned.parts:
            release(part.record)
    if unusable:
        raise out_of_range(unusable, precision)
    if overflown:
        raise WeightMismatchError(
            f"would hold values that are NaN, infinite or beyond its precision in {counted(len(overflown), 'weight')}: "
            f"{shown_list(overflown)}. Use a smaller strength or weight, or --precision fp32."
        )


def write_pickle(out: BinaryIO, weights: "Iterable[tuple[str, Tensor]]", beside: Mapping[str, int | str]) -> None:
    """The container that the original code reads with `torch.load`.

    beside  what stands beside the tensors
    """
    import torch

    # Of a tensor that is a window into a larger storage, torch would write the whole storage.
    state = {name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for name, t in weights}
    try:
        torch.save({"state_dict": state, **beside}, out)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a full disk, which torch reports as an error of its own
            raise error.__context__ from None
        raise


class Reporting:
    """A file that reports how many bytes were just written, in total as many as announced."""

    out: BinaryIO

    def __init__(self, announced: int, on_bytes: Callable[[int], None] | None):
        self.left, self.on_bytes = announced, on_bytes

    def write(self, data: bytes | memoryview | Span) -> int:
        if isinstance(data, Span):
            self._copy(data)
            return data.nbytes
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self.out.write(chunk)
            self.report(len(chunk))
        return len(data)

    def _copy(self, span: Span) -> None:
        self.out.flush()
        done = 0
        while done < span.nbytes:
            count = copy_bytes(span.descriptor, span.offset + done, self.out, min(CHUNK, span.nbytes - done))
            if not count:
                raise CorruptFileError("became shorter while it was read")
            done += count
            self.report(count)

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        return self.out.seek(position, whence)

    def flush(self) -> None:
        self.out.flush()

    def report(self, count: int) -> None:
        count = min(count, self.left)  # a file is a little longer than its tensors
        self.left -= count
        if self.on_bytes and count:
            self.on_bytes(count)


def copy_bytes(source: int, offset: int, out: BinaryIO, count: int) -> int:
    """Copy up to `count` bytes to the end of a flushed file, inside the kernel where possible.

    Returns how many were copied; 0 at the end of the source.
    """
    if hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source, out.fileno(), count, offset)
            out.seek(0, os.SEEK_END)  # tell the file object
            return copied
        except OSError as error:
            if error.errno not in CANNOT_COPY:
                raise
    data = os.pread(source, count, offset)
    out.write(data)
    out.flush()
    return len(data)
