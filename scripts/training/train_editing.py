"""Make a model that edits by instruction from the small model: widen its UNet and train it on pairs of pictures.

    python scripts/training/train_editing.py runs/editing
    python scripts/training/score_editing.py runs/editing/model.ckpt scores/editing

The VAE stays unchanged; the text encoder, which knows captions only, is trained too. The same command resumes
training. `model.ckpt` in the folder, in the original layout, is for `sd edit`; it is also written at every saved state.
"""

from pathlib import Path

import torch
from tqdm import tqdm
from training_command import options, prepare, run, train, training_parser

import sd
from sd.runtime.saving import save_model
from sd.training.editing import EncodedPairs, editing_config
from sd.training.jobs import denoiser_run
from sd.training.latents import encode_all
from sd.training.shapes.edits import PicturePairs
from sd.training.widening import widened


def main(arguments: list[str] | None = None) -> None:
    parser = training_parser(__doc__, batch_size=32, seed=3, save_every=100)
    add = parser.add_argument
    add("folder", type=Path, help="output folder")
    add("--model", type=Path, help="a model with four channels (default: the embedded model)")
    add("--pictures", type=int, default=4_800, help="two in each pair (default: %(default)s)")
    add("--steps", type=int, default=1_200, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=5e-4, help="(default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that prepare batches while a GPU trains (default: 0)")
    args = parser.parse_args(arguments)
    device = prepare(args)
    model = sd.load(args.model, device=str(device), precision="fp32")
    config = editing_config(model.config)
    networks = {"unet": widened(model.unet, config), "vae": model.vae, "text_encoder": model.text_encoder}
    networks["unet"].to(memory_format=torch.channels_last).requires_grad_(True)
    pairs = PicturePairs(args.seed, config.native_size)
    args.folder.mkdir(parents=True, exist_ok=True)
    latents = args.folder / "latents.safetensors"
    if not latents.exists():
        with tqdm(desc="encoding", total=args.pictures, unit="picture") as bar:
            encode_all(
                model.vae,
                pairs,
                args.pictures,
                latents,
                batch_size=args.batch_size,
                on_batch=bar.update,
                made_of=pairs.name,
            )
    rate, warmup = args.learning_rate, min(100, args.steps // 4)
    run = denoiser_run(
        config,
        networks,
        EncodedPairs(latents, pairs, args.seed),
        options(args, args.steps, rate, warmup=warmup, final_learning_rate=rate / 20, ema_decay=0.995),
        args.folder / "denoiser",
        batch_size=args.batch_size,
        seed=args.seed,
        prompt_dropout=0.0,  # the pairs leave out instructions and pictures themselves
        min_snr_gamma=5.0,
        snr_floor=1.0,
        noise_offset=0.25,
        workers=args.workers,
    )
    target = args.folder / "model.ckpt"

    def save(step: int) -> None:
        with run.ema.applied(run.module):
            save_model(target, config, networks, {}, step=step, dtype=torch.float16, merge=True)

    train(run, "denoiser", args.save_every, save)
    print(target)


if __name__ == "__main__":
    run(main)
