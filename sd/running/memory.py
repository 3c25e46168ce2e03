"""The memory of this process, as Linux and its C library have it; on other systems, all stays as it is."""

import ctypes
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8  # as malloc.h of the GNU C library numbers them
ONE_STORE = {ARENA_MAX: 1}


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

    Of the objects that the import makes, none is garbage, and a look at all of them takes a tenth of a second.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
