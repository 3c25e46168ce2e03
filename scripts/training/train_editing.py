"""Make a model that edits by instruction from the small model: widen its UNet and train it on pairs of pictures.

    python scripts/training/train_editing.py runs/editing
    python scripts/training/score_editing.py runs/editing/model.ckpt scores/editing

The VAE stays unchanged; the text encoder, which knows captions only, is trained too. The same command resumes
training. `model.ckpt` in the folder, in the original layout, is for `sd edit`; it is also written at every saved state.
"""

from further_channels import parse, train_wider
from training_command import run

from sd.training.editing import EncodedPairs, editing_config
from sd.training.shapes.edits import PicturePairs


def main(arguments: list[str] | None = None) -> None:
    args = parse(
        __doc__,
        arguments,
        pictures="two in each pair",
        count=4_800,
        steps=1_600,
        seed=3,
        save_every=100,
        learning_rate=5e-4,
    )
    train_wider(
        args,
        editing_config,
        pictures_of=PicturePairs,
        encoded_of=EncodedPairs,
        ema_decay=0.995,
        prompt_dropout=0.0,  # the pairs leave out instructions and pictures themselves
        snr_floor=1.0,
        train_text_encoder=True,
    )


if __name__ == "__main__":
    run(main)
