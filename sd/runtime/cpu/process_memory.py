"""The memory of this process, as Linux and its C library have it; on other systems, nothing changes."""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8  # as malloc.h of the GNU C library numbers them


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, to use it again; returns whether its C library can do that.

    Large arrays otherwise go back to the system with every layer, and each new one is cleared by it, page by page. The
    price is that the memory of a process never shrinks, and has some gaps. To be called before threads are started, as
    all of them are to use what one of them has freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # nothing is trimmed, nothing mapped by itself, and all threads share one arena
    settings = {TRIM_THRESHOLD: -1, TOP_PAD: 2**28, MMAP_MAX: 0, ARENA_MAX: 1}
    return mallopt is not None and all(mallopt(option, value) for option, value in settings.items())
