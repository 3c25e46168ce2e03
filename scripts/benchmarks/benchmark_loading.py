"""Measure time and memory from the command to the first denoising step.

    python scripts/benchmarks/benchmark_loading.py model.ckpt
    python scripts/benchmarks/benchmark_loading.py model.ckpt --runs 5 --precision bf16
    python scripts/benchmarks/benchmark_loading.py model.ckpt --precision bf16 --diffusers folder

Each run is a new process that executes `sd txt2img`, as a user would, and stops at the first call of the UNet. The
first run does not count: it compiles kernels and brings the file into the page cache. With --diffusers, processes that
load the same weights from a folder in that library's layout, and make a picture with its pipeline, take turns with
sd-zoo; diffusers must be installed. Peak memory is the process's largest resident set, including mapped pages of the
file, as Linux counts it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark_process import environment

ARRIVED = """
import os, sys, time

def arrived(width):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print("", time.time(), int(status["VmHWM"].split()[0]) * 1024, width, file=sys.stderr)
    os._exit(0)
"""

CHILD = f"""{ARRIVED}
from sd.app.cli import main
from sd.app.jobs import model as making

load_model = making.load_model

def load_and_watch(*args):
    from sd.sampling import denoiser  # not earlier: the command decides when to import PyTorch

    denoiser.Denoiser.__call__ = lambda self, *_: arrived(self.given[0].dtype.itemsize)
    return load_model(*args)

making.load_model = load_and_watch
sys.exit(main(sys.argv[1:]))
"""

OTHER = f"""{ARRIVED}
import torch
from diffusers import StableDiffusionPipeline

dtype = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)[sys.argv[2]]
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True, torch_dtype=dtype)
pipe.unet.forward = lambda *_, **__: arrived(dtype.itemsize)
pipe("a horse", num_inference_steps=20)
"""


def first_step(model: Path, precision: str) -> tuple[float, int, int]:
    """Seconds to the first call of the UNet, peak bytes, bytes of one parameter."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--precision", precision, "--out", folder]
        return run([CHILD, "txt2img", "a horse", "-m", str(model), "--seed", "1", "-q", *options])


def run(program: list[str]) -> tuple[float, int, int]:
    """The same for a Python program and its arguments; it prints when it arrived."""
    started = time.time()
    command = [sys.executable, "-c", *program]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr)
    moment, peak, width = result.stderr.split()[-3:]
    return float(moment) - started, int(peak), int(width)


def report(name: str, rows: list[tuple[float, int, int]]) -> float:
    """Print the results; returns the median of the seconds."""
    seconds = [row[0] for row in rows]
    median, peak, width = statistics.median(seconds), max(row[1] for row in rows), rows[0][2]
    print(f"{name} to the first step: {median:.2f} s, median of {len(rows)}; fastest {min(seconds):.2f} s")
    print(f"{name} peak memory:       {peak / 1e9:.2f} GB with {8 * width}-bit parameters")
    return median


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="a checkpoint")
    parser.add_argument("--runs", type=int, default=3, help="(default: 3)")
    parser.add_argument("--precision", default="auto", help="auto, fp32, fp16 or bf16 (default: auto)")
    parser.add_argument("--diffusers", type=Path, metavar="FOLDER", help="compare with it; not with --precision auto")
    args = parser.parse_args()
    if args.diffusers and args.precision == "auto":
        parser.error("--diffusers needs a --precision: fp32, fp16 or bf16.")
    ours, others = [], []
    for _ in range(1 + args.runs):
        ours.append(first_step(args.model, args.precision))
        if args.diffusers:
            others.append(run([OTHER, str(args.diffusers), args.precision]))
    ours, others = ours[1:], others[1:]
    median = report("sd-zoo", ours)
    if others:
        print(f"sd-zoo / diffusers: {median / report('diffusers', others):.2f}")


if __name__ == "__main__":
    main()
