"""The weights of a checkpoint: each is checked, cast and laid out as it is used, by several threads.

What another thread has read ahead (`sd.runtime.loading_ahead`) is taken as it is. All else becomes either a view of the
mapped bytes or, where another precision or memory format is wanted, a copy made while the bytes pass by.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convert.checkpoint import Checkpoint
from convert.files.reader import CheckpointFile, release_after_last
from convert.files.tensors import as_tensor, in_range, out_of_range
from sd.runtime.cpu.packing import pack
from sd.runtime.device import memory_format, precision_name
from sd.runtime.loading_ahead import ReadAhead


def read_parameters(
    file: CheckpointFile,
    checkpoint: Checkpoint,
    ahead: ReadAhead,
    device: torch.device,
    dtype: torch.dtype,
    to_pack: Mapping[str, nn.Conv2d] | None = None,
    on_tensor: Callable[[int], None] | None = None,
    *,
    lean: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every tensor by our name, checked (checksum, NaN, infinity), in the precision and memory format it is used in.

    ahead    of these tensors, if by another thread, which ends now
    to_pack  weights that are also packed, see `sd.runtime.cpu.packing`, and the convolutions that they are for
    lean     of packed weights that are in another precision than in the file, where plain ones would take memory of
             their own, there are none: they are on the meta device
    returns  the tensors, and the packed ones, both by our name

    Raises CorruptFileError for a wrong checksum, WeightMismatchError for values that are not finite in that precision.
    """
    records = checkpoint.tensors
    weights = Weights(file, checkpoint, ahead, device, dtype, to_pack or {}, lean=lean)
    parameters, unusable = {}, []
    ahead.stop()
    # What is cast already takes Python's time alone: this thread's, while others work. Of what they do, large tensors
    # come first: what is held beside the finished ones is then smallest when most of them are finished.
    cast = {name for name in records if dtype == torch.bfloat16 and ahead.casts(name)}
    order = sorted(records, key=lambda name: (name not in cast, -records[name].nbytes))
    # Their work is memory traffic and checksums, both outside the interpreter's lock.
    with one_thread_each(min(8, os.cpu_count() or 1)) as pool:
        others = {name: pool.submit(weights.read, name) for name in order if name not in cast}
        for name in order:
            parameters[name], fits = others[name].result() if name in others else weights.read(name)
            if not fits:
                unusable.append(checkpoint.stored_names[name])
            if on_tensor:
                on_tensor(records[name].nbytes)
    if unusable:
        raise out_of_range(sorted(unusable), precision_name(dtype))
    return parameters, weights.packed


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which PyTorch starts none of its own: together these would be the square of what there is room for.

    Not in two threads at a time, since PyTorch has one number for all that begin to use it meanwhile.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what has not begun need not
                raise
    finally:
        torch.set_num_threads(threads)  # the number for this thread, and for those that start later


class Weights:
    """Reads one weight after the other. For arguments see `read_parameters`."""

    def __init__(
        self,
        file: CheckpointFile,
        checkpoint: Checkpoint,
        ahead: ReadAhead,
        device: torch.device,
        dtype: torch.dtype,
        to_pack: Mapping[str, nn.Conv2d],
        *,
        lean: bool,
    ):
        self.file, self.records, self.ahead = file, checkpoint.tensors, ahead
        self.device, self.dtype = device, dtype
        self.to_pack, self.lean = to_pack, lean
        self.packed: dict[str, Tensor] = {}
        self._release = release_after_last(file, self.records.values())
        self._scratch = Scratch()

    def read(self, name: str) -> tuple[Tensor, bool]:
        """A weight as it is used, and whether its values are in range; in `packed` as well, if it is to be."""
        wanted = torch.empty(self.records[name].shape, dtype=self.dtype, device="meta")
        to_pack, in_file = name in self.to_pack, getattr(torch, self.records[name].dtype)
        only_packed = to_pack and self.lean and in_file != self.dtype
        layout = memory_format(wanted, packed=to_pack and not only_packed)
        if layout == torch.channels_last and self.dtype == torch.bfloat16 and self.ahead.turns(name):
            used = self._scratch.like(wanted, layout) if only_packed else new_like(wanted, layout)
            fits, done_with = self.ahead.turn(name, used.data_ptr()).fits(self.dtype), True
            used = used.to(self.device)
        else:
            stored, mapped, fits = self._checked(name)
            if only_packed:
                used = self._scratch.like(wanted, torch.contiguous_format).copy_(stored)
            else:
                used = stored.to(self.device, self.dtype, memory_format=layout).contiguous(memory_format=layout)
            # What was packed is not read again.
            done_with = mapped and (to_pack or used.data_ptr() != stored.data_ptr())
        if to_pack:
            self.packed[name] = pack(self.to_pack[name], used)
        if done_with:
            self._release(self.records[name])
        return wanted if only_packed else used, fits

    def _checked(self, name: str) -> tuple[Tensor, bool, bool]:
        """A tensor, whether it lies in the file's own bytes, and whether its values are in range."""
        record, seen = self.records[name], self.ahead.take(name)
        if seen is None:
            self.file.verify(record)
            tensor = as_tensor(self.file, record)
            return tensor, True, in_range(tensor, self.dtype)
        if seen.values is not None and self.dtype == torch.bfloat16:
            return torch.frombuffer(seen.values, dtype=self.dtype).reshape(record.shape), False, seen.fits(self.dtype)
        return as_tensor(self.file, record), True, seen.fits(self.dtype)


def new_like(wanted: Tensor, layout: torch.memory_format) -> Tensor:
    """Room on the CPU for a tensor of that dtype and shape."""
    return torch.empty_like(wanted, device="cpu", memory_format=layout)


class Scratch(threading.local):
    """Memory of each thread for one tensor at a time: new memory costs more time than a copy of what it is for."""

    def __init__(self):
        self.memory = torch.empty(0)

    def like(self, wanted: Tensor, layout: torch.memory_format) -> Tensor:
        """As `new_like`, until the next."""
        if self.memory.numel() < wanted.numel():
            self.memory = torch.empty(wanted.numel(), dtype=wanted.dtype)
        return self.memory.as_strided(wanted.shape, torch.empty_like(wanted, memory_format=layout).stride())
