"""Train a checkpoint further, on a folder of pictures and captions, and write it in the original layout.

    python scripts/training/finetune.py model.ckpt photos/ runs/photos --steps 2000
    torchrun --nproc-per-node 2 scripts/training/finetune.py model.ckpt photos/ runs/photos

Each picture's caption is in a .txt file of the same name, or all captions in metadata.jsonl. The output folder holds
the state, the losses (`loss.csv`) and sample pictures; the same command resumes training. The result is
`model.ckpt` there, with both the plain and the averaged (EMA) weights.

A full-size model in float32 needs about 17 GB of memory for weights, average, gradients and optimiser, and as much disk
for the state.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from training_command import options, prepare, run, save_sheet, train, training_parser

import sd
from sd.config import SDXL_REFINER
from sd.runtime.saving import save_model
from sd.training.folder import PictureFolder
from sd.training.jobs import denoiser_run
from sd.training.latents import EncodedAsTheyCome

SAMPLES = 9


def main(arguments: list[str] | None = None) -> None:
    parser = training_parser(__doc__, batch_size=4, save_every=250)
    add = parser.add_argument
    add("model", type=Path, help="the checkpoint to begin with")
    add("pictures", type=Path, help="folder of pictures and captions")
    add("folder", type=Path, help="output folder")
    add("--steps", type=int, default=1000, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=1e-5, help="(default: %(default)s)")
    add("--size", type=int, help="pixels of a side, a multiple of 8 (default: the model's native size)")
    add("--prompt-dropout", type=float, default=0.1, help="share of pictures trained without caption (default: 0.1)")
    add("--min-snr-gamma", type=float, help="weight the timesteps; 5 is usual (default: equal weights)")
    add("--train-text-encoder", action="store_true", help="also train the text encoder; XL's both")
    add("--ema-decay", type=float, default=0.9999, help="(default: %(default)s)")
    add("--sample-every", type=int, default=250, help="steps (default: %(default)s)")
    add("--half", action="store_true", help="write the result in float16, half the size")
    args = parser.parse_args(arguments)
    model = sd.load(args.model, device=str(prepare(args)), precision="fp32")
    config = model.config
    if config.unet.in_channels != config.vae.latent_channels or config.family == SDXL_REFINER.family:
        raise ValueError(
            f"{args.model} is {config.family}; only models that make pictures from text alone are fine-tuned. "
            "Give one of those."
        )
    size = args.size or config.native_size
    pictures = PictureFolder(args.pictures, size, args.seed)
    parts = ("unet", "vae", "text_encoder", *(["text_encoder_2"] if config.text_encoder_2 else []))
    networks = {part: getattr(model, part).requires_grad_(True) for part in parts}
    networks["vae"].requires_grad_(False)
    networks["unet"].to(torch.float32, memory_format=torch.channels_last)  # on the CPU, convolutions are as in the file
    rate, warmup = args.learning_rate, min(100, args.steps // 10)
    run = denoiser_run(
        replace(config, native_size=size),
        networks,
        EncodedAsTheyCome(model.vae, pictures),
        options(args, args.steps, rate, warmup=warmup, final_learning_rate=rate, ema_decay=args.ema_decay),
        args.folder,
        batch_size=args.batch_size,
        seed=args.seed,
        prompt_dropout=args.prompt_dropout,
        min_snr_gamma=args.min_snr_gamma,
        train_text_encoder=args.train_text_encoder,
    )
    prompts = [pictures.captions[name] for name in pictures.names[:SAMPLES]]
    batch = [model.settings_for(prompt, seed=i, width=size, height=size) for i, prompt in enumerate(prompts)]

    def show(step: int) -> None:
        with run.ema.applied(run.module):
            save_sheet(args.folder / f"samples-{step:06}.png", [model.make([job])[0] for job in batch])

    train(run, "denoiser", args.sample_every, show)
    if run.is_first:
        dtype = torch.float16 if args.half else torch.float32
        target = args.folder / "model.ckpt"
        save_model(target, config, networks, run.ema.weights, step=run.step, dtype=dtype, merge=False)
        print(target)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
