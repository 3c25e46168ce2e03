"""Make the same pictures on a device, with every way of loading the model, and on the CPU in float32; compare them.

    python scripts/benchmarks/check_device.py                 # on the device that "auto" finds, with the embedded model
    python scripts/benchmarks/check_device.py --device cuda --json found.json

Prints each picture's PSNR to the CPU's picture in decibels, its seconds, and on CUDA the peak memory, weights included.
Below 30 dB in float32, or 20 dB in half precision, the exit code is 1: rounding does not explain that. Last come two
comparisons on the device itself: latents with and without CUDA graphs, and a picture decoded in tiles and as a whole.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import sd
from sd.pipeline.settings import Settings
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.runtime.device import pick_device
from sd.study.benchmark.table import markdown

PROMPT = "a red circle on a blue background"
COMMON = {"seed": 1, "steps": 20}
BOUNDS = {"fp32": 30.0, "fp16": 20.0, "bf16": 20.0}  # dB
SAMPLERS = ("dpmpp_2m", "ddim", "plms", "heun", "euler_a", "unipc")
WAYS = {  # how the model is loaded
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "fp16, low memory": {"precision": "fp16", "low_memory": True},
}
Job = Callable[[StableDiffusion], list[Image.Image]]


def jobs(picture: Image.Image) -> dict[str, Job]:
    """picture  the input of image to image and inpainting"""
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rectangle((0, 0, picture.width // 2, picture.height), fill=255)
    return {
        **{name: lambda model, name=name: model.txt2img(PROMPT, sampler=name, **COMMON) for name in SAMPLERS},
        "two at a time": lambda model: model.txt2img(PROMPT, batch_size=2, **COMMON),
        "image to image": lambda model: model.img2img("a green square", picture, strength=0.6, **COMMON),
        "inpainting": lambda model: model.inpaint("a green square", picture, mask, **COMMON),
    }


def decibels(pictures: list[Image.Image], others: list[Image.Image]) -> float:
    """The peak signal-to-noise ratio; above 1000 for equal pictures."""
    both = [np.stack([np.asarray(picture, dtype=np.float64) for picture in each]) for each in (pictures, others)]
    return -10 * math.log10(max(np.square(both[0] - both[1]).mean() / 255**2, 1e-300))


def load(device: torch.device, **options: object) -> StableDiffusion:
    return sd.load(device=str(device), **options)


def measured(device: torch.device, model: StableDiffusion, job: Job) -> tuple[list[Image.Image], float, float]:
    """The pictures, the seconds, and the most bytes on the device; nan if unknown."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    pictures = job(model)
    seconds = time.perf_counter() - started
    return pictures, seconds, torch.cuda.max_memory_allocated(device) if on_cuda else math.nan


def same_on(device: torch.device) -> dict[str, float]:
    """Relative difference of latents, captured or not, and decibels between decoding in tiles and as a whole."""
    model = load(device, precision="fp16" if device.type == "cuda" else "fp32")
    size = model.config.native_size
    batch = [Settings(prompt=PROMPT, seed=1, steps=10, sampler="plms", width=size, height=size)]
    *_, captured = model.sample(batch)
    problem = model.runner.captured and model.runner.captured.problem
    if problem:
        print(f"not captured: {problem}", file=sys.stderr)
    model.runner = model.runner.for_watching()
    *_, plain = model.sample(batch)
    side = 640 // model.config.vae.factor  # larger than a tile
    latents = torch.nn.functional.interpolate(plain, size=(side, side), mode="bilinear")
    whole = model.decode(latents)
    tiled = load(device, precision="fp16" if device.type == "cuda" else "fp32", tiled_vae=True).decode(latents)
    difference = ((captured - plain).norm() / plain.norm()).item()
    return {"captured or not, difference": difference, "in tiles or not, dB": decibels(whole, tiled)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    parser.add_argument("--ways", default=",".join(WAYS).replace(", ", " "), help="(default: all of %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found as JSON")
    args = parser.parse_args(arguments)
    device = pick_device(args.device)
    reference = load(torch.device("cpu"), precision="fp32")
    all_jobs = jobs(*reference.txt2img(PROMPT, **COMMON))
    expected = {name: job(reference) for name, job in all_jobs.items()}
    found, far = [], False
    for way, options in WAYS.items():
        if way.replace(", ", " ") not in args.ways.split(","):
            continue
        model = load(device, **options)
        model.txt2img(PROMPT, seed=1, steps=2)  # libraries set themselves up
        for name in all_jobs if way == "fp16" or len(args.ways.split(",")) == 1 else ["dpmpp_2m"]:
            pictures, seconds, peak = measured(device, model, all_jobs[name])
            near = decibels(pictures, expected[name])
            far |= near < BOUNDS[options["precision"]]
            found.append({"way": way, "job": name, "dB": near, "seconds": seconds, "bytes": peak})
        del model
    same = same_on(device)
    rows = [
        [row["way"], row["job"], f"{row['dB']:.1f}", f"{row['seconds']:.2f}", f"{row['bytes'] / 1e6:.0f}"]
        for row in found
    ]
    print(markdown(["loaded as", "pictures", "dB", "seconds", "MB"], rows), end="")
    for name, value in same.items():
        print(f"{name}: {value:.3g}")
    if args.json:
        args.json.write_text(json.dumps({"device": str(device), "pictures": found, "same": same}, indent=1))
    return int(far)


if __name__ == "__main__":
    sys.exit(main())
