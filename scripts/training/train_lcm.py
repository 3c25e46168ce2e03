"""Distil a checkpoint to a few steps without guidance: an LCM-LoRA.

    python scripts/training/train_lcm.py model.ckpt photos/ runs/lcm --guidance-scale 7.5
    python scripts/training/train_lcm.py weights/sd-shapes.ckpt shapes runs/lcm

The model teaches an adapter beside it (`sd.training.losses.ConsistencyLoss`). The pictures are those that it was
trained on, or similar ones, captioned as for train_lora.py; `shapes` draws those of the embedded model. Folder and
result are as there. Name the folder lcm or the like: programs know few-step adapters by name.
"""

import torch
from adapter_command import TrainingPictures, adapter_parser, falling, load_frozen, train_to_the_end
from train_lora import add_ranks, check_ranks, finish, low_rank_adapter
from training_command import run

from convert.families.few_steps import LCM
from sd.config import SD_V1, ModelConfig
from sd.training.consistency import consistency_run


def check(name: object, config: ModelConfig) -> None:
    """Raise ValueError for models that cannot be distilled here."""
    if config.unet.guidance_width:
        raise ValueError(f"{name} is a latent consistency model already. Give the model that it was made from.")
    if config.unet.in_channels != config.vae.latent_channels:
        raise ValueError(
            f"{name} is {config.family}; only models that make pictures from text alone are distilled. "
            "Give one of those."
        )


def main(arguments: list[str] | None = None) -> None:
    parser = adapter_parser(__doc__, steps=1000, learning_rate=1e-4)
    add = parser.add_argument
    add("--guidance-scale", type=float, default=7.5, help="of the teacher (default: %(default)s)")
    add("--grid", type=int, default=50, help="steps of the teacher from noise to picture (default: %(default)s)")
    add("--noise-offset", type=float, default=0.0, help="as the model was trained with (default: %(default)s)")
    add_ranks(parser)
    args = parser.parse_args(arguments)
    check_ranks(args)
    if not 1 <= args.grid <= SD_V1.schedule.timesteps:
        raise ValueError(f"--grid {args.grid} is out of range: 1 to {SD_V1.schedule.timesteps}")
    model, networks = load_frozen(args)
    check(args.model, model.config)
    networks["unet"].to(torch.float32, memory_format=torch.channels_last)  # convolutions are as in the file
    pictures = TrainingPictures(args, model)
    adapter = low_rank_adapter(args, model, networks, text_encoder=False)
    training = consistency_run(
        model.config,
        networks,
        pictures.encoded,
        falling(args),
        args.folder,
        adapter=adapter,
        batch_size=args.batch_size,
        seed=args.seed,
        guidance_scale=args.guidance_scale,
        grid=args.grid,
        noise_offset=args.noise_offset,
    )
    settings = {"sampler": LCM.sampler, "steps": LCM.steps, "guidance_scale": LCM.guidance}
    train_to_the_end(args, model, pictures, training, **settings)
    comment = f"LCM-LoRA, distilled with guidance scale {args.guidance_scale:g}. Recommended: {LCM.flags}"
    finish(args, model, pictures, adapter, training, {"ss_training_comment": comment})


if __name__ == "__main__":
    run(main)
