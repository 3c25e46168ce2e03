"""Train a small Stable Diffusion from scratch on pictures drawn by code, and write it in the original layout.

    python scripts/training/train_tiny.py runs/tiny              # hours on a CPU; the same command resumes
    python scripts/training/train_tiny.py runs/tiny --factor 8 --workers 8    # on a GPU: larger batches, fewer of them
    python scripts/training/train_tiny.py runs/tiny --trial      # two steps of everything: does it work here?
    python scripts/training/train_tiny.py runs/more --init runs/tiny/model.ckpt --stages everything    # go on
    torchrun --nproc-per-node 2 scripts/training/train_tiny.py runs/tiny

It goes through the stages in `sd/training/shapes/stages.py`: the autoencoder learns to reconstruct pictures, the text
encoder to read captions; then the UNet learns to predict the noise in the autoencoder's latents, and the decoder to
draw sharper pictures from the same latents. Each stage has a folder with its state, its losses (`loss.csv`) and its
samples. Stopped at any time, the same command goes on from the last saved state; a stage that is done is not repeated.
The result is `model.ckpt` in the output folder.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from training_command import options, prepare, run, save_sheet, train, training_parser

import sd
from sd.config import SD_V1, ModelConfig
from sd.files import written_whole
from sd.pipeline.image.tensors import to_images
from sd.pipeline.stable_diffusion import Source, StableDiffusion
from sd.runtime.saving import save_model
from sd.training.jobs import autoencoder_run, denoiser_run, fresh_networks, standardise, tokenizer_of
from sd.training.latents import EncodedOnce, Pictures, encode_all
from sd.training.loop import TrainingOptions, TrainingRun
from sd.training.mixed import mixed_precision
from sd.training.shapes.captions import plain_caption
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.reading import reading_run
from sd.training.shapes.stages import STAGES, Parts, Stage

GAMMA, FLOOR = 5.0, 0.1  # signal-to-noise ratios: a timestep above counts less, one below as if it were there
LOSS = {"squared": 5.0, "noise": 0.05}  # of the autoencoder, see `AutoencodingLoss`
SMOOTH = 0.05  # of its loss, unless the encoder is frozen
TRAINED = {  # the networks that a stage trains
    "vae": ("vae",),
    "decoder": ("vae",),
    "text encoder": ("text_encoder",),
    "unet": ("unet",),
}


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
        guidance_scale=3.0,
    )


class Job(NamedTuple):
    """What all stages share."""

    args: argparse.Namespace
    config: ModelConfig
    networks: dict[str, nn.Module]
    device: torch.device
    first: bool  # of the processes that train together: only this one writes files

    def pictures(self, scenes: str, *, drawn_on: torch.device | str | None = None) -> ShapesDataset:
        """drawn_on  default: the device that trains, unless other processes prepare the batches"""
        where = drawn_on or ("cpu" if self.args.workers else self.device)
        return ShapesDataset(self.args.seed, self.args.size, kind=scenes, device=where)

    def options(self, stage: Stage) -> TrainingOptions:
        warmup, last = min(100, stage.steps // 4), stage.falls_to * stage.learning_rate
        rates = {"warmup": warmup, "final_learning_rate": last, "ema_decay": stage.ema_decay}
        return options(self.args, stage.steps, stage.learning_rate, **rates, muon=True)

    def save(self, step: int) -> None:
        path = self.args.folder / "model.ckpt"
        save_model(path, self.config, self.networks, {}, step=step, dtype=torch.float16, merge=True)


class Training(NamedTuple):
    """A stage that is ready to start."""

    run: TrainingRun
    show: Callable[[int], object] | None = None  # writes samples after so many steps
    finish: Callable[[], object] = lambda: None  # changes the averaged weights before they are kept


def autoencoder(job: Job, stage: Stage) -> Training:
    """The VAE; or of a frozen one, the decoder alone."""
    args, vae, whole = job.args, job.networks["vae"], stage.trains == "vae"
    all_pictures = job.pictures(stage.scenes)
    pictures: Pictures = Parts(all_pictures, min(stage.part, args.size)) if stage.part else all_pictures
    vae.requires_grad_(whole)
    for decoding in (vae.post_quant_conv, vae.decoder):
        decoding.requires_grad_(True)
    settings = {"batch_size": stage.batch_size, "seed": args.seed, "workers": args.workers}
    settings |= {**LOSS, "smooth": SMOOTH if whole else 0.0}
    run = autoencoder_run(vae, pictures, job.options(stage), args.folder / stage.name, **settings)
    images = all_pictures.batch(0, 16, slice(0, 16))[0].to(job.device)

    @torch.no_grad()
    def show(step: int) -> None:
        with run.ema.applied(run.module):
            pairs = torch.stack([images, vae.decode(vae.encode(images)[0])], dim=1)
            save_sheet(run.folder / f"samples-{step:06}.png", to_images(pairs.flatten(0, 1)))

    def finish() -> None:
        if whole:
            standardise(vae, job.pictures("all"), job.config.vae.latent_scale, batches=32, batch_size=4)

    return Training(run, show, finish)


def reading(job: Job, stage: Stage) -> Training:
    """The text encoder alone, from captions; with --init, its output stays close to what the UNet already knows."""
    args = job.args
    run = reading_run(
        job.networks["text_encoder"],
        tokenizer_of(job.config),
        job.pictures(stage.scenes).describe,
        job.options(stage),
        args.folder / stage.name,
        batch_size=stage.batch_size,
        seed=args.seed,
        nearness=0.3 if args.init else 0.0,
    )
    return Training(run)


def denoiser(job: Job, stage: Stage) -> Training:
    """The UNet, on the latents of a frozen VAE, with a text encoder that can read.

    The text encoder is frozen, too: its gradient is mostly noise here, and Muon takes equally long steps along noise.
    """
    args, config, networks = job.args, job.config, job.networks
    folder, pictures = args.folder / stage.name, job.pictures(stage.scenes)
    networks["vae"].requires_grad_(False)
    latents = args.folder / f"latents-{stage.scenes}-{stage.pictures}.safetensors"  # of all stages with these pictures
    folder.mkdir(parents=True, exist_ok=True)
    if job.first and not latents.exists():
        drawn = job.pictures(stage.scenes, drawn_on=job.device)
        batch = min(32, stage.pictures)
        with tqdm(desc=f"encoding {stage.name}", total=stage.pictures, unit="picture") as bar:
            common = {"batch_size": batch, "on_batch": bar.update, "made_of": pictures.name}
            with mixed_precision(job.device, enabled=args.autocast):
                encode_all(networks["vae"], drawn, stage.pictures, latents, **common)
    if dist.is_initialized():
        dist.barrier()
    run = denoiser_run(
        config,
        networks,
        EncodedOnce(latents, pictures.recaption, args.seed, pictures.name),
        job.options(stage),
        folder,
        batch_size=stage.batch_size,
        seed=args.seed,
        min_snr_gamma=GAMMA,
        snr_floor=FLOOR,
        train_text_encoder=False,
        noise_offset=0.25,  # for 16x16 latents what 0.06 is for 64x64: their mean has a deviation of 1/16, not 1/64
        workers=args.workers,
    )
    source = Source(name="tiny", weights="ema", sha256=lambda: None)
    model = StableDiffusion(config=config, tokenizer=tokenizer_of(config), source=source, **networks)
    shown = ShapesDataset(args.seed, args.size, held_out=True)  # in all stages the same
    prompts = [plain_caption(shown.describe(number)[0]) for number in range(16)]
    if job.first:
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")

    def show(step: int) -> None:
        batch = [model.settings_for(text, seed=i) for i, text in enumerate(prompts)]
        with run.ema.applied(run.module):
            save_sheet(folder / f"samples-{step:06}.png", model.make(batch))
            job.save(step)

    return Training(run, show)


TRAININGS = {"vae": autoencoder, "decoder": autoencoder, "text encoder": reading, "unet": denoiser}


def train_stage(job: Job, stage: Stage, result: Path) -> None:
    """Train to the end, and write the averaged weights of the trained networks once, for all processes."""
    run, show, finish = TRAININGS[stage.trains](job, stage)
    train(run, stage.name, job.args.sample_every, show)
    if run.is_first:
        with run.ema.applied(run.module), written_whole(result, force=True) as file:
            finish()
            trained = nn.ModuleDict({name: job.networks[name] for name in TRAINED[stage.trains]})
            save_file({name: value.cpu().contiguous() for name, value in trained.state_dict().items()}, file.name)
    if dist.is_initialized():
        dist.barrier()


def load_result(networks: dict[str, nn.Module], stage: Stage, result: Path) -> None:
    nn.ModuleDict({name: networks[name] for name in TRAINED[stage.trains]}).load_state_dict(load_file(result))


def chosen_stages(args: argparse.Namespace) -> list[Stage]:
    stages = [stage.enlarged(args.factor) for stage in STAGES]
    if args.trial:
        stages = [replace(stage, steps=2, batch_size=4, pictures=min(8, stage.pictures)) for stage in stages]
    return stages


def main(arguments: list[str] | None = None) -> None:
    names = [stage.name for stage in STAGES]
    parser = training_parser(__doc__, save_every=200)
    add = parser.add_argument
    add("folder", type=Path, help="output folder")
    add("--init", type=Path, metavar="MODEL", help="begin with a model of this kind instead of random weights")
    add("--size", type=int, choices=[64, 128], default=128, help="pixels of a side (default: %(default)s)")
    add("--stages", nargs="+", choices=names, default=names, metavar="NAME", help=f"only these: {', '.join(names)}")
    add("--factor", type=int, default=1, help="batches that many times as large, and as many times fewer (default: 1)")
    add("--trial", action="store_true", help="two steps of each stage, to see whether everything works")
    add("--workers", type=int, default=0, help="processes that prepare batches while a GPU trains (default: 0)")
    add("--sample-every", type=int, default=1000, help="steps (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.factor < 1:
        parser.error(f"--factor {args.factor} is out of range: 1 or more")
    device = prepare(args)
    config = tiny(args.size)
    networks = {
        name: network.to(device, memory_format=torch.channels_last)
        for name, network in fresh_networks(config, args.seed).items()
    }
    if args.init:
        start = sd.load(args.init, device="cpu", precision="fp32")
        for name, network in networks.items():
            network.load_state_dict(getattr(start, name).state_dict())
    job = Job(args, config, networks, device, not dist.is_initialized() or dist.get_rank() == 0)
    for stage in chosen_stages(args):
        result = args.folder / f"{stage.name}.safetensors"
        if stage.name in args.stages and not result.exists():
            train_stage(job, stage, result)
        if result.exists():
            load_result(networks, stage, result)
    if job.first:
        job.save(sum(stage.steps for stage in STAGES if stage.trains == "unet"))
        print(args.folder / "model.ckpt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
