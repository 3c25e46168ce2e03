"""Measure what it costs to inspect and to convert the largest file there is: time beside `cp`, and memory.

    python scripts/checks/prove_conversion.py                # makes the file: SD v1 with averaged weights, fp32, 7.7 GB
    python scripts/checks/prove_conversion.py v1-5-pruned.ckpt --folder /mnt/disk --json

Every command is a process of its own; the file is in the page cache before. `convert` and `cp` take turns, `cp` copying
what `convert` has just written and bringing it to the disk, as `convert` does. No conversion finds a sha256 of before:
reading all 7.7 GB for it takes longer than copying the 4.3 GB that are the model, so the goal is for `--no-hash`.

Memory is the largest RssAnon + RssShmem in /proc/PID/status, looked up every 10 ms. The largest resident set (VmHWM)
would count the pages of the mapped file, too, which the kernel lends while it has no other use for them.

Needs Linux, 9 GB of memory to make the file, and 24 GB of disk. The exit code is 1 if a goal is missed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sd.study.benchmark.memory import LOOK_EVERY, memory_is_known, own_memory, read_once

ROOT = Path(__file__).resolve().parents[2]
MAKING_SPACE = 8e9  # bytes of disk for the file that is made


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A process that has ended."""

    seconds: float
    peak: int  # bytes of memory of its own


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of the result, and what is wanted of it."""

    what: str
    value: float
    unit: str  # "s", "MB", "of cp's speed"
    at_most: float | None = None
    at_least: float | None = None

    @property
    def is_met(self) -> bool | None:
        """None where nothing is wanted."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least


def watched(command: list[str], cache: Path) -> Finished:
    """Run a command to its end. Raises SystemExit with what it said if it fails.

    cache  the folder where it may remember hashes
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        peak = 0
        while process.poll() is None:
            peak = max(peak, own_memory(process.pid))
            time.sleep(LOOK_EVERY)
        seconds = time.monotonic() - started
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{said.read().decode(errors='replace')}")
    return Finished(seconds=seconds, peak=peak)


def copied(source: Path, target: Path) -> tuple[float, float]:
    """Seconds that `cp` takes, and until the copy is on the disk."""
    started = time.monotonic()
    subprocess.run(["cp", "--reflink=never", str(source), str(target)], check=True)  # a copy, not one more reference
    written = time.monotonic() - started
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    synced = time.monotonic() - started
    target.unlink()
    return written, synced


def measure(source: Path, folder: Path, runs: int) -> list[Row]:
    """Inspect and convert a file a few times, beside `cp`; what is written is removed again."""
    ours, copy = folder / "converted.safetensors", folder / "copied.safetensors"
    found: dict[str, list[Finished]] = {"inspect": [], "convert": [], "convert --no-hash": [], "convert to fp16": []}
    copies = []
    read_once(source)
    cache = folder / "cache"

    def run(name: str, *command: str | Path) -> None:
        remembered = cache / str(len(copies))  # nothing in it yet
        found[name].append(watched([sys.executable, "-m", "sd", *map(str, command)], remembered))

    try:
        for _ in range(runs):
            run("inspect", "inspect", source)
        for _ in range(runs):
            for name, flags in (("convert --no-hash", ["--no-hash"]), ("convert", [])):
                run(name, "convert", source, ours, "--to", "sd-zoo", "-q", *flags)
                size = ours.stat().st_size
                copies.append(copied(ours, copy))
                ours.unlink()  # so that its pages do not push the source's out of the page cache
        run("convert to fp16", "convert", source, ours, "--to", "sd-zoo", "--precision", "fp16", "-q")
    finally:
        for path in (ours, copy):
            path.unlink(missing_ok=True)
    return table(source.stat().st_size, size, found, copies)


def table(
    source_size: int, size: int, found: dict[str, list[Finished]], copies: list[tuple[float, float]]
) -> list[Row]:
    """Medians, ratios and goals. `cp` and `convert` write the same bytes, so their times compare as their speeds."""
    seconds = {name: statistics.median(run.seconds for run in runs) for name, runs in found.items()}
    peaks = {name: max(run.peak for run in runs) / 1e6 for name, runs in found.items()}
    plain, synced = (statistics.median(times) for times in zip(*copies, strict=True))
    converting, without, speed = seconds["convert"], seconds["convert --no-hash"], "of cp's speed"
    return [
        Row(what="file", value=source_size / 1e6, unit="MB"),
        Row(what="written by convert, and by cp", value=size / 1e6, unit="MB"),
        Row(what="inspect", value=seconds["inspect"], unit="s", at_most=0.5),
        Row(what="cp", value=plain, unit="s"),
        Row(what="cp and fsync", value=synced, unit="s"),
        Row(what="convert", value=converting, unit="s"),
        Row(what="convert --no-hash", value=without, unit="s"),
        Row(what="convert beside cp and fsync", value=synced / converting, unit=speed),
        Row(what="convert --no-hash beside cp and fsync", value=synced / without, unit=speed, at_least=0.8),
        Row(what="convert beside cp alone", value=plain / converting, unit=speed),
        Row(what="memory of convert", value=max(peaks["convert"], peaks["convert --no-hash"]), unit="MB", at_most=300),
        Row(what="memory of convert to fp16", value=peaks["convert to fp16"], unit="MB", at_most=1000),
    ]


def shown(rows: list[Row]) -> str:
    """The table as text."""
    lines = []
    for row in rows:
        wanted = f"at most {row.at_most:g}" if row.at_most is not None else ""
        wanted = f"at least {row.at_least:g}" if row.at_least is not None else wanted
        verdict = {True: "met", False: "MISSED", None: ""}[row.is_met]
        lines.append(f"{row.what:<42}{row.value:>10.2f} {row.unit:<15}{wanted:<14}{verdict}".rstrip())
    return "\n".join(lines)


def make_file(path: Path, size: str) -> None:
    """The layout of v1-5-pruned.ckpt, with made-up weights, by a process whose memory goes with it."""
    script = ROOT / "scripts" / "benchmarks" / "make_checkpoint.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(script), str(path), "--ema", "--size", size]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint (default: one is made, and removed)")
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="of the one made (default: full)")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write to (default: here)")
    parser.add_argument("--runs", type=int, default=3, help="of each command (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    if not memory_is_known():
        parser.error("memory is read from /proc, which only Linux has")
    if args.runs < 1:
        parser.error(f"--runs must be at least 1, got {args.runs}")
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder. Make it first.")
    if args.model and not args.model.is_file():
        parser.error(f"{args.model} is not a file")
    size = args.model.stat().st_size if args.model else MAKING_SPACE if args.size == "full" else 2e8
    needed, free = 3 * size, shutil.disk_usage(args.folder).free
    if free < needed:
        parser.error(f"{args.folder.resolve()} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed")
    with tempfile.TemporaryDirectory(prefix="proof-", dir=args.folder.resolve()) as folder:
        model = args.model.resolve() if args.model else Path(folder) / "made-up.ckpt"
        if not args.model:
            make_file(model, args.size)
        rows = measure(model, Path(folder), args.runs)
    print(json.dumps([{**asdict(row), "is_met": row.is_met} for row in rows]) if args.json else shown(rows))
    sys.exit(1 if any(row.is_met is False for row in rows) else 0)


if __name__ == "__main__":
    main()
