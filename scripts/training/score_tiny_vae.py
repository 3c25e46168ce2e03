"""Compare a tiny VAE with the VAE that it stands in for: how near its pictures are, what they show, and how fast it is.

    python scripts/training/score_tiny_vae.py scores/ --tiny-vae weights/tiny-vae.safetensors
    python scripts/training/score_tiny_vae.py scores/ --tiny-vae runs/other/other.safetensors --model model.ckpt

Both decode the same latents: of pictures drawn by code, which the VAE encodes, and of the model's own, for the held-out
prompts of score_tiny.py, finished and half-way through the steps. Plain image analysis judges the finished ones. Writes
a table, `scores.md`, and a sheet of each set, `*.png`: the VAE's pictures above, the tiny VAE's below.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from training_command import parser_of, run, save_sheet

import sd
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.study.benchmark.table import markdown
from sd.study.forward_process import psnr
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.scoring import Request, one_thing, shares, two_things, verdicts

BATCH, SHOWN = 28, 14  # pictures made together; pictures on a sheet


def of_drawn(model: StableDiffusion, count: int) -> Tensor:
    """Latents (count, 4, H, W) of drawn pictures that no training has seen."""
    drawn = ShapesDataset(1, model.config.native_size, held_out=True)
    return torch.cat([model.encode_image(drawn.batch(number, 1)[0]) for number in range(count)])


def of_prompts(model: StableDiffusion, requests: list[Request], steps: int) -> tuple[Tensor, Tensor]:
    """Latents (N, 4, H, W) of finished pictures, and the clean ones predicted half-way."""
    finished, unfinished = [], []
    jobs = [model.settings_for(each.prompt, seed=each.seed, steps=steps) for each in requests]
    for start in tqdm(range(0, len(jobs), BATCH), unit="batch", leave=False):
        clean: list[Tensor] = []
        *_, latents = model.sample(jobs[start : start + BATCH], on_clean=clean.append)
        finished.append(latents)
        unfinished.append(clean[len(clean) // 2])
    return torch.cat(finished), torch.cat(unfinished)


def decoded(models: list[StableDiffusion], latents: Tensor) -> Iterator[tuple[list[Image.Image], list[float]]]:
    """The pictures by each model in turn, and its seconds of processor time."""
    for each in latents.split(1):
        pictures, seconds = [], []
        for model in models:
            started = time.process_time()
            pictures += model.decode(each)
            seconds.append(time.process_time() - started)
        yield pictures, seconds


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="output folder")
    add("--tiny-vae", type=Path, required=True, metavar="FILE", help="the tiny VAE")
    add("--model", type=Path, help="a checkpoint (default: the embedded model)")
    add("--drawn", type=int, default=100, help="drawn pictures (default: %(default)s)")
    add("--repeats", type=int, default=1, help="pictures of each of the 56 combinations (default: %(default)s)")
    add("--relations", type=int, default=10, help="pictures of each of the 5 relations (default: %(default)s)")
    add("--steps", type=int, default=20, metavar="N", help="(default: %(default)s)")
    add("--precision", default="auto", help="of the networks (default: auto)")
    args = parser.parse_args(arguments)
    tiny = sd.load(args.model, precision=args.precision, tiny_vae=args.tiny_vae)
    args.folder.mkdir(parents=True, exist_ok=True)
    sets: dict[str, tuple[Tensor, list[Request]]] = {}
    if args.drawn:
        sets["drawn"] = of_drawn(tiny, args.drawn), []
    for name, requests in {"one thing": one_thing(args.repeats), "two things": two_things(args.relations)}.items():
        if requests:
            finished, unfinished = of_prompts(tiny, requests, args.steps)
            sets |= {name: (finished, requests), f"{name}, half-way": (unfinished, [])}
    rows = []
    for name, (latents, requests) in sets.items():
        pairs, seconds = zip(*tqdm(decoded([replace(tiny, tiny_vae=None), tiny], latents), leave=False), strict=True)
        near, both = [psnr(*pair) for pair in pairs], list(zip(*pairs, strict=True))
        values = [f"{value:.1f} dB" for value in (statistics.mean(near), min(near))]
        right = [f"{100 * shares(list(verdicts(made, requests)))['all']:.1f} %" if requests else "" for made in both]
        times = [statistics.median(each) for each in zip(*seconds, strict=True)]
        rows.append([name, str(len(near)), *values, *right, f"{times[0] / times[1]:.1f}"])
        sheet = args.folder / f"{name.replace(' ', '-').replace(',', '')}.png"
        save_sheet(sheet, [*both[0][:SHOWN], *both[1][:SHOWN]], min(SHOWN, len(near)))
    head = ["pictures", "count", "PSNR", "lowest PSNR", "right, VAE", "right, tiny VAE", "times as fast"]
    (args.folder / "scores.md").write_text(markdown(head, rows))
    print(markdown(head, rows), end="")


if __name__ == "__main__":
    run(main)
