"""Draw docs/denoising.png: what the UNet sees and what it predicts at each step, with the embedded model.

python scripts/figures/draw_denoising.py docs/denoising.png
"""

import sys
from pathlib import Path

import torch
from course_pictures import png, run_settings, sheet

import sd
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.study.explain.recording import explain

PROMPT = "a red circle to the left of a white star on a blue background"
SEED, STEPS = 1, 12


def denoising(model: StableDiffusion) -> bytes:
    """Two rows: the noisy latents of some steps, decoded, and the picture predicted from each; the result last."""
    run = explain(model, run_settings(model, prompt=PROMPT, seed=SEED, steps=STEPS), attention=False)
    steps = [run.steps[i] for i in (0, 4, 8, 11)]
    rows = [
        [*model.decode(torch.cat([step.x_t for step in steps])), run.picture],
        model.decode(torch.cat([step.x_0.float() for step in steps])),
    ]
    titles = [*(f"step {step.number}" for step in steps), "picture"]
    return png(sheet(rows, titles, ["the noisy latents, decoded", "the picture predicted from them"]))


def main() -> None:
    (out,) = sys.argv[1:]
    Path(out).write_bytes(denoising(sd.load()))
    print(out)


if __name__ == "__main__":
    main()
