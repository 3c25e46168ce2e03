"""What the trainings for another task share: widen a model's UNet, train it on pictures and what it reads beside them.

The VAE stays unchanged, and mostly the text encoder.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from training_command import options, prepare, train, training_parser

import sd
from sd.config import ModelConfig
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.runtime.saving import save_model
from sd.training.jobs import denoiser_run
from sd.training.latents import EncodedOnce, Pictures, encode_all
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.scenes import KINDS
from sd.training.widening import widened

LookBeside = Callable[[int, Tensor], Tensor]  # see `sd.training.latents.encode_all`


def recaptioned(latents: Path, pictures: ShapesDataset, seed: int) -> EncodedOnce:
    return EncodedOnce(latents, pictures.recaption, seed, pictures.name)


def parse(
    description: str,
    arguments: list[str] | None,
    *,
    pictures: str,
    count: int,
    steps: int,
    scenes: str | None = None,
    **defaults: object,
) -> argparse.Namespace:
    """The flags of such a training. pictures: help on them; count, steps, scenes, and flags by name: defaults.

    scenes  which there are by default, if there is a choice
    """
    parser = training_parser(description, batch_size=32, seed=2, save_every=250)
    add = parser.add_argument
    add("folder", type=Path, help="output folder")
    add("--model", type=Path, help="a model with four channels (default: the embedded model)")
    add("--pictures", type=int, default=count, help=f"{pictures} (default: %(default)s)")
    add("--steps", type=int, default=steps, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=3e-4, help="(default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that prepare batches while a GPU trains (default: 0)")
    if scenes:
        add("--scenes", choices=KINDS, default=scenes, help="see train_tiny.py (default: %(default)s)")
    parser.set_defaults(**defaults)
    return parser.parse_args(arguments)


def with_wider_unet(model: StableDiffusion, config: ModelConfig) -> dict[str, nn.Module]:
    texts = {part: getattr(model, part) for part in ("text_encoder", "text_encoder_2") if getattr(model, part)}
    return {"unet": widened(model.unet, config), "vae": model.vae, **texts}


def train_wider(
    args: argparse.Namespace,
    config_from: Callable[[ModelConfig], ModelConfig],
    look_beside_of: Callable[[ModelConfig, nn.Module, Pictures], LookBeside] | None = None,
    *,
    networks_from: Callable[[StableDiffusion, ModelConfig], dict[str, nn.Module]] = with_wider_unet,
    pictures_of: Callable[..., Pictures] = ShapesDataset,
    encoded_of: Callable[[Path, Pictures, int], EncodedOnce] = recaptioned,
    ema_decay: float = 0.998,
    **learning: object,
) -> None:
    """Train, and write `model.ckpt` in the original layout, for the first time after --save-every steps.

    config_from     the wider model's config, from that of the ordinary one
    look_beside_of  config, VAE and pictures -> what the new channels hold for a batch of pictures; None if `encoded_of`
                    knows
    networks_from   the ordinary model and the new config -> the networks to begin with
    pictures_of     seed, size and device -> the pictures to train on
    encoded_of      file of latents, pictures and seed -> what each batch is taken from
    learning        options of `denoiser_run` that differ from those of inpainting
    """
    device = prepare(args)
    model = sd.load(args.model, device=str(device), precision="fp32")
    config = config_from(model.config)
    networks = networks_from(model, config)
    networks["unet"].to(torch.float32, memory_format=torch.channels_last).requires_grad_(True)
    pictures = pictures_of(args.seed, config.native_size, device=device)
    args.folder.mkdir(parents=True, exist_ok=True)
    latents = args.folder / "latents.safetensors"
    if not latents.exists():
        with tqdm(desc="encoding", total=args.pictures, unit="picture") as bar:
            encode_all(
                networks["vae"],
                pictures,
                args.pictures,
                latents,
                batch_size=args.batch_size,
                on_batch=bar.update,
                made_of=pictures.name,
                look_beside=look_beside_of and look_beside_of(config, networks["vae"], pictures),
            )
    rate, warmup = args.learning_rate, min(100, args.steps // 4)
    run = denoiser_run(
        config,
        networks,
        encoded_of(latents, pictures, args.seed),
        options(args, args.steps, rate, warmup=warmup, final_learning_rate=rate / 20, ema_decay=ema_decay),
        args.folder / "denoiser",
        batch_size=args.batch_size,
        seed=args.seed,
        workers=args.workers,
        **{"min_snr_gamma": 5.0, "snr_floor": 0.2, "noise_offset": 0.25, "train_text_encoder": False, **learning},
    )
    target = args.folder / "model.ckpt"

    def save(step: int) -> None:
        with run.ema.applied(run.module):
            save_model(target, config, networks, {}, step=step, dtype=torch.float16, merge=True)

    train(run, "denoiser", args.save_every, save)
    if run.is_first:
        save(run.step)
        print(target)
