"""Weights of a large checkpoint are read while PyTorch is imported: checked, and in bf16 where that is wanted.

The import takes one core a second. Meanwhile, a thread in C++ of ours, which Python does not hold up, goes through the
weights once: checksum, largest number, and the same numbers in bf16. `sd.runtime.loading` takes what is there and has
the rest done by its own threads. `sd/runtime/cpu/reading.cpp` is for processors with AVX-512; on others, a thread
checks the checksums.

A thread that no Python stops must not depend on what Python may take away: it reads from descriptors of its own, which
outlive the file that was opened, and writes to memory that its `ReadAhead` holds.
"""

import atexit
import ctypes
import importlib.util
import mmap
import os
import signal
import struct
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from convert.errors import CorruptFileError
from convert.files.reader import CheckpointFile, checksums_ahead
from convert.files.records import TensorRecord
from sd.runtime.cpu.native import ADDRESS, AVX512, PAIRS, Kernel, compiler, cpu_flags
from sd.runtime.cpu.process_memory import ENDING, c_function, keep_freed_memory, share_memory

if TYPE_CHECKING:
    import torch

NEEDED = AVX512 | {"vpclmulqdq"}
LARGE = 2**26  # bytes of weights; with fewer, a thread is not worth its start
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
ALIGNED = 64  # bytes: as PyTorch's own memory
GPUS = Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg")  # of NVIDIA, of AMD, of either in Windows' Linux
WAITING, IN_WORK, DONE, FAILED = range(4)  # what becomes of a job


class Job(ctypes.Structure):
    """One tensor; the struct of `reading.cpp`."""

    _fields_ = (
        ("target", ctypes.c_void_p),
        ("offset", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("file", ctypes.c_int32),
        ("half", ctypes.c_int32),
        ("crc", ctypes.c_uint32),
        ("largest", ctypes.c_uint32),
        ("state", ctypes.c_int32),
    )


KERNEL = Kernel(
    "reading",
    features=lambda: NEEDED,
    functions=lambda: {
        "sd_read_all": ([ADDRESS, ctypes.c_int64, ADDRESS], None),
        "sd_read_one": ([ADDRESS], None),
        "sd_take_memory": ([ctypes.c_int64, ADDRESS], None),
        "sd_turn": ([ADDRESS] * 2 + [ctypes.c_int64] * 3, None),
    },
)


class Seen(NamedTuple):
    """What is known of a tensor whose checksum is right."""

    largest: float  # of its numbers, signs left out: inf or nan where there is one
    values: memoryview | None  # the same numbers in bf16; None: not wanted so, in bf16 already, or of a convolution

    def fits(self, dtype: "torch.dtype") -> bool:
        """Whether all of its numbers are finite, and stay so in that dtype."""
        import torch

        return self.largest <= torch.finfo(dtype).max  # False for NaN, too


class ReadAhead:
    """The tensors of an open file, by the names that are given.

    bf16   whether those in float32 and float16 are wanted in bf16. Weights of convolutions, which will not lie as they
           do in the file, then wait until somebody has a place for them
    spare  bytes of memory that are also taken from the system, in a process that keeps what it frees
    """

    def __init__(self, file: CheckpointFile, records: Mapping[str, TensorRecord], *, bf16: bool, spare: int = 0):
        self.file, self.spare = file, spare
        large = sum(record.nbytes for record in records.values()) >= LARGE
        suitable = {name: record for name, record in records.items() if is_suitable(file, record)}
        self.records = suitable if large and is_possible() else {}
        self._descriptors: dict[int, int] = {}  # of the file -> of our own
        cast = {name for name, record in self.records.items() if bf16 and record.dtype != "bfloat16"}
        self._waiting = {name for name in cast if len(self.records[name].shape) == 4}
        order = sorted(self.records, key=lambda name: (name in self._waiting, place_of(self.records[name])))
        self._index = {name: index for index, name in enumerate(order)}
        self._jobs = (Job * len(order))()
        self._stopped = ctypes.c_int32(0)
        self._thread: threading.Thread | None = None
        self._places: dict[str, slice] = {}
        end = 0
        for name in order:
            if name in cast - self._waiting:
                start = -(-end // ALIGNED) * ALIGNED
                end = start + 2 * self.records[name].numel
                self._places[name] = slice(start, end)
        # Nothing is taken from the system before it is written to.
        self._memory = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if end else None
        weakref.finalize(self, close_all, self._descriptors).atexit = False  # the thread may be reading then
        for name, job in zip(order, self._jobs, strict=True):
            self._fill(job, name)

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread = threading.Thread(target=self._read_all, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The thread begins with no further tensor. All can be taken; those that are not done are read then."""
        self._stopped.value = 1
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def close(self) -> None:
        """Nothing can be taken any more, and what was not taken has no memory."""
        self.stop()
        self.records, self._places, self._waiting, self._memory = {}, {}, set(), None

    def take(self, name: str) -> Seen | None:
        """A tensor, read by now; from several threads at a time.

        Returns None where it has to be read in another way. Raises CorruptFileError for a wrong checksum, and where the
        file has been cut off meanwhile.
        """
        code = KERNEL.library() if name in self.records else None
        if code is None:
            return None
        code.sd_read_one(ctypes.byref(self._jobs[self._index[name]]))
        return self._seen(name)

    def turns(self, name: str) -> bool:
        """Whether `turn` can be called."""
        return name in self._waiting and KERNEL.library() is not None

    def turn(self, name: str, target: int) -> Seen:
        """The weight of a convolution (C', C, h, w), written in bf16 to that address, in the order (C', h, w, C).

        To be called once. For errors see `take`.
        """
        outputs, inputs, *window = self.records[name].shape
        job = self._jobs[self._index[name]]
        KERNEL.library().sd_turn(ctypes.byref(job), target, outputs, inputs, prod(window))
        return self._seen(name)

    def casts(self, name: str) -> bool:
        """Whether its values in bf16 can be taken."""
        return name in self._places and KERNEL.library() is not None

    def _seen(self, name: str) -> Seen:
        record, job, place = self.records[name], self._jobs[self._index[name]], self._places.get(name)
        if job.state == FAILED:
            raise CorruptFileError(f"cannot be read to the end of its record {record.storage.key}: it has changed")
        if record.storage.crc not in (None, job.crc):
            self.file.verify(record)  # which tells what is wrong
            raise CorruptFileError(f"has changed while its record {record.storage.key} was read. Try again")
        values = None if place is None else memoryview(self._memory)[place]
        return Seen(number(job.largest, record.dtype), values)

    def _fill(self, job: Job, name: str) -> None:
        record = self.records[name]
        file, job.offset, job.bytes = self.file.span(record)
        if file not in self._descriptors:
            self._descriptors[file] = os.dup(file)
        job.file, job.half = self._descriptors[file], WIDTHS[record.dtype] == 2
        if name in self._places:
            job.target = address(memoryview(self._memory)) + self._places[name].start

    def _read_all(self) -> None:
        code = KERNEL.library()
        if code is not None:
            code.sd_read_all(self._jobs, len(self._jobs) - len(self._waiting), ctypes.byref(self._stopped))
            code.sd_take_memory(self.spare, ctypes.byref(self._stopped))


def close_all(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def map_torch(model: Path | None = None) -> None:
    """Have a thread map the largest of PyTorch's libraries, which takes a fifth of a second, if it is there.

    model  what will be read: the kernel for a large one comes first, as libraries are mapped one after the other

    Not with GPUs' libraries, where there are more of them and PyTorch looks after their order.
    """
    found = importlib.util.find_spec("torch") if sys.platform == "linux" else None
    if found is None or found.origin is None:
        return
    folder = Path(found.origin).with_name("lib")
    others = any((folder / f"libtorch_{kind}.so").exists() for kind in ("cuda", "hip", "xpu"))
    if (folder / "libtorch_cpu.so").exists() and not others:
        share_memory()
        thread = threading.Thread(target=_map, args=[folder / "libtorch_cpu.so", model], daemon=True)
        atexit.register(_wait, thread)
        with suppress(RuntimeError):  # where no further thread can be started
            thread.start()


def _map(library: Path, model: Path | None) -> None:
    with suppress(OSError, ValueError):  # where something is wrong with the path, which is told elsewhere
        if model is not None and model.is_file() and model.stat().st_size >= LARGE and is_possible():
            KERNEL.library(build=False)
    # As a function of the C library, during which Python goes on; if it fails, the import will tell.
    dlopen = c_function("dlopen")
    if dlopen is not None:
        dlopen(os.fsencode(library), os.RTLD_LAZY)


def _wait(thread: threading.Thread) -> None:
    """A process that ends while a library starts up crashes: it goes on for so long, even if told twice to end."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    if thread.is_alive():
        thread.join()


@contextmanager
def read_ahead(
    file: CheckpointFile, records: Mapping[str, TensorRecord], *, device: str, precision: str, low_memory: bool
) -> Iterator[ReadAhead]:
    """As long as it lasts, a thread reads ahead while the caller does other things, without changing the tensors.

    On a CPU and without `low_memory`, this process keeps the memory that it frees from now on.

    device, precision  as `sd.load` has them; how they will be understood is guessed, as PyTorch is not there to tell
    """
    on_cpu = device == "cpu" or (device == "auto" and not any(path.exists() for path in GPUS))
    bf16 = on_cpu and (precision == "bf16" or (precision == "auto" and PAIRS in cpu_flags()))
    spare = 0
    if on_cpu and not low_memory and keep_freed_memory():  # for convolutions in the layout of `sd.runtime.cpu.packing`
        weights = (
            record.numel for name, record in records.items() if name.startswith("unet.") and len(record.shape) == 4
        )
        spare = sum(weights) * (2 if bf16 else 4)
    ahead = ReadAhead(file, records, bf16=bf16, spare=spare)
    if not ahead.records:
        with checksums_ahead(file, records.values()):
            yield ahead
        return
    try:
        with suppress(RuntimeError):  # where no further thread can be started, all is read when it is taken
            ahead.start()
        yield ahead
    finally:
        ahead.close()


def place_of(record: TensorRecord) -> tuple[int, int]:
    """The file, of several, and where in it."""
    return record.storage.file, record.storage.offset + record.offset * WIDTHS[record.dtype]


def is_possible() -> bool:
    """Whether the kernel may be had here."""
    return cpu_flags() >= NEEDED and compiler() is not None


def is_suitable(file: CheckpointFile, record: TensorRecord) -> bool:
    """Whether a tensor lies in the file as numbers one after the other, and its checksum, if any, is of it alone."""
    storage = record.storage
    whole = record.offset == 0 and record.nbytes == storage.nbytes
    plain = record.dtype in WIDTHS and record.numel > 0 and file.span(record) is not None
    return plain and (storage.crc is None or whole)


def address(view: memoryview) -> int:
    """Where bytes lie, for as long as somebody else keeps them there."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def number(bits: int, dtype: str) -> float:
    """A number that is not negative, from its bits."""
    if dtype == "float16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    return struct.unpack("<f", struct.pack("<I", bits << 16 if dtype == "bfloat16" else bits))[0]
