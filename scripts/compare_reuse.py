"""Measure what `--reuse-features` saves and what it changes.

    python scripts/compare_reuse.py                              # a minute: the model that comes with the package
    python scripts/compare_reuse.py --steps 20 --outer 1 2 3     # with more outer blocks than `--reuse-features` has
    python scripts/compare_reuse.py --model model.ckpt --steps 30 --reuse 2 3 --prompts 56

First the operations that are left of a prediction of the full-size v1 UNet at 512x512 where its inner blocks do not
run, by how many outer blocks do on each side. Then, for the model, how near the pictures are to those of the same seeds
with all predictions whole: the mean and the smallest PSNR, and the processor's seconds that each picture took.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from score_samplers import markdown
from score_tiny import make

import sd
import sd.latent_diffusion
from sd.architecture.calls import Watcher
from sd.config import SD_V1
from sd.forward_process import psnr
from sd.networks import build_networks
from sd.pipeline import StableDiffusion
from sd.running.reused_features import OUTER, ReusedFeatures
from sd.training.scoring import Request, one_thing

DEPTHS = (1, 2, 3, 4)


def operations(outer: int) -> tuple[int, int]:
    """Of a whole prediction, and of one without the inner blocks."""
    unet = build_networks(SD_V1)["unet"]
    x_t, context = torch.empty(1, 4, 64, 64, device="meta"), torch.empty(1, 77, 768, device="meta")
    reused, counts = ReusedFeatures(2, outer), []
    for _ in range(2):
        reused.begin(x_t)
        with Watcher({"unet": unet}) as watcher, reused.applied(unet), torch.no_grad():
            unet(x_t, torch.tensor(500.0, device="meta"), context)
        counts.append(sum(call.operations for call in watcher.calls.values()))
    return counts[0], counts[1]


def depths(every: list[int]) -> str:
    rows = []
    for outer in DEPTHS:
        whole, left = operations(outer)
        of_runs = [f"{100 * (whole + (n - 1) * left) / (n * whole):.1f} %" for n in every]
        rows.append([str(outer), f"{left / 1e9:.1f} G", f"{100 * left / whole:.1f} %", *of_runs])
    return markdown(
        ["outer blocks", "operations", "of a whole prediction", *(f"of a run, N = {n}" for n in every)], rows
    )


def timed(model: StableDiffusion, requests: list[Request], steps: int, every: int) -> tuple[list[Image.Image], float]:
    """The pictures, and the processor's seconds for each."""
    started = time.process_time()
    pictures = make(model, requests, {"steps": steps, "reuse_features": every})
    return pictures, (time.process_time() - started) / len(requests)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", type=Path, help="a checkpoint (default: the model that comes with the package)")
    add("--steps", type=int, nargs="+", default=[20, 30], metavar="N", help="(default: 20 30)")
    add("--reuse", type=int, nargs="+", default=[2, 3, 5], metavar="N", help="(default: 2 3 5)")
    add("--outer", type=int, nargs="+", default=[OUTER], metavar="N", help="of the pictures (default: %(default)s)")
    add("--prompts", type=int, default=8, help="1 to 56 (default: %(default)s)")
    args = parser.parse_args(arguments)
    print(depths(args.reuse))
    model = sd.load(args.model, precision="fp32")
    requests = one_thing(1)
    requests = requests[:: max(1, len(requests) // args.prompts)][: args.prompts]
    rows = []
    for steps in args.steps:
        whole, seconds = timed(model, requests, steps, every=1)
        rows.append([str(steps), "", "1", "", "", f"{seconds:.2f} s"])
        for outer in args.outer:
            with mock.patch.object(sd.latent_diffusion, "ReusedFeatures", partial(ReusedFeatures, outer=outer)):
                for every in args.reuse:
                    pictures, seconds = timed(model, requests, steps, every)
                    near = [psnr(*pair) for pair in zip(whole, pictures, strict=True)]
                    values = [f"{value:.1f} dB" for value in (statistics.mean(near), min(near))]
                    rows.append([str(steps), str(outer), str(every), *values, f"{seconds:.2f} s"])
    print(markdown(["steps", "outer blocks", "N", "PSNR", "the least", "a picture"], rows), end="")


if __name__ == "__main__":
    main()
