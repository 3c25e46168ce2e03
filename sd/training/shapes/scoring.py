"""Score how well a model trained on drawn shapes follows prompts that it has never seen.

The prompts ask for combinations held out of training. `analysis.py`, which does not know how the training pictures were
drawn, judges the results.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import nn

from sd.pipeline.image.tensors import to_images
from sd.training.shapes.analysis import analyse, background_shades, oklab
from sd.training.shapes.captions import plain_caption, with_article
from sd.training.shapes.drawing import ShapesDataset, render
from sd.training.shapes.judging import RELATIONS, Verdict, Wanted, follows
from sd.training.shapes.outlines import KNOWN, SHAPES
from sd.training.shapes.scenes import COMBINATIONS, HELD_OUT
from sd.training.shapes.subjects import HELD_OUT as SUBJECT_PAIRS

MEASURES = tuple(field.name for field in fields(Verdict))  # background, count, colour, shape, relation, all


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, the seed of its picture, and what the picture must show."""

    prompt: str
    seed: int
    wanted: Wanted


def request_for(shape: str, colour: str, behind: str, seed: int) -> Request:
    """ "a red circle on a blue background" """
    return Request(
        prompt=f"{with_article(f'{colour} {shape}')} on {with_article(behind)} background",
        seed=seed,
        wanted=Wanted(background=behind, things=((shape, colour),)),
    )


def one_thing(repeats: int) -> list[Request]:
    """Every held-out combination, `repeats` times with different seeds: "a red circle on a blue background"."""
    combinations = [each for each in COMBINATIONS if each in HELD_OUT] * repeats
    return [request_for(*combination, seed) for seed, combination in enumerate(combinations)]


def subjects(word: str, count: int) -> list[Request]:
    """Prompts for a subject in pairs of colours that its training never showed: "a red crescent on a blue background"

    word  crescent; or a look, which the eight shapes in turn are asked for in: "pastel, a red circle on a …"
    """
    requests = []
    for number in range(count):
        colour, behind = SUBJECT_PAIRS[number % len(SUBJECT_PAIRS)]
        shape = word if word in KNOWN else SHAPES[number % len(SHAPES)]
        request = request_for(shape, colour, behind, number)
        requests.append(request if shape == word else replace(request, prompt=f"{word}, {request.prompt}"))
    return requests


def two_things(each: int) -> list[Request]:
    """Held-out things of two colours, `each` requests per relation: "a red circle above a white star …"."""
    left = dict.fromkeys(RELATIONS, each)
    scenes = ShapesDataset(seed=1, size=0, held_out=True)
    requests = []
    number = 0
    while any(left.values()):
        scene, _ = scenes.describe(number)
        number += 1
        first, second = (*scene.things, *scene.things)[:2]
        if not left.get(scene.relation) or first.colour == second.colour:
            continue
        left[scene.relation] -= 1
        wanted = Wanted(
            background=scene.background.colour,
            things=tuple((thing.shape, thing.colour) for thing in scene.things),
            relation=scene.relation,
        )
        requests.append(Request(prompt=plain_caption(scene), seed=1000 + len(requests), wanted=wanted))
    return requests


def verdicts(pictures: Sequence[Image.Image], requests: Sequence[Request]) -> Iterator[Verdict]:
    for picture, request in zip(pictures, requests, strict=True):
        yield follows(analyse(np.asarray(picture.convert("RGB"))), request.wanted)


def pale(picture: Image.Image) -> bool:
    """Whether nearly all of a picture is pastel: even the smallest channel of each pixel is above 0.35 of the range."""
    return bool((np.asarray(picture.convert("RGB")).min(axis=2) > 90).mean() > 0.95)


def patterned(picture: Image.Image) -> bool:
    """Whether the background has two shades, 0.05 apart in OKLab, once a blur has removed the grain of a few steps."""
    smooth = picture.convert("RGB").resize((128, 128)).filter(ImageFilter.GaussianBlur(2))
    low, high = background_shades(oklab(np.asarray(smooth)))
    return bool(np.linalg.norm(high - low) > 0.05)


LOOKS = {"pastel": pale, "pinstripe": patterned}


def shares(judged: Sequence[Verdict]) -> dict[str, float]:
    """The share of pictures, 0 to 1, that are right in each measure; for the relation, of those that have one."""
    found = {}
    for measure in MEASURES:
        values = [getattr(verdict, measure) for verdict in judged if getattr(verdict, measure) is not None]
        if values:
            found[measure] = sum(values) / len(values)
    return found


@torch.no_grad()
def shuffle_words(text_encoder: nn.Module, seed: int) -> None:
    """Give every word the vector of another: whatever is still right is right by chance."""
    table = text_encoder.token_embedding.weight
    order = torch.randperm(
        len(table), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.int64, device="cpu"
    )
    table.copy_(table[order.to(table.device)])


@dataclass(frozen=True, kw_only=True)
class Repaint:
    """A picture, the part to repaint, and what the result must show."""

    picture: Image.Image
    mask: Image.Image  # L, 255 is repainted
    request: Request


def other_things(count: int, size: int) -> list[Repaint]:
    """Pictures of one thing with a square mask around it, and prompts for another thing there.

    Training shows neither combination.
    """
    scenes = ShapesDataset(3, size, held_out=True, kind="single")
    repaints = []
    for number in range(count):
        scene, _ = scenes.describe(number)
        (thing,) = scene.things
        behind = scene.background.colour
        others = [(shape, colour) for shape, colour, on in HELD_OUT if on == behind and colour != thing.colour]
        shape, colour = sorted(others)[number % len(others)]
        reach = thing.radius * 1.3
        box = [round(size * place) for place in (thing.x - reach, thing.y - reach, thing.x + reach, thing.y + reach)]
        mask = Image.new("L", (size, size))
        mask.paste(255, tuple(box))
        (picture,) = to_images(render([scene], size))
        repaints.append(Repaint(picture=picture, mask=mask, request=request_for(shape, colour, behind, number)))
    return repaints
