"""A contender of `benchmark.py` seen from outside: a process that is asked for one unit of work at a time."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmark_contender import Options

from sd.study.benchmark.process import LOOK_EVERY, memory_is_known, own_memory, resident_peak

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).with_name("benchmark_workers.py")
NO_NETWORK = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class ContenderFailed(Exception):
    """A contender cannot do what it was asked to; the text says why."""


def environment(threads: int | None = None) -> dict[str, str]:
    """For processes that are to import this checkout's code, and go nowhere for anything else.

    They keep Python files that they have compiled, as those of other programs were when these were installed.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    counts = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return {**kept, **NO_NETWORK, **counts, "PYTHONPATH": path}


class Process:
    """A running contender. Between two requests it waits, and uses no processor.

    own_peak  the most bytes that it held for itself during requests since `forget_peak`, looked up every 10 ms; None
              where the system does not tell
    """

    def __init__(self, name: str, options: Options):
        self.name = name
        self.own_peak: int | None = None
        kept = options.logs and Path(options.logs, f"{name}.log")
        self._said = kept.open("w+b") if kept else tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, str(WORKERS), name, json.dumps(asdict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
            env=environment(options.threads),
        )

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self._started

    def ask(self, unit: str, **what: object) -> dict:
        """Have a unit of work done; its answer holds the "seconds". Raises ContenderFailed."""
        try:
            self._process.stdin.write(json.dumps({"unit": unit, **what}).encode() + b"\n")
            while not select.select([self._process.stdout], [], [], LOOK_EVERY)[0]:
                self._look()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        self._look()
        if not line:
            raise ContenderFailed(f"its process ended with exit code {self._process.wait()}{self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderFailed(f"{unit}: {answer['error']}")
        return answer

    def resident_peak(self) -> int | None:
        return resident_peak(self._process.pid) if memory_is_known() else None

    def forget_peak(self) -> None:
        self.own_peak = None

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def _look(self) -> None:
        if memory_is_known():
            self.own_peak = max(self.own_peak or 0, own_memory(self._process.pid))

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""
