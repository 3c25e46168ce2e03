"""Whether a picture, as `analysis.py` describes it, shows what a prompt asks for."""

from dataclasses import dataclass
from itertools import permutations

from sd.training.shapes.analysis import COLOURS, Picture, Thing
from sd.training.shapes.outlines import KNOWN

RELATIONS = ("left of", "right of", "above", "below", "inside")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the prompt asks for: "a red circle left of a blue square on white" has things[0] left of things[1]."""

    background: str
    things: tuple[tuple[str, str], ...]  # (shape, colour) of each
    relation: str | None = None  # one of RELATIONS, from the first thing to the second

    def __post_init__(self) -> None:
        unknown = {self.background, *(colour for _, colour in self.things)} - set(COLOURS)
        unknown |= {shape for shape, _ in self.things} - set(KNOWN)
        unknown |= {self.relation} - {None, *RELATIONS}
        if unknown:
            raise ValueError(f"cannot measure {unknown}; the words are {KNOWN}, {COLOURS} and {RELATIONS}")
        if self.relation and len(self.things) != 2:
            raise ValueError(f"{self.relation!r} relates two things, got {len(self.things)}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    background: bool
    count: bool  # exactly as many things as wanted
    colour: bool  # of every thing
    shape: bool  # of every thing
    relation: bool | None  # None if none is wanted
    all: bool


def related(relation: str, things: tuple[Thing, ...], first: int, second: int) -> bool:
    """Whether the relation holds from the first to the second of a picture's things."""
    if relation == "inside":
        return second in things[first].inside
    if second in things[first].inside or first in things[second].inside:
        return False
    right = things[first].centre[0] - things[second].centre[0]
    down = things[first].centre[1] - things[second].centre[1]
    along, aside = {
        "left of": (-right, down),
        "right of": (right, down),
        "above": (-down, right),
        "below": (down, right),
    }[relation]
    return along > abs(aside)


def follows(picture: Picture, wanted: Wanted) -> Verdict:
    """Compare a picture with what was wanted. If it has too many things, the largest are judged and the count is wrong.

    Words and things are matched in the picture's favour.
    """
    things, number = picture.things, len(wanted.things)
    verdicts = []
    for order in permutations(range(min(number, len(things)))):
        pairs = [(things[i], words) for i, words in zip(order, wanted.things, strict=False)]
        complete = len(pairs) == number
        background, count = picture.background == wanted.background, len(things) == number
        colour = complete and all(thing.colour == colour for thing, (_, colour) in pairs)
        shape = complete and all(thing.shape == shape for thing, (shape, _) in pairs)
        relation = None if wanted.relation is None else complete and related(wanted.relation, things, *order)
        verdicts.append(
            Verdict(
                background=background,
                count=count,
                colour=colour,
                shape=shape,
                relation=relation,
                all=background and count and colour and shape and relation is not False,
            )
        )
    return max(verdicts, key=lambda verdict: (verdict.all, verdict.colour + verdict.shape, verdict.relation or False))
