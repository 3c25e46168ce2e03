"""Make a model for depth to image from the small model: widen its UNet and train it on pictures and their depth maps.

    python scripts/training/train_depth.py runs/depth
    python scripts/training/train_depth.py runs/more --model runs/depth/model.ckpt --steps 700      # train it further
    python scripts/training/score_depth.py runs/depth/model.ckpt scores/depth

The VAE and the text encoder stay unchanged. The same command resumes training. The result is `model.ckpt` in the
folder, in the original layout, for `sd depth2img --depth MAP`: it has no depth network.
"""

from further_channels import parse, train_wider
from training_command import run

from sd.training.depth import ScenesWithDepth, depth_config, show_depth


def main(arguments: list[str] | None = None) -> None:
    args = parse(__doc__, arguments, pictures="each with one depth map", count=3_200, steps=600, learning_rate=5e-4)
    train_wider(
        args,
        depth_config,
        lambda config, vae, pictures: show_depth(config.vae.factor, pictures),
        pictures_of=ScenesWithDepth,
        ema_decay=0.995,
    )


if __name__ == "__main__":
    run(main)
