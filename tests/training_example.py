"""A short training of a very small model on random pictures; also run as a process, to be killed or doubled.

python training_example.py FOLDER STEPS [BATCH_SIZE]
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sd.config import SD_V1
from sd.training.jobs import denoiser_run, fresh_networks
from sd.training.latents import EncodedAsTheyCome
from sd.training.loop import TrainingOptions

CONFIG = replace(
    SD_V1,
    text_encoder=replace(SD_V1.text_encoder, width=64, hidden_width=64, layers=1, heads=1),
    unet=replace(SD_V1.unet, width=32, multipliers=(1, 1), depths=(1, 0), residuals_per_level=1, context_width=64),
    vae=replace(SD_V1.vae, width=32, multipliers=(1, 1, 1, 1), residuals_per_level=1),
)
CONFIG = replace(CONFIG, unet=replace(CONFIG.unet, heads=(4, 4)))


class RandomPictures:
    """Squares of one colour, by number."""

    def __init__(self, size: int = 32):
        self.size = size

    def batch(self, step: int, batch_size: int, share: slice) -> tuple[Tensor, list[str]]:
        generator = torch.Generator().manual_seed(step)
        colours = torch.rand(batch_size, 3, 1, 1, generator=generator) * 2 - 1
        pictures = colours.expand(-1, -1, self.size, self.size)
        pictures = pictures + 0.1 * torch.randn(pictures.shape, generator=generator)
        return pictures[share], [f"picture {number % 7}" for number in range(batch_size)][share]


def options(steps: int) -> TrainingOptions:
    return TrainingOptions(
        steps=steps,
        learning_rate=1e-3,
        warmup=4,
        final_learning_rate=1e-3,
        weight_decay=0.01,
        gradient_clip=1.0,
        ema_decay=0.99,
        autocast=False,
        save_every=5,
    )


def run(folder: Path, steps: int, batch_size: int = 4, workers: int = 0):
    networks = fresh_networks(CONFIG, seed=0)
    encoded = EncodedAsTheyCome(networks["vae"], RandomPictures())
    settings = {"batch_size": batch_size, "seed": 1, "workers": workers}
    return denoiser_run(CONFIG, networks, encoded, options(steps), folder, **settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in __import__("os").environ:
        dist.init_process_group("gloo")
    for row in run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 4).run():
        print(row["step"], flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
