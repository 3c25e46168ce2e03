"""Draw the figures of docs/course, from the embedded model, its adapters and the log of its training.

    python scripts/figures/draw_course.py                               # all of them, into docs/course/figures
    python scripts/figures/draw_course.py noise-levels.svg tokens.png   # some of them
    python scripts/figures/draw_course.py --model other.ckpt --out /tmp/figures
    python scripts/figures/draw_course.py singular-values.svg --tuned runs/crescents/model.ckpt

The same model gives the same bytes on the same machine. If a figure cannot be drawn, it is named and the exit code is
3. What needs a fine-tuned model is drawn only if one is given; course_adapters.py says how it was made.
"""

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import course_adapters
import course_pictures
import course_plots
import torch

import sd
from convert.errors import CheckpointError
from sd.files import written_whole

ROOT = Path(__file__).parents[2]
FIGURES_FOLDER = ROOT / "docs" / "course" / "figures"
WEIGHTS_FOLDER = ROOT / "weights"
TRAINING_FOLDER = WEIGHTS_FOLDER / "training"


class Figure(NamedTuple):
    needs: str  # "nothing"; a "model", also with its "adapters" or with a "tuned" one; the folder of its "training"
    draw: Callable[..., bytes]  # takes what it needs


FIGURES = {
    "pairs-of-places.svg": Figure("nothing", course_plots.pairs_of_places),
    "picture-and-latents.png": Figure("model", course_pictures.picture_and_latents),
    "vae-round-trip.png": Figure("model", course_pictures.vae_round_trip),
    "vae-between.png": Figure("model", course_pictures.vae_between),
    "latent-values.svg": Figure("model", course_plots.latent_values),
    "tokens.png": Figure("nothing", course_pictures.tokens),
    "causal-attention.svg": Figure("model", course_plots.causal_attention),
    "timestep-embedding.svg": Figure("nothing", course_plots.timestep_embeddings),
    "word-attention.png": Figure("model", course_pictures.word_attention),
    "noise-levels.svg": Figure("nothing", course_plots.noise_levels),
    "denoising.png": Figure("model", course_pictures.denoising),
    "sampler-errors.svg": Figure("nothing", course_plots.sampler_errors),
    "guidance-arrows.svg": Figure("nothing", course_plots.guidance_arrows),
    "guidance-scales.png": Figure("model", course_pictures.guidance_scales),
    "training-loss.svg": Figure("training", course_plots.training_loss),
    "training-samples.png": Figure("training", course_pictures.training_samples),
    "loss-by-timestep.svg": Figure("model", course_plots.loss_by_timestep),
    "strengths.png": Figure("model", course_pictures.strengths),
    "inpainting.png": Figure("model", course_pictures.inpainting),
    "checkpoint-bytes.svg": Figure("nothing", course_plots.checkpoint_bytes),
    "singular-values.svg": Figure("tuned", course_adapters.singular_values),
    "lora-strengths.png": Figure("adapters", course_adapters.lora_strengths),
    "word-and-lora.png": Figure("adapters", course_adapters.word_and_lora),
}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"which (default: all): {', '.join(FIGURES)}")
    parser.add_argument("--model", type=Path, help="a checkpoint (default: the embedded model)")
    parser.add_argument(
        "--training", type=Path, default=TRAINING_FOLDER, help="folder of its training by train_tiny.py"
    )
    parser.add_argument(
        "--adapters", type=Path, default=WEIGHTS_FOLDER, help="folder of those that come with the model"
    )
    parser.add_argument("--tuned", type=Path, help="a fine-tune of the model")
    parser.add_argument("--out", type=Path, default=FIGURES_FOLDER, help="folder for the figures")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.figures if name not in FIGURES]:
        parser.error(f"{unknown[0]} is not a figure; there are {', '.join(FIGURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("Plots need matplotlib. Install it: pip install '.[plots]'", file=sys.stderr)
        return 2

    @cache
    def given(needs: str) -> tuple:
        if needs == "model":
            return (sd.load(args.model, device="cpu", precision="fp32"),)
        if needs == "adapters":
            return (*given("model"), args.adapters)
        if needs == "tuned":
            if args.tuned is None:
                raise FileNotFoundError("it needs a fine-tuned model; give one by --tuned")
            return (*given("model"), sd.load(args.tuned, device="cpu", precision="fp32"))
        return (args.training,) if needs == "training" else ()

    left_out = []
    for name in args.figures or [name for name in FIGURES if args.tuned or FIGURES[name].needs != "tuned"]:
        figure = FIGURES[name]
        try:
            data = figure.draw(*given(figure.needs))
        except (FileNotFoundError, CheckpointError) as problem:
            if figure.needs in ("nothing", "model"):
                raise
            left_out.append(f"{name} is not drawn: {problem}")
            continue
        args.out.mkdir(parents=True, exist_ok=True)
        with written_whole(args.out / name, force=True) as file:
            file.write(data)
        print(args.out / name)
    for line in left_out:
        print(line, file=sys.stderr)
    return 3 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
