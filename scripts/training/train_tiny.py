"""Train a small Stable Diffusion from scratch on pictures drawn by code, and write it in the original layout.

    python scripts/training/train_tiny.py runs/tiny              # 128x128; hours on a CPU, minutes on a GPU
    python scripts/training/train_tiny.py runs/tiny --size 64    # 64x64, about a quarter of the work
    python scripts/training/train_tiny.py runs/more --init runs/tiny/model.ckpt   # continue with another run's model
    torchrun --nproc-per-node 2 scripts/training/train_tiny.py runs/tiny

First the autoencoder learns to reconstruct pictures. Then the text encoder learns from captions alone to say what is
where; next, it and the UNet learn to predict the noise in the autoencoder's latents. Finally the decoder learns to draw
sharper pictures from the same latents. Each part has a folder with its state, its losses (`loss.csv`) and
its samples; the same command resumes training. The result is `model.ckpt` in the output folder.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from training_command import options, prepare, run, save_sheet, train, training_parser

import sd
from sd.config import SD_V1, ModelConfig
from sd.files import written_whole
from sd.networks.text_encoder import TextEncoder
from sd.networks.vae import VAE
from sd.pipeline.image.tensors import to_images
from sd.pipeline.settings import Settings
from sd.pipeline.stable_diffusion import Source, StableDiffusion
from sd.runtime.saving import save_model
from sd.text.tokenizer import Tokenizer
from sd.training.jobs import autoencoder_run, denoiser_run, fresh_networks, standardise
from sd.training.latents import EncodedOnce, encode_all
from sd.training.loop import TrainingOptions, TrainingRun
from sd.training.shapes.captions import plain_caption
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.reading import reading_run
from sd.training.shapes.scenes import KINDS, SHAPES

GAMMA = 5.0  # the signal-to-noise ratio above which a timestep counts less


def tiny(size: int) -> ModelConfig:
    """The architecture of v1, much narrower.

    The UNet predicts v: in the noisiest steps, where the prompt decides most, v is nearly the picture itself, whereas
    to predict eps the network would have to copy the noise exactly.
    """
    return replace(
        SD_V1,
        text_encoder=replace(SD_V1.text_encoder, width=64, hidden_width=256, layers=4, heads=1),
        unet=replace(SD_V1.unet, width=64, multipliers=(1, 1, 2, 2), context_width=64),
        vae=replace(SD_V1.vae, width=32),
        prediction="v",
        native_size=size,
    )


def falling(args: argparse.Namespace, steps: int, learning_rate: float) -> TrainingOptions:
    """A learning rate that falls to a twentieth."""
    warmup, last = min(240, steps // 4), learning_rate / 20
    return options(args, steps, learning_rate, warmup=warmup, final_learning_rate=last, ema_decay=0.999)


def train_autoencoder(
    args,
    vae: VAE,
    pictures: ShapesDataset,
    part: str,
    steps: int,
    learning_rate: float,
    batch_size: int,
    finish: Callable[[], object] = lambda: None,
) -> None:
    """Train the part of the VAE that is not frozen, and keep the averaged weights."""
    done = args.folder / f"{part}.safetensors"
    if not done.exists():
        run = autoencoder_run(
            vae,
            pictures,
            falling(args, steps, learning_rate),
            args.folder / part,
            batch_size=batch_size,
            seed=args.seed,
            workers=args.workers,
        )
        images = pictures.batch(0, 16, slice(0, 16))[0].to(vae.quant_conv.weight.device)

        @torch.no_grad()
        def show(step: int) -> None:
            pairs = torch.stack([images, vae.decode(vae.encode(images)[0])], dim=1)
            save_sheet(run.folder / f"samples-{step:06}.png", to_images(pairs.flatten(0, 1)))

        train(run, part, args.sample_every, show)
        keep_averaged(run, vae, done, finish)
    vae.load_state_dict(load_file(done))


def keep_averaged(
    run: TrainingRun, network: nn.Module, path: Path, finish: Callable[[], object] = lambda: None
) -> None:
    """Write a network's averaged weights once, for all processes; `finish` may change them before."""
    if run.is_first:
        with run.ema.applied(run.module), written_whole(path, force=True) as file:
            finish()
            save_file({name: value.cpu().contiguous() for name, value in network.state_dict().items()}, file.name)
    if dist.is_initialized():
        dist.barrier()


def train_text_encoder(args, text_encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    """Teach the text encoder to read; with --init, its output stays close to what the UNet already knows."""
    done = args.folder / "reading.safetensors"
    if not done.exists():
        run = reading_run(
            text_encoder,
            tokenizer,
            ShapesDataset(args.seed, args.size).describe,
            falling(args, args.text_steps, 1e-3),
            args.folder / "reading",
            batch_size=args.text_batch_size,
            seed=args.seed,
            nearness=0.3 if args.init else 0.0,
        )
        train(run, "reading")
        keep_averaged(run, text_encoder, done)
    text_encoder.load_state_dict(load_file(done))


def train_denoiser(
    args, config: ModelConfig, networks: dict, tokenizer: Tokenizer, pictures: ShapesDataset, first: bool
) -> TrainingRun:
    """Train the UNet and the text encoder on the latents of a frozen VAE."""
    vae = networks["vae"]
    device = vae.quant_conv.weight.device
    latents = args.folder / "latents.safetensors"
    if first and not latents.exists():
        with tqdm(desc="encoding", total=args.pictures, unit="picture") as bar:
            encode_all(
                vae,
                ShapesDataset(args.seed, args.size, **pictures.scenes, device=device),  # drawn on the VAE's device
                args.pictures,
                latents,
                batch_size=args.batch_size,
                on_batch=bar.update,
                made_of=pictures.name,
            )
    if dist.is_initialized():
        dist.barrier()
    run = denoiser_run(
        config,
        networks,
        EncodedOnce(latents, pictures.recaption, args.seed, pictures.name),
        falling(args, args.steps, args.learning_rate),
        args.folder / "denoiser",
        batch_size=args.batch_size,
        seed=args.seed,
        min_snr_gamma=GAMMA,
        snr_floor=args.snr_floor,
        noise_offset=0.25,  # for 16x16 latents what 0.06 is for 64x64: their mean has a deviation of 1/16, not 1/64
        workers=args.workers,
    )
    source = Source(name="tiny", weights="ema", sha256=lambda: None)
    model = StableDiffusion(config=config, tokenizer=tokenizer, source=source, **networks)
    if pictures.scenes["shapes"] == SHAPES:
        shown = ShapesDataset(args.seed, args.size, held_out=True, kind=args.scenes)
    else:  # with few shapes, there may be no held-out pairs
        shown = ShapesDataset(args.seed + 1, args.size, kind=args.scenes, shapes=tuple(args.shapes))
    prompts = [plain_caption(shown.describe(number)[0]) for number in range(16)]

    def show(step: int) -> None:
        batch = [Settings(prompt=text, seed=i, width=args.size, height=args.size) for i, text in enumerate(prompts)]
        with run.ema.applied(run.module):
            save_sheet(run.folder / f"samples-{step:06}.png", model.make(batch))
            save(args, config, networks, step)

    if first:
        (run.folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    train(run, "denoiser", args.sample_every, show)
    return run


def save(args, config: ModelConfig, networks: dict, step: int) -> None:
    save_model(args.folder / "model.ckpt", config, networks, {}, step=step, dtype=torch.float16, merge=True)


def main(arguments: list[str] | None = None) -> None:
    parser = training_parser(__doc__, batch_size=32, save_every=500)
    add = parser.add_argument
    add("folder", type=Path, help="output folder")
    add("--init", type=Path, metavar="MODEL", help="begin with a model of this kind instead of random weights")
    add("--size", type=int, choices=[64, 128], default=128, help="pixels of a side (default: %(default)s)")
    add("--vae-small-steps", type=int, default=2_000, help="of the autoencoder on small pictures (default: 2000)")
    add("--vae-small-size", type=int, default=64, help="pixels of a side of these pictures (default: 64)")
    add("--vae-small-batch-size", type=int, default=16, help="(default: %(default)s)")
    add("--vae-steps", type=int, default=1_600, help="of the autoencoder at the full size (default: %(default)s)")
    add("--vae-batch-size", type=int, default=4, help="(default: %(default)s)")
    add("--text-steps", type=int, default=800, help="of the text encoder alone (default: %(default)s)")
    add("--text-batch-size", type=int, default=128, help="(default: %(default)s)")
    add("--decoder-steps", type=int, default=1_200, help="of the decoder alone, last (default: %(default)s)")
    add("--decoder-batch-size", type=int, default=4, help="(default: %(default)s)")
    add("--pictures", type=int, default=9_600, help="for the UNet, with a new caption each time (default: %(default)s)")
    add("--scenes", choices=KINDS, default="all",
        help="easy to hard: one large thing in the middle; one thing; two in a line; two things; all")  # fmt: skip
    add("--shapes", nargs="+", choices=SHAPES, default=SHAPES, metavar="SHAPE", help="only these (default: all eight)")
    add("--steps", type=int, default=6_000, help="of the UNet and the text encoder; 0: skip (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="of both (default: %(default)s)")
    add("--snr-floor", type=float, default=0.2,
        help="timesteps below this signal-to-noise ratio count as if at it (default: %(default)s)")  # fmt: skip
    add("--workers", type=int, default=0, help="processes that prepare batches while a GPU trains (default: 0)")
    add("--sample-every", type=int, default=1000, help="steps (default: %(default)s)")
    args = parser.parse_args(arguments)
    if not 0 <= args.snr_floor <= GAMMA:
        parser.error(f"--snr-floor {args.snr_floor} is out of range: 0 to {GAMMA:g}")
    device = prepare(args)
    first = not dist.is_initialized() or dist.get_rank() == 0
    config = tiny(args.size)
    networks = {
        name: network.to(device, memory_format=torch.channels_last)
        for name, network in fresh_networks(config, args.seed).items()
    }
    if args.init:
        start = sd.load(args.init, device="cpu", precision="fp32")
        for name, network in networks.items():
            network.load_state_dict(getattr(start, name).state_dict())
    drawn_on = "cpu" if args.workers else device
    pictures = ShapesDataset(args.seed, args.size, kind=args.scenes, shapes=tuple(args.shapes), device=drawn_on)
    vae = networks["vae"]

    def standard() -> None:
        standardise(vae, pictures, config.vae.latent_scale, batches=32, batch_size=args.decoder_batch_size)

    if not args.init:
        small = ShapesDataset(args.seed, args.vae_small_size, device=drawn_on)
        steps, batch = args.vae_small_steps, args.vae_small_batch_size
        train_autoencoder(args, vae, small, "vae-small", steps, 1e-3, batch, standard)
        train_autoencoder(args, vae, pictures, "vae", args.vae_steps, 3e-4, args.vae_batch_size, standard)
    tokenizer = Tokenizer(context_length=config.text_encoder.context_length, pad_token=config.text_encoder.pad_token)
    train_text_encoder(args, networks["text_encoder"], tokenizer)
    vae.requires_grad_(False)
    run = train_denoiser(args, config, networks, tokenizer, pictures, first) if args.steps else None
    for trained in (vae.post_quant_conv, vae.decoder):
        trained.requires_grad_(True)
    train_autoencoder(args, vae, pictures, "decoder", args.decoder_steps, 3e-4, args.decoder_batch_size)
    if first:
        with run.ema.applied(run.module) if run else nullcontext():
            save(args, config, networks, args.steps)
    if dist.is_initialized():
        dist.destroy_process_group()
    if first:
        print(args.folder / "model.ckpt")


if __name__ == "__main__":
    run(main)
