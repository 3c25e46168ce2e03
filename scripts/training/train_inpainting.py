"""Make an inpainting model with nine channels from the small model: widen its UNet and train it on masked pictures.

    python scripts/training/train_inpainting.py runs/inpainting
    python scripts/training/train_inpainting.py runs/inpainting --model runs/tiny/model.ckpt --steps 3000
    python scripts/training/score_inpainting.py runs/inpainting/model.ckpt scores/inpainting

The VAE and the text encoder stay unchanged. The same command resumes training. The result is `model.ckpt` in the
folder, in the original layout, for `sd inpaint`.
"""

from further_channels import parse, train_wider
from training_command import run

from sd.training.inpainting import inpainting_config, show_holes


def main(arguments: list[str] | None = None) -> None:
    args = parse(__doc__, arguments, pictures="each with one hole", count=6_400, steps=1_500)
    train_wider(
        args, inpainting_config, lambda config, vae, pictures: show_holes(vae, config.vae.latent_scale, pictures)
    )


if __name__ == "__main__":
    run(main)
