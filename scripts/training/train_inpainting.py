"""Make an inpainting model with nine channels from the small model: widen its UNet and train it on masked pictures.

    python scripts/training/train_inpainting.py runs/inpainting
    python scripts/training/train_inpainting.py runs/inpainting --model runs/tiny/model.ckpt --steps 3000
    python scripts/training/score_inpainting.py runs/inpainting/model.ckpt scores/inpainting

The VAE and the text encoder stay unchanged. The same command resumes training. The result is `model.ckpt` in the
folder, in the original layout, for `sd inpaint`.
"""

from pathlib import Path

import torch
from tqdm import tqdm
from training_command import options, prepare, run, train, training_parser

import sd
from sd.runtime.saving import save_model
from sd.training.inpainting import inpainting_config, show_holes
from sd.training.jobs import denoiser_run
from sd.training.latents import EncodedOnce, encode_all
from sd.training.shapes.drawing import ShapesDataset
from sd.training.widening import widened


def main(arguments: list[str] | None = None) -> None:
    parser = training_parser(__doc__, batch_size=32, seed=2, save_every=250)
    add = parser.add_argument
    add("folder", type=Path, help="output folder")
    add("--model", type=Path, help="a model with four channels (default: the embedded model)")
    add("--pictures", type=int, default=6_400, help="each with one hole (default: %(default)s)")
    add("--steps", type=int, default=1_500, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=3e-4, help="(default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that prepare batches while a GPU trains (default: 0)")
    args = parser.parse_args(arguments)
    device = prepare(args)
    model = sd.load(args.model, device=str(device), precision="fp32")
    config = inpainting_config(model.config)
    networks = {"unet": widened(model.unet, config), "vae": model.vae, "text_encoder": model.text_encoder}
    networks["unet"].to(memory_format=torch.channels_last).requires_grad_(True)
    pictures = ShapesDataset(args.seed, config.native_size, device=device)
    args.folder.mkdir(parents=True, exist_ok=True)
    latents = args.folder / "latents.safetensors"
    if not latents.exists():
        with tqdm(desc="encoding", total=args.pictures, unit="picture") as bar:
            encode_all(
                model.vae,
                pictures,
                args.pictures,
                latents,
                batch_size=args.batch_size,
                on_batch=bar.update,
                made_of=pictures.name,
                look_beside=show_holes(model.vae, config.vae.latent_scale, pictures),
            )
    rate, warmup = args.learning_rate, min(100, args.steps // 4)
    run = denoiser_run(
        config,
        networks,
        EncodedOnce(latents, pictures.recaption, args.seed, pictures.name),
        options(args, args.steps, rate, warmup=warmup, final_learning_rate=rate / 20, ema_decay=0.998),
        args.folder / "denoiser",
        batch_size=args.batch_size,
        seed=args.seed,
        min_snr_gamma=5.0,
        snr_floor=0.2,
        noise_offset=0.25,
        train_text_encoder=False,
        workers=args.workers,
    )
    train(run, "denoiser")
    target = args.folder / "model.ckpt"
    with run.ema.applied(run.module):
        save_model(target, config, networks, {}, step=run.step, dtype=torch.float16, merge=True)
    print(target)


if __name__ == "__main__":
    run(main)
