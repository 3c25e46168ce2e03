"""How threads wait for each other: awake, which is fast on an idle machine, or asleep, which is fair on a busy one.

OpenMP, which PyTorch uses, lets the threads of a layer spin until all are done. Where several programs share the
processors, a thread spins while the one that it waits for does not run: eight processes on two processors take ten
times as long as with a thread each.
"""

import os
import sys
from pathlib import Path

RUN_AND_WAITED = Path("/proc/self/schedstat")  # nanoseconds on a processor, and ready but without one
BUSY = 0.5  # waited longer than this share of the time on a processor: others share the processors
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # in the environment: the user has decided


def sleep_where_busy() -> bool:
    """Have threads wait asleep if this process had to wait for a processor so far; returns whether they do.

    Call it before PyTorch is imported, which reads the environment variable that it sets. For a command, not for a
    library: the environment belongs to the program.
    """
    if "torch" in sys.modules or any(name in os.environ for name in CHOSEN):
        return False
    try:
        run, waited = map(int, RUN_AND_WAITED.read_text().split()[:2])
    except (OSError, ValueError):  # not Linux, or one that does not count
        return False
    if waited <= BUSY * run:
        return False
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return True
