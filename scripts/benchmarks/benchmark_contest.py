"""Compare and measure the contenders of `benchmark.py`, in turn."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import benchmark_report as reports
import numpy as np
from benchmark_comparing import Case, apart, check_latents, psnr, table
from benchmark_contender import FEW, Options, Way
from benchmark_process import ContenderFailed, Process
from benchmark_report import ONCE, Peak, Report
from benchmark_workers import CONTENDERS

from sd.runtime.device import pick_device
from sd.study.benchmark.hardware import hardware


class Contest:
    """Contenders that take turns. One that fails is left out from then on; the report says why."""

    def __init__(self, names: Sequence[str], options: Options, report: Report):
        self.names, self.options, self.report = list(names), options, report
        self.processes: dict[str, Process] = {}
        self.pictures: dict[tuple[Way, Case], np.ndarray] = {}  # in float32

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

    def references(self, cases: Sequence[Case], steps: Mapping[str, int]) -> None:
        """Pictures in float32, for `measure` to compare with; one process at a time, before the others start."""
        for way in dict.fromkeys(CONTENDERS[name].way for name in self.names):
            process = Process(way.reference, replace(self.options, precision="fp32"))
            try:
                process.ask("imports")
                process.ask("load")
                for case in cases:
                    process.ask("prepare", **case.request())
                    count = next(steps[name] for name in self.names if CONTENDERS[name].way is way)
                    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
                        process.ask("picture", path=file.name, steps=count)
                        self.pictures[way, case] = np.load(file.name)
            except ContenderFailed as failure:
                sys.exit(f"{way.reference} in fp32, the reference for pictures, failed: {failure}")
            finally:
                process.close()

    def measure(self, case: Case, steps: Mapping[str, int], repeat: int, together: int) -> None:
        """Compare the contenders' results; then time the units of work, in turn. The first round warms up.

        steps     of whole pictures, by contender
        together  steps per request
        """
        self.ask_all("prepare", lambda _: case.request())
        self.compare(case)
        if self.pictures:
            self.compare_pictures(case, steps)
        for process in self.processes.values():
            process.forget_peak()
        found: dict[tuple[str, str], list[float]] = {}
        for turn in range(1 + repeat):
            for what, unit, options in (
                (reports.TEXT, "encode_text", lambda _: {}),
                (reports.STEP, "steps", lambda _: {"count": together}),
                (reports.DECODE, "decode", lambda _: {}),
                (reports.PICTURES, "pictures", lambda name, turn=turn: {"steps": steps[name] if turn else 1}),
            ):
                for name, answer in self.ask_all(unit, options).items():
                    if turn:
                        seconds = answer["seconds"] / (together if what == reports.STEP else 1)
                        found.setdefault((name, what), []).append(seconds)
        for (name, what), seconds in found.items():
            if name in self.names:
                self.report.add(name, table(case, name), what, seconds)
        for name in self.names:
            self.report.steps[table(case, name)] = steps[name]
            self.note_peak(name, table(case, name))

    def whole(self, case: Case, steps: Mapping[str, int], repeat: int) -> None:
        """From the start of a process to a picture, in turn; one process at a time."""
        found: dict[str, list[float]] = {}
        cases = {
            name: f"a new process, {case.width}x{case.height}, {steps[name]} steps{apart(name)}" for name in self.names
        }
        for turn in range(repeat):
            for name in list(self.names):
                process = self.processes[name] = Process(name, self.options)
                try:
                    process.ask("whole", width=case.width, height=case.height, steps=steps[name])
                except ContenderFailed as failure:
                    self.leave_out(name, failure)
                    continue
                found.setdefault(name, []).append(process.age)
                if turn == repeat - 1:
                    self.note_peak(name, cases[name])
                self.processes.pop(name).close()
        for name in self.names:
            self.report.add(name, cases[name], reports.WHOLE, found[name])

    def ask_all(self, unit: str, options: Callable[[str], Mapping[str, object]]) -> dict[str, dict]:
        """Ask all in turn; returns their answers by name.

        options  of a contender's request, by its name
        """
        answers = {}
        for name in list(self.names):
            try:
                answers[name] = self.processes[name].ask(unit, **options(name))
            except ContenderFailed as failure:
                self.leave_out(name, failure)
        return answers

    def written(self, unit: str, **options: Mapping[str, object]) -> dict[str, np.ndarray]:
        """What the contenders that can be compared write into files.

        options  of the requests, each by contender
        """
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in [name for name in self.names if CONTENDERS[name].is_comparable]:
                path = Path(folder) / f"{name}.npy"
                given = {option: values[name] for option, values in options.items()}
                try:
                    self.processes[name].ask(unit, path=str(path), **given)
                except ContenderFailed as failure:
                    self.leave_out(name, failure)
                    continue
                found[name] = np.load(path)
        return found

    def compare(self, case: Case) -> None:
        """Raises Wrong if latents differ by more than the coarser of both precisions explains."""
        latents = self.written("latents")
        for way in dict.fromkeys(CONTENDERS[name].way for name in latents):
            of_way = {name: each for name, each in latents.items() if CONTENDERS[name].way is way}
            for name, difference in check_latents(of_way, self.report.precisions, str(case)).items():
                self.report.differences.setdefault(table(case, name), {})[name] = difference
                self.report.references[table(case, name)] = next(iter(of_way))

    def compare_pictures(self, case: Case, steps: Mapping[str, int]) -> None:
        """Note how far pictures are from those of float32."""
        for name, pictures in self.written("picture", steps=steps).items():
            reference = self.pictures[CONTENDERS[name].way, case]
            self.report.psnr.setdefault(table(case, name), {})[name] = psnr(pictures, reference)

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


def measure(
    names: Sequence[str], options: Options, args: argparse.Namespace, on_case: Callable[[Report], object]
) -> Report:
    """Start all contenders, then measure each case.

    args     of `benchmark.py`: what to measure, and how often
    on_case  called with the results so far after the cold starts and after each case
    """
    kept = ("steps", "few_steps", "repeat", "starts", "together", "start_at_once", "precision", "threads")
    settings = {name: getattr(args, name) for name in (*kept, "compile_mode")}
    report = Report(machine=hardware(pick_device(options.device)), settings=settings)
    report.precisions = {name: CONTENDERS[name].own_precision or options.precision for name in names}
    contest = Contest(names, options, report)
    few = {name: args.few_steps for name in names if CONTENDERS[name].way is FEW}
    steps = dict.fromkeys(names, args.steps) | few
    try:
        if args.psnr:
            contest.references(args.cases, steps)
        contest.start(args.cases[0], args.starts, at_once=args.start_at_once)
        report.machine["threads"] = report.versions[names[0]]["threads"]
        on_case(report)
        for case in args.cases:
            contest.measure(case, steps, args.repeat, args.together)
            on_case(report)
        if args.whole:
            contest.close()  # one process at a time, with all the memory
            contest.whole(args.cases[0], dict.fromkeys(names, args.whole) | few, args.repeat)
    finally:
        contest.close()
    return report
