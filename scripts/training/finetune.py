"""Train a checkpoint further, on a folder of pictures and captions, and write it in the original layout.

    python scripts/training/finetune.py model.ckpt photos/ runs/photos --steps 2000
    torchrun --nproc-per-node 2 scripts/training/finetune.py model.ckpt photos/ runs/photos

Each picture's caption is in a .txt file of the same name, or all captions in metadata.jsonl. The output folder holds
the state, the losses (`loss.csv`) and sample pictures; the same command resumes training. The result is
`model.ckpt` there, with both the plain and the averaged (EMA) weights.

A full-size model in float32 needs about 17 GB of memory for weights, average, gradients and optimiser, and as much disk
for the state.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from training_command import parser_of, run, use_fast_products

import sd
from sd.files import written_whole
from sd.pipeline.image.tensors import contact_sheet
from sd.pipeline.settings import Settings
from sd.runtime.cpu.process_memory import keep_freed_memory
from sd.runtime.device import pick_device
from sd.runtime.saving import save_model
from sd.training.folder import PictureFolder
from sd.training.jobs import denoiser_run, each_step
from sd.training.latents import EncodedAsTheyCome
from sd.training.loop import TrainingOptions

SAMPLES = 9


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("model", type=Path, help="the checkpoint to begin with")
    add("pictures", type=Path, help="folder of pictures and captions")
    add("folder", type=Path, help="output folder")
    add("--steps", type=int, default=1000, help="(default: %(default)s)")
    add("--batch-size", type=int, default=4, help="over all processes (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-5, help="(default: %(default)s)")
    add("--size", type=int, help="pixels of a side, a multiple of 8 (default: the model's native size)")
    add("--prompt-dropout", type=float, default=0.1, help="share of pictures trained without caption (default: 0.1)")
    add("--min-snr-gamma", type=float, help="weight the timesteps; 5 is usual (default: equal weights)")
    add("--train-text-encoder", action="store_true", help="also train the text encoder")
    add("--ema-decay", type=float, default=0.9999, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--device", default="auto", help="(default: %(default)s)")
    add("--autocast", action="store_true", help="bfloat16 in the forward pass, for devices that are fast at it")
    add("--save-every", type=int, default=250, help="steps (default: %(default)s)")
    add("--sample-every", type=int, default=250, help="steps (default: %(default)s)")
    add("--half", action="store_true", help="write the result in float16, half the size")
    args = parser.parse_args(arguments)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    first = not dist.is_initialized() or dist.get_rank() == 0
    keep_freed_memory()
    use_fast_products(pick_device(args.device))
    model = sd.load(args.model, device=pick_device(args.device).type, precision="fp32")
    size = args.size or model.config.native_size
    pictures = PictureFolder(args.pictures, size, args.seed)
    networks = {part: getattr(model, part).requires_grad_(True) for part in ("unet", "vae", "text_encoder")}
    networks["vae"].requires_grad_(False)
    networks["unet"].to(memory_format=torch.channels_last)  # on the CPU, it is as in the file
    options = TrainingOptions(
        steps=args.steps,
        learning_rate=args.learning_rate,
        warmup=min(100, args.steps // 10),
        final_learning_rate=args.learning_rate,
        weight_decay=0.01,
        gradient_clip=1.0,
        ema_decay=args.ema_decay,
        autocast=args.autocast,
        save_every=args.save_every,
    )
    run = denoiser_run(
        model.config,
        networks,
        EncodedAsTheyCome(model.vae, pictures),
        options,
        args.folder,
        batch_size=args.batch_size,
        seed=args.seed,
        prompt_dropout=args.prompt_dropout,
        min_snr_gamma=args.min_snr_gamma,
        train_text_encoder=args.train_text_encoder,
    )
    prompts = [pictures.captions[name] for name in pictures.names[:SAMPLES]]
    batch = [Settings(prompt=prompt, seed=i, width=size, height=size) for i, prompt in enumerate(prompts)]

    def show(step: int) -> None:
        if first:
            with run.ema.applied(run.module), written_whole(args.folder / f"samples-{step:06}.png", force=True) as file:
                contact_sheet([picture for job in batch for picture in model.make([job])]).save(file, "PNG")

    with tqdm(desc="denoiser", total=args.steps, initial=run.step, disable=not first) as bar:
        each_step(run, args.sample_every, show, bar.update)
    if first:
        dtype = torch.float16 if args.half else torch.float32
        target = args.folder / "model.ckpt"
        save_model(target, model.config, networks, run.ema.weights, step=run.step, dtype=dtype, merge=False)
        print(target)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
