"""How long it takes, and how much memory, from the command to the first denoising step.

    python scripts/benchmark_loading.py model.ckpt
    python scripts/benchmark_loading.py model.ckpt --runs 5 --precision bf16

Each run is a process of its own that executes `sd txt2img`, as a user would, and stops at the first call of the UNet.
Peak memory is the largest resident set of the process, mapped pages of the file included, as Linux counts it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import os, sys, time
import sd.cli
from sd import denoiser

def stop(self, x_t, alpha_bar):
    import torch
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(time.time(), peak, self.context.dtype.itemsize, file=sys.stderr)
    os._exit(0)

denoiser.Denoiser.__call__ = stop
sd.cli.main(sys.argv[1:])
"""


def first_step(model: Path, precision: str) -> tuple[float, int, int]:
    """Seconds to the first call of the UNet, peak bytes, bytes of one parameter."""
    command = [sys.executable, "-c", CHILD, "txt2img", "a horse", "-m", str(model), "--seed", "1", "-q"]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--precision", precision, "--out", folder]
        started = time.time()
        result = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr)
    moment, peak, width = result.stderr.split()[-3:]
    return float(moment) - started, int(peak), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="a checkpoint; its pages should be in the page cache")
    parser.add_argument("--runs", type=int, default=3, help="(default: 3)")
    parser.add_argument("--precision", default="auto", help="auto, fp32, fp16 or bf16 (default: auto)")
    args = parser.parse_args()
    rows = [first_step(args.model, args.precision) for _ in range(args.runs)]
    seconds = statistics.median(row[0] for row in rows)
    peak, width = max(row[1] for row in rows), rows[0][2]
    print(f"to the first step: {seconds:.2f} s, median of {args.runs}")
    print(f"peak memory:       {peak / 1e9:.2f} GB with {8 * width}-bit parameters")


if __name__ == "__main__":
    main()
