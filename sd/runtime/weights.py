"""Read the weights of a checkpoint: several threads check, cast and reorder them."""

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from convert.checkpoint import Checkpoint
from convert.files.reader import CheckpointFile, release_after_last
from convert.files.records import TensorRecord
from convert.files.tensors import as_tensor, in_range, out_of_range, read_tensor
from sd.pipeline.runner import PRECISIONS, precision_name

ONE_LOAD = threading.Lock()
PRECISE = "depth_network"  # always float32: it runs once for a picture, and depths have no scale to round to


@dataclass
class Weights:
    """Where the weights of a model came from, and what adapters have done to them since.

    Copies share the file. Pickles do without it: they hold the base of each weight that adapters have changed.
    """

    file: CheckpointFile | None = None  # open; None for a model that was not loaded from a file
    records: Mapping[str, TensorRecord] = field(default_factory=dict)  # of its parameters
    dtype: torch.dtype = torch.float32  # that they were loaded in
    adapters: tuple = ()  # in use, see `sd.runtime.adapters`
    changed: dict = field(default_factory=dict)  # by parameter: what adapters did
    users: int = 0  # pictures and texts being made, during which adapters stay
    visits: object | None = None  # the `Visits` of networks whose weights are elsewhere while they rest
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # for these two; while adapters change

    def __deepcopy__(self, memo: dict) -> "Weights":
        changed = {name: weight.copied() for name, weight in self.changed.items()}
        return Weights(self.file, self.records, self.dtype, self.adapters, changed)

    def __reduce__(self) -> tuple:
        changed = {name: weight.without_file(partial(self.stored, name)) for name, weight in self.changed.items()}
        return Weights, (None, {}, self.dtype, self.adapters, changed)

    def stored(self, name: str) -> Tensor | None:
        """A parameter as it is in the file; None if it isn't."""
        if name not in self.records:
            return None
        stored = read_tensor(self.file, self.records[name])
        if self.records[name].storage.deflated is not None:
            self.file.release(self.records[name])
        return stored

    def address(self, name: str) -> int | None:
        """Where the bytes of a parameter are in memory as they are in the file; None if they cannot be used there."""
        record = self.records.get(name)
        if record is None or self.file.span(record) is None or record.nbytes != record.storage.nbytes:
            return None
        return as_tensor(self.file, record).data_ptr()

    def release(self, name: str) -> None:
        """Give the memory of these bytes back: changes of them are lost."""
        if name in self.records:
            self.file.release(self.records[name])


def read_parameters(
    file: CheckpointFile,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_tensor: Callable[[int], None] | None = None,
    packers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    resting: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every tensor by our name, checked (checksum, NaN, infinity), in the precision and memory format it is used in.

    The depth network is always float32.

    A tensor is a view of the mapped file, or a copy if its precision or memory format changes.

    packers  for weights that stay as they are in the file: what packs one, see `sd.runtime.cpu.packing`
    resting  networks, and weights, that are only checked and stay as they are in the file
    returns  the tensors, and the packed ones

    Raises CorruptFileError for a wrong checksum, WeightMismatchError for values that are not finite in that precision.
    """
    records, parameters, packed, unusable = checkpoint.tensors, {}, {}, []
    release = release_after_last(file, records.values())

    def read(name: str) -> tuple[Tensor, bool]:
        file.verify(records[name])
        stored = as_tensor(file, records[name])
        wanted = precision_of(name, dtype)
        fits = in_range(stored, wanted)
        if packers and name in packers and stored.dtype in PRECISIONS.values():
            packed[name] = packers[name](stored)
            release(records[name])
            return stored, fits
        rests = name in resting or name.partition(".")[0] in resting
        used = stored if rests else laid_out(stored, device, wanted)
        if rests or used.data_ptr() != stored.data_ptr():
            release(records[name])
        return used, fits

    # Large tensors first: temporary copies are then smallest when most of the weights are in memory.
    order = sorted(records, key=lambda name: -records[name].nbytes)
    # The work is memory traffic and checksums, both outside the interpreter's lock.
    with one_thread_each(min(8, os.cpu_count() or 1)) as pool:
        for name, (parameter, fits) in zip(order, pool.map(read, order), strict=True):
            parameters[name] = parameter
            if not fits:
                unusable.append(checkpoint.stored_names[name])
            if on_tensor:
                on_tensor(records[name].nbytes)
    if unusable:
        raise out_of_range(sorted(unusable), precision_name(dtype))
    return parameters, packed


def precision_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The precision of a network, or of one of its weights, in a model of that precision."""
    return torch.float32 if name.startswith(PRECISE) else dtype


def laid_out(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A weight as a network holds it; itself if it is so already."""
    layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format  # as convolutions read fastest
    return weight.to(device, dtype, memory_format=layout).contiguous(memory_format=layout)


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which PyTorch starts no threads of its own, of which there would otherwise be workers squared.

    One load at a time, since PyTorch's number of threads is global for threads that start to use it meanwhile.
    """
    with ONE_LOAD:
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                try:
                    yield pool
                except BaseException:
                    pool.shutdown(cancel_futures=True)  # what has not begun is dropped
                    raise
        finally:
            torch.set_num_threads(threads)  # the number for this thread, and for those that start later
