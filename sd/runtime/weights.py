"""Read the weights of a checkpoint: several threads check, cast and reorder them."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from convert.checkpoint import Checkpoint
from convert.files.reader import CheckpointFile, release_after_last
from convert.files.tensors import as_tensor, in_range, out_of_range
from sd.pipeline.runner import PRECISIONS, precision_name

ONE_LOAD = threading.Lock()


def read_parameters(
    file: CheckpointFile,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_tensor: Callable[[int], None] | None = None,
    packers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every tensor by our name, checked (checksum, NaN, infinity), in the precision and memory format it is used in.

    A tensor is a view of the mapped file, or a copy if its precision or memory format changes.

    packers  for weights that stay as they are in the file: what packs one in `dtype`, see `sd.runtime.cpu.packing`
    returns  the tensors, and the packed ones

    Raises CorruptFileError for a wrong checksum, WeightMismatchError for values that are not finite in that precision.
    """
    records, parameters, packed, unusable = checkpoint.tensors, {}, {}, []
    release = release_after_last(file, records.values())

    def read(name: str) -> tuple[Tensor, bool]:
        file.verify(records[name])
        stored = as_tensor(file, records[name])
        fits = in_range(stored, dtype)
        if packers and name in packers and stored.dtype in PRECISIONS.values():
            packed[name] = packers[name](stored.to(dtype))
            release(records[name])
            return stored, fits
        layout = torch.channels_last if stored.dim() == 4 else torch.contiguous_format  # as convolutions read fastest
        used = stored.to(device, dtype, memory_format=layout).contiguous(memory_format=layout)
        if used.data_ptr() != stored.data_ptr():
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
