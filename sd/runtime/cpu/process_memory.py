"""Memory settings of the GNU C library on Linux; on other systems, nothing changes."""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8  # as malloc.h of the GNU C library numbers them


def give_back_freed_memory() -> None:
    """Return to the system what is free now.

    Before arrays that are much larger than all before: they would not fit into its pieces.
    """
    if trim := sys.platform == "linux" and getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def keep_freed_memory() -> bool:
    """Have this process keep freed memory for reuse; returns whether its C library can do that.

    Otherwise every layer returns its large arrays to the system, which clears each new one page by page. In exchange,
    the memory of the process never shrinks, and is fragmented. Call it before threads start: they then share one arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # nothing is trimmed, nothing mapped by itself, and all threads share one arena
    settings = {TRIM_THRESHOLD: -1, TOP_PAD: 2**28, MMAP_MAX: 0, ARENA_MAX: 1}
    return mallopt is not None and all(mallopt(option, value) for option, value in settings.items())
