"""The memory that a process holds, as Linux reports it."""

import os
import threading
from pathlib import Path

LOOK_EVERY = 0.01  # seconds
OWN_MEMORY = ("RssAnon", "RssShmem")
PROCESSES = Path("/proc")


def memory_is_known() -> bool:
    """Whether this system reports the memory of a process: Linux does."""
    return (PROCESSES / "self" / "status").exists()


def own_memory(pid: int) -> int:
    """Bytes that a process holds now, without pages of mapped files; 0 once it has ended.

    proc(5): RssAnon, RssFile and RssShmem add up to VmRSS, in kB.
    """
    fields = _status(pid)
    return sum(fields.get(name, 0) for name in OWN_MEMORY)


def resident_peak(pid: int) -> int:
    """The most bytes that a process ever had in memory, with pages of mapped files; 0 once it has ended."""
    return _status(pid).get("VmHWM", 0)


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes."""
    try:
        lines = (PROCESSES / str(pid) / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in fields.items() if value.endswith("kB")}


class PeakMemory:
    """Inside the `with` block, a thread looks up every 10 ms how much memory this process holds.

    peak  the most bytes seen, without pages of mapped files; None if the system does not report them
    """

    def __init__(self):
        self.peak: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if memory_is_known():
            self._look()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.peak is not None:
            self._ended.set()
            self._thread.join()
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak or 0, own_memory(os.getpid()))

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_EVERY):
            self._look()


def read_once(path: Path) -> None:
    """Bring a file into the page cache."""
    with open(path, "rb") as file:
        while file.read(16 << 20):
            pass
