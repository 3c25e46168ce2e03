"""A contender of `benchmark.py` as a process that does one unit of work per request."""

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

from sd.study.benchmark.memory import LOOK_EVERY, memory_is_known, own_memory, resident_peak

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).with_name("benchmark_workers.py")
NO_NETWORK = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class ContenderFailed(Exception):
    """A contender could not do a unit of work; the text says why."""


def environment(threads: int | None = None) -> dict[str, str]:
    """For processes that import this checkout's code and do not use the network.

    They may cache compiled Python files, as those of installed programs are.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    counts = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return {**kept, **NO_NETWORK, **counts, "PYTHONPATH": path}


class Process:
    """A running contender. Between requests it waits without using the CPU.

    own_peak  the most bytes of its own that it held during requests since `forget_peak`, looked up every 10 ms; None if
              the system does not report them
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
        """Seconds since its start."""
        return time.perf_counter() - self._started

    def ask(self, unit: str, **what: object) -> dict:
        """Request a unit of work; the answer holds its "seconds". Raises ContenderFailed."""
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
