"""Measure whether heat maps mean something: does a word's map point to its thing?

    python scripts/training/score_heat_maps.py scores/                       # the embedded model
    python scripts/training/score_heat_maps.py scores/ --model model.ckpt --count 20

Prompts ask for two neighbouring things of different shapes and colours. Plain image analysis finds them in the picture
by colour; pictures that do not show each colour exactly once are left out and counted. A word's heat map is that of `sd
explain`: the mean over all 16 cross-attention layers, heads and steps. A word is right if its map has a larger mean
inside its own thing's box than inside the other's; with means, the larger thing has no advantage. Writes a table,
`heat-maps.md`, and a sheet of pictures with the maps of both shapes' words, `heat-maps.png`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from training_command import parser_of

import sd
from sd.files import written_whole
from sd.pipeline.image.tensors import contact_sheet
from sd.pipeline.settings import Settings
from sd.study.benchmark.table import markdown
from sd.study.explain.recording import Run, explain
from sd.training.shapes.analysis import Thing, analyse
from sd.training.shapes.scoring import Request, two_things

SHOWN = 8  # pictures on the sheet
KINDS = ("shape", "colour", "both words")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One picture, and whether the words' maps point to their things."""

    picture: Image.Image
    maps: tuple[Tensor, Tensor]  # (H, W) of the shapes' words
    right: dict[str, tuple[bool, bool]]  # by kind of word


def requests_for(count: int) -> list[Request]:
    """Prompts of two things beside each other, of two shapes and two colours that differ from the background's."""
    found = [
        each
        for each in two_things(count)
        if each.wanted.relation != "inside"
        and len({shape for shape, _ in each.wanted.things}) == 2
        and len({each.wanted.background, *(colour for _, colour in each.wanted.things)}) == 3
    ]
    return found[:count]


def word_heat(run: Run, words: Sequence[str], size: int) -> dict[str, Tensor]:
    """The heat map (size, size) of each word: the mean over layers, heads and steps."""
    (strip,) = run.strips
    texts = {"".join(strip.columns[i].text for i in word).strip(): word for word in strip.words}
    total = {word: torch.zeros(size, size) for word in words}
    layers = 0
    for step in run.steps:
        for heat in step.heats:
            layers += heat.layers
            for word in words:
                weights = heat.weights[:, list(texts[word])].sum(dim=1).mean(dim=0)  # -> (h, w)
                total[word] += heat.layers * F.interpolate(weights[None, None], (size, size), mode="bilinear")[0, 0]
    return {word: heat / layers for word, heat in total.items()}


def mean_inside(heat: Tensor, thing: Thing) -> float:
    """The mean of a map (H, W) inside a thing's box."""
    height, width = heat.shape
    left, top, right, bottom = thing.box
    rows = slice(int(top * height), max(int(top * height) + 1, round(bottom * height)))
    columns = slice(int(left * width), max(int(left * width) + 1, round(right * width)))
    return heat[rows, columns].mean().item()


def judge(run: Run, request: Request) -> Judged | None:
    """None where the picture does not show the two things."""
    seen = analyse(np.asarray(run.picture)).things
    places = [[thing for thing in seen if thing.colour == colour] for _, colour in request.wanted.things]
    if [len(found) for found in places] != [1, 1]:
        return None
    things = [found[0] for found in places]
    words = [word for pair in request.wanted.things for word in pair]
    heats = word_heat(run, words, run.picture.width)
    right: dict[str, tuple[bool, bool]] = {}
    for kind, index in zip(KINDS, (slice(0, 1), slice(1, 2), slice(0, 2)), strict=True):
        verdicts = []
        for i, pair in enumerate(request.wanted.things):
            heat = sum(heats[word] for word in pair[index])
            verdicts.append(mean_inside(heat, things[i]) > mean_inside(heat, things[1 - i]))
        right[kind] = tuple(verdicts)
    maps = tuple(heats[shape] for shape, _ in request.wanted.things)
    return Judged(picture=run.picture, maps=maps, right=right)


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """The picture in grey, with the map in red over it."""
    share = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    mask = Image.fromarray((255 * share).round().to(torch.uint8).numpy())
    faded = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.4)
    faded.paste((215, 25, 28), mask=mask)
    return faded


def table(judged: Sequence[Judged], left_out: int) -> str:
    rows = []
    for kind in KINDS:
        verdicts = [verdict for each in judged for verdict in each.right[kind]]
        share = f"{100 * sum(verdicts) / len(verdicts):.1f} %" if verdicts else ""
        rows.append([kind, share, str(len(verdicts))])
    left = f"\n{len(judged)} pictures; {left_out} more did not show both colours once.\n"
    return markdown(["words", "right", "of"], rows) + left


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="output folder")
    add("--model", type=Path, help="a checkpoint (default: the embedded model)")
    add("--count", type=int, default=100, help="prompts (default: %(default)s)")
    add("--steps", type=int, default=20, help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    model = sd.load(args.model)
    size = model.config.native_size
    judged, left_out = [], 0
    for request in tqdm(requests_for(args.count), unit="picture", leave=False):
        settings = Settings(prompt=request.prompt, seed=request.seed, width=size, height=size, steps=args.steps)
        found = judge(explain(model, settings), request)
        left_out += found is None
        judged += [found] if found else []
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = [[each.picture for each in judged[:SHOWN]]]
    rows += [[overlay(each.picture, each.maps[i]) for each in judged[:SHOWN]] for i in (0, 1)]
    if judged:
        with written_whole(args.folder / "heat-maps.png", force=True) as file:
            contact_sheet([one for row in rows for one in row], len(rows[0])).save(file, "PNG", optimize=True)
    (args.folder / "heat-maps.md").write_text(table(judged, left_out))
    print(table(judged, left_out), end="")


if __name__ == "__main__":
    main()
