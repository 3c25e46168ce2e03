"""Compare and measure the contenders of `benchmark.py`, in turn."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import benchmark_report as reports
import numpy as np
from benchmark_contender import Options
from benchmark_process import ContenderFailed, Process
from benchmark_report import ONCE, Peak, Report
from benchmark_workers import CONTENDERS

from sd.runtime.device import pick_device
from sd.study.benchmark.hardware import hardware

# Largest relative difference of latents after two guided steps. Guidance multiplies rounding errors by about its scale;
# the unit roundoffs are 6e-8, 5e-4 and 4e-3.
BOUNDS = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 2e-1}


@dataclass(frozen=True, kw_only=True)
class Case:
    width: int
    height: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, batch {self.batch_size}"

    def request(self) -> dict[str, int]:
        return {"width": self.width, "height": self.height, "batch_size": self.batch_size}


class Wrong(Exception):
    """The contenders compute different results."""


class Contest:
    """Contenders that take turns. One that fails is left out from then on; the report says why."""

    def __init__(self, names: Sequence[str], options: Options, report: Report):
        self.names, self.options, self.report = list(names), options, report
        self.processes: dict[str, Process] = {}

    def start(self, first: Case, repeat: int, *, at_once: bool) -> None:
        """Cold starts, in turn or all at once; the processes of the last round stay."""
        found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in self.names}

        def cold_start(name: str) -> ContenderFailed | None:
            process = self.processes[name] = Process(name, self.options)
            try:
                process.ask("imports")
                load = process.ask("load")["seconds"]
                process.ask("prepare", **first.request())
                process.ask("steps", count=1)
                found[name][0].append(process.age)
                found[name][1].append(load)
                self.report.versions[name] = process.ask("versions")
                del self.report.versions[name]["seconds"]
            except ContenderFailed as failure:
                return failure
            return None

        with ThreadPoolExecutor(max_workers=len(self.names) if at_once else 1) as starting:
            for turn in range(repeat):
                names = list(self.names)
                for name, failure in zip(names, list(starting.map(cold_start, names)), strict=True):
                    if failure:
                        self.leave_out(name, failure)
                    elif turn < repeat - 1:
                        self.processes.pop(name).close()
                    else:
                        self.note_peak(name, ONCE)
        for name in self.names:
            for what, seconds in zip((reports.COLD, reports.LOAD), found[name], strict=True):
                self.report.add(name, ONCE, what, seconds)

    def measure(self, case: Case, steps: int, repeat: int, together: int) -> None:
        """Compare the contenders' results; then time the units of work, in turn. The first round warms up.

        together  steps per request
        """
        self.ask_all("prepare", **case.request())
        self.compare(case)
        for process in self.processes.values():
            process.forget_peak()
        found: dict[tuple[str, str], list[float]] = {}
        for turn in range(1 + repeat):
            for what, unit, options in (
                (reports.TEXT, "encode_text", {}),
                (reports.STEP, "steps", {"count": together}),
                (reports.DECODE, "decode", {}),
                (reports.PICTURES, "pictures", {"steps": steps if turn else 1}),
            ):
                for name, answer in self.ask_all(unit, **options).items():
                    if turn:
                        seconds = answer["seconds"] / (together if what == reports.STEP else 1)
                        found.setdefault((name, what), []).append(seconds)
        for (name, what), seconds in found.items():
            if name in self.names:
                self.report.add(name, str(case), what, seconds)
        for name in self.names:
            self.note_peak(name, str(case))

    def whole(self, case: Case, steps: int, repeat: int) -> None:
        """From the start of a process to a picture, in turn; one process at a time."""
        found: dict[str, list[float]] = {}
        name_of_case = f"a new process, {case.width}x{case.height}, {steps} steps"
        for turn in range(repeat):
            for name in list(self.names):
                process = self.processes[name] = Process(name, self.options)
                try:
                    process.ask("whole", width=case.width, height=case.height, steps=steps)
                except ContenderFailed as failure:
                    self.leave_out(name, failure)
                    continue
                found.setdefault(name, []).append(process.age)
                if turn == repeat - 1:
                    self.note_peak(name, name_of_case)
                self.processes.pop(name).close()
        for name in self.names:
            self.report.add(name, name_of_case, reports.WHOLE, found[name])

    def ask_all(self, unit: str, **options: object) -> dict[str, dict]:
        """Ask all in turn; returns their answers by name."""
        answers = {}
        for name in list(self.names):
            try:
                answers[name] = self.processes[name].ask(unit, **options)
            except ContenderFailed as failure:
                self.leave_out(name, failure)
        return answers

    def compare(self, case: Case) -> None:
        """Raises Wrong if latents differ by more than the coarser of both precisions explains."""
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder) / f"{name}.npy" for name in self.names}
            for name, path in paths.items():
                try:
                    self.processes[name].ask("latents", path=str(path))
                except ContenderFailed as failure:
                    self.leave_out(name, failure)
            latents = {name: np.load(paths[name]) for name in self.names}
        self.report.differences[str(case)] = check_latents(latents, self.report.precisions, str(case))

    def note_peak(self, name: str, case: str) -> None:
        process = self.processes[name]
        peak = Peak(contender=name, case=case, own=process.own_peak, resident=process.resident_peak())
        self.report.peaks.append(peak)

    def leave_out(self, name: str, failure: ContenderFailed) -> None:
        """Raises SystemExit for the first contender, since the others are compared with it."""
        if name == self.names[0]:
            sys.exit(f"{name}, the reference for the others, failed: {failure}")
        self.names.remove(name)
        self.processes.pop(name).close()
        self.report.left_out[name] = str(failure)

    def close(self) -> None:
        for process in self.processes.values():
            process.close()
        self.processes.clear()


def check_latents(latents: dict[str, np.ndarray], precisions: dict[str, str], case: str) -> dict[str, float]:
    """Relative difference of each from the first, |a - b| / |b|. Raises Wrong if one exceeds its bound."""
    first, *others = latents
    b = latents[first].astype(np.float64)
    differences = {name: float(np.linalg.norm(latents[name] - b) / np.linalg.norm(b)) for name in others}
    bounds = {name: max(BOUNDS[precisions[name]], BOUNDS[precisions[first]]) for name in others}
    if not all(differences[name] <= bounds[name] for name in others):  # also for nan
        listed = "\n".join(f"  {name}: {differences[name]:.1e}, at most {bounds[name]:.0e}" for name in others)
        raise Wrong(f"{case}: the contenders compute different results, so there is no comparison. Latents after the"
                    f" same two steps differ from those of {first} by\n{listed}")  # fmt: skip
    return differences


def measure(
    names: Sequence[str], options: Options, args: argparse.Namespace, on_case: Callable[[Report], object]
) -> Report:
    """Start all contenders, then measure each case.

    args     of `benchmark.py`: what to measure, and how often
    on_case  called with the results so far after the cold starts and after each case
    """
    kept = ("steps", "repeat", "starts", "together", "start_at_once", "precision", "threads", "compile_mode")
    settings = {name: getattr(args, name) for name in kept}
    report = Report(machine=hardware(pick_device(options.device)), settings=settings)
    report.precisions = {name: CONTENDERS[name].own_precision or options.precision for name in names}
    contest = Contest(names, options, report)
    try:
        contest.start(args.cases[0], args.starts, at_once=args.start_at_once)
        report.machine["threads"] = report.versions[names[0]]["threads"]
        on_case(report)
        for case in args.cases:
            contest.measure(case, args.steps, args.repeat, args.together)
            on_case(report)
        if args.whole:
            contest.close()  # one process at a time, with all the memory
            contest.whole(args.cases[0], args.whole, args.repeat)
    finally:
        contest.close()
    return report
