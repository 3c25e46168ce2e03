"""The memory of this process, as Linux and its C library have it; on other systems, all stays as it is."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, to use it again; returns whether its C library can do that.

    Large arrays otherwise go back to the system with every layer, and each new one is cleared by it, page by page. The
    price is that the memory of a process never shrinks, and has some gaps. To be called before threads are started, as
    all of them are to use what one of them has freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # as malloc.h of the GNU C library numbers them
    # nothing is trimmed, nothing mapped by itself, and there is one store for all threads
    settings = {trim_threshold: -1, top_pad: 2**28, mmap_max: 0, arena_max: 1}
    return all(mallopt(option, value) for option, value in settings.items())


def give_back_freed_memory() -> None:
    """Give memory that this process has freed and kept back to the system, where its C library can do that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
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
