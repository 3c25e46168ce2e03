"""Distil the VAE of a small model into a tiny one, as TAESD is, which decodes in a small part of the time.

    python scripts/training/distil_vae.py runs/tiny-vae        # of the embedded model; about an hour on a CPU core
    python scripts/training/distil_vae.py runs/other --model runs/tiny/model.ckpt --width 16
    torchrun --nproc-per-node 2 scripts/training/distil_vae.py runs/tiny-vae

First the VAE encodes and decodes pictures drawn by code, and decodes what the model predicts at every step of its own
pictures. The decoder and the encoder learn from that, one after the other. Each has a folder with its state, its losses
(`loss.csv`) and its samples, the VAE's above and the tiny VAE's below; the same command resumes training. The result,
named after the output folder, is a `.safetensors` with diffusers' names, in float16, for `--tiny-vae`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from training_command import options, prepare, run, save_sheet, train, training_parser

import sd
from convert.families.table import family_named
from sd.config import SDXL_REFINER, TAESD
from sd.networks.tiny_vae import TinyVAE
from sd.pipeline.image.tensors import to_images
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.runtime.tiny_vae import save_tiny_vae
from sd.training.loop import TrainingRun
from sd.training.shapes.drawing import ShapesDataset
from sd.training.tiny_vae import answers_in, ask_vae, distillation_run, fresh_tiny_vae

SAMPLES = 12
PREDICTED = {"steps": 8}  # of the model's own pictures


def answers_of(args: argparse.Namespace, model: StableDiffusion, scale: float, first: bool) -> dict[str, Tensor]:
    """What the VAE makes of drawn pictures and of the model's own, asked once."""
    drawn = ShapesDataset(args.seed, model.config.native_size, device=model.device)
    captions = [drawn.describe(args.drawn + number)[1] for number in range(args.predicted)]
    requests = [model.settings_for(text, seed=i, **PREDICTED) for i, text in enumerate(captions)]
    path, made_of = args.folder / "answers.safetensors", f"{args.drawn} and {args.predicted}: {drawn.name}"
    if first and not path.exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        with tqdm(desc="asking the VAE", total=args.drawn + PREDICTED["steps"] * args.predicted, unit="picture") as bar:
            ask_vae(
                model,
                drawn,
                args.drawn,
                requests,
                path,
                scale=scale,
                batch_size=args.batch_size,
                on_answer=bar.update,
                made_of=made_of,
            )
    if dist.is_initialized():
        dist.barrier()
    return answers_in(path, made_of)


def train_half(args: argparse.Namespace, tiny_vae: TinyVAE, half: str, answers: dict[str, Tensor]) -> TrainingRun:
    """Train one half to the end, and give it the averaged weights."""
    steps, rate = getattr(args, f"{half}_steps"), args.learning_rate
    rates = {"warmup": min(100, steps // 4), "final_learning_rate": rate / 50, "ema_decay": 0.99}
    training = distillation_run(
        tiny_vae,
        half,
        answers,
        options(args, steps, rate, **rates, muon=True),
        args.folder / half,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    device = next(tiny_vae.parameters()).device
    latents = answers["latents"][-SAMPLES:].to(device)
    above = answers["decoded"][-SAMPLES:] / 127.5 - 1

    @torch.no_grad()
    def show(step: int) -> None:
        with training.ema.applied(training.module):
            rows = torch.cat([above, tiny_vae.decode(latents).cpu()])
        save_sheet(training.folder / f"samples-{step:06}.png", to_images(rows), SAMPLES)

    train(training, half, args.sample_every, show if half == "decoder" else None)
    for name, value in training.module.named_parameters():
        value.data.copy_(training.ema.weights[name])
    return training


def main(arguments: list[str] | None = None) -> None:
    parser = training_parser(__doc__, batch_size=16, save_every=100)
    add = parser.add_argument
    add("folder", type=Path, help="output folder; the result gets its name")
    add("--model", type=Path, help="a model of drawn shapes (default: the embedded model)")
    add("--width", type=int, default=24, help="channels inside the tiny VAE; TAESD has 64 (default: %(default)s)")
    add("--drawn", type=int, default=640, help="how many pictures to draw (default: %(default)s)")
    add("--predicted", type=int, default=40, help="pictures by the model, 8 steps each (default: %(default)s)")
    add("--decoder-steps", type=int, default=2000, help="(default: %(default)s)")
    add("--encoder-steps", type=int, default=1000, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=2e-3, help="(default: %(default)s)")
    add("--sample-every", type=int, default=500, help="steps (default: %(default)s)")
    args = parser.parse_args(arguments)
    least = {"width": 1, "batch_size": 1, "drawn": 1, "predicted": 0, "decoder_steps": 1, "encoder_steps": 1}
    for name, lowest in least.items():
        if getattr(args, name) < lowest:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {getattr(args, name)} is out of range: {lowest} or more.")
    device = prepare(args)
    first = not dist.is_initialized() or dist.get_rank() == 0
    model = sd.load(args.model, device=str(device))
    if model.config.unet.in_channels != model.config.vae.latent_channels or model.config.family == SDXL_REFINER.family:
        raise ValueError(
            f"{args.model} is {model.config.family}; a tiny VAE learns from pictures that a model makes from text "
            "alone. Give such a model."
        )
    config = replace(TAESD, width=args.width, latent_scale=family_named(model.config.family).config.vae.latent_scale)
    answers = answers_of(args, model, config.latent_scale, first)
    tiny_vae = fresh_tiny_vae(config, args.seed).to(device, memory_format=torch.channels_last)
    for half in ("decoder", "encoder"):
        training = train_half(args, tiny_vae, half, answers)
    if training.is_first:
        target = args.folder / f"{args.folder.name}.safetensors"
        save_tiny_vae(target, tiny_vae)
        print(target)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
