"""Make a small Stable Diffusion XL from the small model: two text encoders, a UNet of three levels, and train the UNet.

    python scripts/training/train_xl.py runs/xl
    python scripts/training/train_xl.py runs/two --model runs/xl/model.ckpt --scenes all   # go on with two things
    sd txt2img "a red circle on a blue background" -m runs/xl/model.ckpt

The networks begin with the small model's weights, see `sd/training/small_xl.py`; of them, the UNet is trained. The same
command resumes training. The result is `model.ckpt` in the folder, in the original layout; it is also written at every
saved state.
"""

from functools import partial

from further_channels import parse, train_wider
from torch import nn
from training_command import run

from sd.config import ModelConfig
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.training.shapes.drawing import ShapesDataset
from sd.training.small_xl import networks_from, xl_config


def main(arguments: list[str] | None = None) -> None:
    args = parse(
        __doc__,
        arguments,
        pictures="to train on",
        count=6_400,
        steps=2_800,
        scenes="single",
        seed=4,
        save_every=100,
        learning_rate=7e-4,
    )

    def config_from(config: ModelConfig) -> ModelConfig:
        return config if config.text_encoder_2 else xl_config(config)

    def networks_of(model: StableDiffusion, config: ModelConfig) -> dict[str, nn.Module]:
        if config is model.config:
            return {part: getattr(model, part) for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
        return networks_from(model, config, args.seed)

    train_wider(
        args,
        config_from,
        networks_from=networks_of,
        pictures_of=partial(ShapesDataset, kind=args.scenes),
        ema_decay=0.995,
    )


if __name__ == "__main__":
    run(main)
