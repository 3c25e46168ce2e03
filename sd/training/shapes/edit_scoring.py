"""Score how well a model edits by instruction: whether it made the change, and kept the rest of the picture.

The instructions lead to combinations held out of training. `analysis.py`, which does not know how the training pictures
were drawn, must find the result's background, things and relation, and so the change and nothing else. The rest of the
picture is compared pixel by pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from sd.pipeline.image.tensors import to_images
from sd.training.shapes.captions import plain_caption
from sd.training.shapes.drawing import render
from sd.training.shapes.edits import CHANGES, KINDS, instruction, sample_pair
from sd.training.shapes.judging import Wanted
from sd.training.shapes.scenes import Scene
from sd.training.shapes.scoring import Request, verdicts

EDGE = 1 / 64  # of the picture's side: how far from the change a pixel must be to count as the rest; edges are soft
LEAST_PSNR = 25.0  # in dB, of the rest


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A picture, what to do with it, and what must come of it."""

    what: str  # one of CHANGES
    instruction: str
    picture: Image.Image
    rest: NDArray[np.bool_]  # (H, W), the pixels that must not change
    result: Request  # its prompt is the result's caption, for a model that knows captions only


@dataclass(frozen=True, kw_only=True)
class EditVerdict:
    followed: bool  # the result shows what the instruction asks for, and everything else that the picture showed
    psnr: float  # of the rest, in dB

    @property
    def kept(self) -> bool:
        return self.psnr >= LEAST_PSNR


def edit_of(before: Scene, after: Scene, what: str, size: int, generator: Random, seed: int) -> Edit:
    pictures = render([before, after], size)
    changed = (pictures[0] != pictures[1]).any(dim=0).float()
    reach = round(EDGE * size)
    near = F.max_pool2d(changed[None, None], 2 * reach + 1, stride=1, padding=reach)[0, 0]
    wanted = Wanted(
        background=after.background.colour,
        things=tuple((thing.shape, thing.colour) for thing in after.things),
        relation=after.relation,
    )
    return Edit(
        what=what,
        instruction=instruction(before, after, generator),
        picture=to_images(pictures[:1])[0],
        rest=(near == 0).numpy(),
        result=Request(prompt=plain_caption(after), seed=seed, wanted=wanted),
    )


def new_edits(count: int, size: int, seed: int = 0, kinds: Sequence[str] = KINDS) -> list[Edit]:
    """As many edits, of each change in turn, to combinations that training never shows. kinds: of scenes"""
    edits = []
    for number in range(count):
        generator, what = Random(f"edit {seed} {number}"), list(CHANGES)[number % len(CHANGES)]
        edits.append(edit_of(*sample_pair(generator, what, held_out=True, kinds=kinds), what, size, generator, number))
    return edits


def psnr(one: Image.Image, other: Image.Image, where: NDArray[np.bool_]) -> float:
    """Peak signal-to-noise ratio of the pixels at True, in dB; infinite if they are the same."""
    first, second = (np.asarray(each.convert("RGB"), np.float64)[where] for each in (one, other))
    error = np.square(first - second).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def judge(results: Sequence[Image.Image], edits: Sequence[Edit]) -> list[EditVerdict]:
    followed = verdicts(results, [edit.result for edit in edits])
    return [
        EditVerdict(followed=verdict.all, psnr=psnr(result, edit.picture, edit.rest))
        for verdict, result, edit in zip(followed, results, edits, strict=True)
    ]
