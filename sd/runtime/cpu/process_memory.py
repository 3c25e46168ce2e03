"""The memory of this process, as Linux and its C library have it; on other systems, all stays as it is."""

import ctypes
import functools
import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8  # as malloc.h of the GNU C library numbers them
ONE_STORE = {ARENA_MAX: 1}
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, to use it again; returns whether its C library can do that.

    Large arrays otherwise go back to the system with every layer, and each new one is cleared by it, page by page. The
    price is that the memory of a process never shrinks, and has some gaps. To be called before threads are started, as
    all of them are to use what one of them has freed.
    """
    # nothing is trimmed, nothing mapped by itself
    return set_up({TRIM_THRESHOLD: -1, TOP_PAD: 2**28, MMAP_MAX: 0} | ONE_STORE)


def share_memory() -> None:
    """Have threads that start later use the same store of memory as all others, where the C library can do that.

    One that a thread has begun for itself would be used by others, too, in place of what the first one keeps.
    """
    set_up(ONE_STORE)


def set_up(settings: Mapping[int, int]) -> bool:
    mallopt = c_function("mallopt")
    return mallopt is not None and all(mallopt(option, value) for option, value in settings.items())


@functools.cache
def c_function(name: str) -> Callable | None:
    """A function of the C library, on Linux. Looking for one waits until no other library is being mapped."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def give_back_freed_memory() -> None:
    """Give memory that this process has freed and kept back to the system, where its C library can do that."""
    trim = c_function("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def importing_torch() -> Iterator[None]:
    """As long as it lasts, Python does not look for garbage, and later never in what is there now.

    Of the objects that the import makes, none is garbage, and a look at all of them takes a tenth of a second. Who
    interrupts is heard at the end: PyTorch drops what is raised while it imports NumPy.
    """
    if "torch" in sys.modules:
        yield
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        with interrupted_later():
            yield
    finally:
        if collecting:
            gc.freeze()
            gc.enable()


@contextmanager
def interrupted_later() -> Iterator[None]:
    """A signal that Python answers with KeyboardInterrupt does so at the end."""
    in_main = threading.current_thread() is threading.main_thread()  # where alone signals can be set
    numbers = [number for number in ENDING if in_main and signal.getsignal(number) is signal.default_int_handler]
    heard = []
    try:
        for number in numbers:
            signal.signal(number, lambda number, _: heard.append(number))
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)
    if heard:
        raise KeyboardInterrupt
