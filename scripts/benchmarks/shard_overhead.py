#!/usr/bin/env python3
"""What a run in shards adds to making its pictures, with the embedded model.

    python scripts/benchmarks/shard_overhead.py --pictures 200 --shard-size 50 --workers 1,2 --engine ray

For each number of workers: pictures a second, and what a shard takes beside its pictures (planning, encoding, writing,
hashing), for each picture. Then what a driver does for a line of prompts, and for a shard.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sd.app.cli import txt2img
from sd.app.cli.shard_flags import shard_request_of
from sd.app.jobs.request import Events
from sd.app.shards.facts import facts_of, stats_of
from sd.app.shards.maker import Maker
from sd.app.shards.store import Folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--shard-size", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", default="1,2", help="(default: %(default)s)")
    parser.add_argument("--engine", choices=["processes", "ray"], default="processes")
    parser.add_argument("--lines", type=int, default=20_000, help="of the file that a driver reads")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prompts = folder / "prompts.txt"
        prompts.write_text("".join(f"a red circle {i}\n" for i in range(args.pictures)))
        flags = ["txt2img", "--from-file", str(prompts), "-s", "1", "--steps", str(args.steps), "-q"]
        flags += ["--shard-size", str(args.shard_size)]
        print("workers  seconds  pictures/s  ms a picture  ms beside it")
        for workers in map(int, args.workers.split(",")):
            print(f"{workers:7}  {measured(folder / str(workers), flags, workers, args.engine)}")
        many = folder / "many.txt"
        many.write_text("".join(f"a red circle {i}\n" for i in range(args.lines)))
        driver_times(many, args.lines)


def measured(out: Path, flags: list[str], workers: int, engine: str) -> str:
    """One run, timed by its shards: loading and the start of processes do not count."""
    command = [sys.executable, "-m", "sd", *flags, "-o", str(out)]
    if engine == "ray":
        runs = [subprocess.Popen([*command, "--engine", "ray", "--workers", str(workers)], stdout=subprocess.DEVNULL)]
    else:
        runs = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(workers)]
    assert [run.wait() for run in runs] == [0] * len(runs)
    stats = [json.loads(path.read_text()) for path in out.glob("*_stats.json")]
    pictures, seconds = sum(each["pictures"] for each in stats), sum(each["seconds"] for each in stats)
    making = sum(sum(each["ms"].values()) for each in stats)
    rate = pictures / seconds * workers
    return f"{seconds:7.1f}  {rate:10.2f}  {making / pictures:12.1f}  {(1000 * seconds - making) / pictures:12.2f}"


def driver_times(prompts: Path, lines: int) -> None:
    args = txt2img.parser().parse_args(["--from-file", str(prompts), "-s", "1", "-o", "out", "--shard-size", "1000"])
    args.parser, args.made_with = txt2img.parser(), {}
    request = shard_request_of(args, "text to picture")
    with Maker(request.job, Events()) as maker:
        start = time.perf_counter()
        facts = facts_of(request, maker.device, maker.precision)
        read = time.perf_counter()
        for number, shard in request.shards():
            maker.plan(shard, number * request.size)
        planned = time.perf_counter()
        for number in range(facts["shards"]):
            stats_of(Folder(prompts.parent), facts, number)
        looked = time.perf_counter()
    print(f"reading a line {(read - start) / lines * 1e6:.1f} us, checking it {(planned - read) / lines * 1e6:.1f} us")
    print(f"looking for a shard {(looked - planned) / facts['shards'] * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
