"""Mapped files that another program makes shorter while they are read.

Reading a byte that is gone raises a signal (SIGBUS), which ends a process without a word. While `shrinking_watched` is
in force, the lost file reads as zeros from then on, and the main thread gets a `FileShortenedError` as soon as it runs
Python again: before it can use the zeros, and with everything cleaned up that an interrupt cleans up. An import is
finished first: whoever needs half a module on the way out would fail with an error of its own.

The handler is Python, called by way of ctypes in the thread that read the byte. That is sound here, unlike for signals
that come at any time: the thread was copying the file's bytes, not allocating, and its instruction is repeated after.
"""

import _thread
import ctypes
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ANYWHERE_ELSE = b"sd: a file changed while it was read, or its disk or network failed.\n"
EXIT_CODE = 2  # of bad input
MAP_FIXED = 0x10
IMPORTING = "<frozen importlib._bootstrap>"  # the file that a frame of an unfinished import names


class FileShortenedError(BaseException):
    """A file became shorter while it was read. No handler of ordinary errors may go on after it."""


@contextmanager
def shrinking_watched() -> Iterator[None]:
    """Inside the block, raise FileShortenedError in the main thread when a mapped file has lost bytes that are read."""
    if not hasattr(signal, "SIGBUS") or threading.current_thread() is not threading.main_thread():
        yield
        return
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_longlong]
    names: list[str] = []
    is_told = threading.Event()

    def fill_with_zeros(_: int) -> None:
        from convert.files.reader import MAPPED, is_shorter  # imported by whoever has mapped a file

        lost = [mapping for mapping in MAPPED if is_shorter(mapping)]
        filled = bool(lost)
        for mapping in lost:
            place = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
            filled &= libc.mmap(place, len(mapping), access, kind, -1, 0) == place
        if not filled:  # or the instruction would be repeated for ever
            os.write(2, ANYWHERE_ELSE)
            os._exit(EXIT_CODE)
        if not names:
            names.extend(MAPPED[mapping] for mapping in lost)
            _thread.start_new_thread(tell_main_thread, ())

    def tell_main_thread() -> None:
        while not is_told.is_set():
            _thread.interrupt_main(signal.SIGBUS)
            is_told.wait(0.001)

    def error() -> FileShortenedError:
        return FileShortenedError(f"{names[0]} became shorter while it was read. Try again when it is whole.")

    def give_up(number: int, frame: FrameType | None) -> None:
        while frame and not (
            frame.f_code is fill_with_zeros.__code__  # an error in there would reach nobody
            or frame.f_code.co_filename == IMPORTING
        ):
            frame = frame.f_back
        if not frame and not is_told.is_set():
            is_told.set()
            raise error()

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(fill_with_zeros)
    outer = libc.signal(signal.SIGBUS, None)  # not Python's, perhaps
    python_s = signal.signal(signal.SIGBUS, give_up)
    libc.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
        if names and not is_told.is_set():
            raise error()
    except Exception as other:
        if names:  # the zeros are what is wrong
            raise error() from other
        raise
    finally:
        is_told.set()
        signal.signal(signal.SIGBUS, python_s or signal.SIG_DFL)
        libc.signal(signal.SIGBUS, outer)
