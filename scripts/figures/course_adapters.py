"""The figures of the course's chapter on adapters: each function returns the bytes of a PNG or an SVG."""

from collections.abc import Sequence
from pathlib import Path

import torch
from course_pictures import png, run_settings, sheet
from course_plots import drawn
from PIL import Image
from torch import Tensor

from sd.pipeline.stable_diffusion import StableDiffusion

COLOURS = {"fine-tune's difference": "tab:blue", "weights before": "tab:orange", "random numbers": "tab:green"}
RANKS = (1, 2, 4, 8, 16, 32, 64)
STRENGTHS = (0.0, 0.5, 1.0, 1.5)
PROMPTS = (
    "a red crescent on a purple background",
    "a green crescent on a white background",
    "a blue cross on a yellow background",
)
WITH_WORD = ("pinstripe, a red crescent on a purple background", "pinstripe, a blue star on a yellow background")


def lora_strengths(model: StableDiffusion, folder: Path) -> bytes:
    """A LoRA at several strengths, on what it was trained for and on something else."""
    (lora,) = existing(folder, "crescent")
    columns = []
    for strength in STRENGTHS:
        model.apply([(lora, strength)])
        columns.append(pictures_of(model, PROMPTS))
    model.apply([])
    return png(sheet(list(zip(*columns, strict=True)), [f"strength {strength:g}" for strength in STRENGTHS], PROMPTS))


def word_and_lora(model: StableDiffusion, folder: Path) -> bytes:
    """A learned word and a LoRA, each alone and both together."""
    lora, word = existing(folder, "crescent", "pinstripe")
    columns = []
    for loras, words in (([], []), ([], [word]), ([lora], []), ([lora], [word])):
        model.apply(loras)
        model.learn(words)
        columns.append(pictures_of(model, WITH_WORD))
    model.apply([])
    model.learn([])
    return png(sheet(list(zip(*columns, strict=True)), ["neither", "the word", "the LoRA", "both"], WITH_WORD))


def existing(folder: Path, *names: str) -> list[Path]:
    paths = [folder / f"{name}.safetensors" for name in names]
    if missing := [path for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{missing[0]} does not exist; it belongs to the embedded model")
    return paths


def pictures_of(model: StableDiffusion, prompts: Sequence[str]) -> list[Image.Image]:
    return [model.make([run_settings(model, prompt=prompt)])[0] for prompt in prompts]


def spectra(model: StableDiffusion, tuned: StableDiffusion) -> dict[str, list[Tensor]]:
    """The singular values of all matrices of the UNet's attention blocks, for each of COLOURS.

    The random numbers have the differences' shapes and norms.
    """
    before, generator = dict(model.unet.named_parameters()), torch.Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {label: [] for label in COLOURS}
    for name, weight in tuned.unet.named_parameters():
        if ".attention." not in name or weight.ndim == 1:
            continue
        old = before[name].float()
        difference = weight.float() - old
        random = torch.randn(weight.shape, generator=generator)
        matrices = difference, old, random * (difference.norm() / random.norm())
        for values, matrix in zip(found.values(), matrices, strict=True):
            values.append(torch.linalg.svdvals(matrix))
    return found


def singular_values(model: StableDiffusion, tuned: StableDiffusion) -> bytes:
    """How near a fine-tune's differences are to a low rank.

    A rank's share is that of the squared norm, of all matrices together. The fine-tune was trained on a folder of 640
    pictures and their captions, those of `SubjectPictures("crescents", seed=0, size=128)`:

        python scripts/training/finetune.py weights/sd-shapes.ckpt crescents/ runs/crescents --steps 400 \\
            --learning-rate 1e-3 --batch-size 8 --seed 1 --min-snr-gamma 5 --ema-decay 0.98
    """
    found = spectra(model, tuned)
    shares = {
        label: [sum(s[:rank].square().sum() for s in values) / sum(s.square().sum() for s in values) for rank in RANKS]
        for label, values in found.items()
    }

    def draw(upper, lower):
        for label in ("fine-tune's difference", "random numbers"):
            values = found[label][len(found[label]) // 2]
            upper.plot(range(1, len(values) + 1), values.tolist(), marker=".", color=COLOURS[label], label=label)
        upper.set(xlabel="number", ylabel="singular value", title=f"one matrix with {len(values)} singular values")
        for label, share in shares.items():
            percent = [100 * part.item() for part in share]
            lower.plot(RANKS, percent, marker="o", markersize=4, color=COLOURS[label], label=label)
        lower.set_xscale("log")
        lower.set_xticks(RANKS, [str(rank) for rank in RANKS])
        lower.minorticks_off()
        lower.set(xlabel="rank", ylabel="share held, %", ylim=(0, 103), title=f"all {len(found[label])} matrices")
        upper.legend(fontsize=8)
        lower.legend(fontsize=8, loc="lower right")

    return drawn(draw, rows=2, size=(5.2, 5.8))
