"""Make a small Stable Diffusion XL from the small model: two text encoders, a UNet of three levels, and train the UNet.

    python scripts/training/train_xl.py runs/xl
    sd txt2img "a red circle on a blue background" -m runs/xl/model.ckpt

The networks begin with the small model's weights, see `sd/training/small_xl.py`; of them, the UNet is trained. The same
command resumes training. The result is `model.ckpt` in the folder, in the original layout; it is also written at every
saved state.
"""

from functools import partial

from further_channels import parse, train_wider
from training_command import run

from sd.training.shapes.drawing import ShapesDataset
from sd.training.small_xl import networks_from, xl_config


def main(arguments: list[str] | None = None) -> None:
    args = parse(
        __doc__,
        arguments,
        pictures="each of one thing",
        count=6_400,
        steps=4_000,
        seed=4,
        save_every=100,
        learning_rate=7e-4,
    )
    train_wider(
        args,
        xl_config,
        networks_from=partial(networks_from, seed=args.seed),
        pictures_of=partial(ShapesDataset, kind="single"),
        ema_decay=0.995,
    )


if __name__ == "__main__":
    run(main)
