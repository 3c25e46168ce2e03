"""Pairs of scenes that differ in one respect, and the instruction that leads from one to the other.

Drawn in place of the pairs that Brooks et al., "InstructPix2Pix" (2023), section 3.1, generate with other models.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from sd.training.shapes.captions import with_article
from sd.training.shapes.drawing import render
from sd.training.shapes.scenes import (
    COLOURS,
    HELD_OUT,
    HOLDERS,
    LARGEST_TURN,
    SHAPES,
    Scene,
    Thing,
    combinations,
    sample_scene,
    vary,
)

KINDS = ("single", "pairs")  # of scenes
TO_COLOUR = ("make {it} {new}", "turn {it} {new}", "change {it} to {new}")
TO_SHAPE = ("turn {it} into {new}", "change {it} into {new}", "make {it} {new}", "replace {it} with {new}")


def with_thing(scene: Scene, index: int, thing: Thing) -> Scene:
    things = (*scene.things[:index], thing, *scene.things[index + 1 :])
    return replace(scene, things=things)


def other_colour(scene: Scene, generator: Random) -> Scene:
    index, colour = generator.randrange(len(scene.things)), generator.choice(list(COLOURS))
    return with_thing(scene, index, replace(scene.things[index], colour=colour, rgb=vary(generator, COLOURS[colour])))


def other_shape(scene: Scene, generator: Random) -> Scene:
    """The new shape is where the old one was, as large, and turned as far as such a shape may be."""
    index, shape = generator.randrange(len(scene.things)), generator.choice(SHAPES)
    thing, turn = scene.things[index], LARGEST_TURN.get(shape, max(LARGEST_TURN.values()))
    return with_thing(scene, index, replace(thing, shape=shape, angle=min(max(thing.angle, -turn), turn)))


def other_background(scene: Scene, generator: Random) -> Scene:
    colour = generator.choice(list(COLOURS))
    rgb = vary(generator, COLOURS[colour])
    return replace(scene, background=replace(scene.background, colour=colour, rgb=rgb, second_rgb=rgb))


CHANGES: dict[str, Callable[[Scene, Random], Scene]] = {
    "colour": other_colour,
    "shape": other_shape,
    "background": other_background,
}


def what_changed(before: Scene, after: Scene) -> tuple[str, int]:
    """One of CHANGES, and which thing is another; 0 for the background. Raises ValueError if nothing changed."""
    if before.background.colour != after.background.colour:
        return "background", 0
    for index, (old, new) in enumerate(zip(before.things, after.things, strict=True)):
        if old.colour != new.colour:
            return "colour", index
        if old.shape != new.shape:
            return "shape", index
    raise ValueError("the two scenes have the same colours and shapes")


def instruction(before: Scene, after: Scene, generator: Random) -> str:
    """A randomly worded instruction: "make the circle green". It names a thing's colour at random, or if it must."""
    what, index = what_changed(before, after)
    if what == "background":
        return generator.choice(TO_COLOUR).format(it="the background", new=after.background.colour)
    old, new = before.things[index], after.things[index]
    alike = [thing.shape for thing in before.things].count(old.shape) > 1
    it = f"the {old.colour} {old.shape}" if alike or generator.random() < 0.4 else f"the {old.shape}"
    if what == "colour":
        return generator.choice(TO_COLOUR).format(it=it, new=new.colour)
    return generator.choice(TO_SHAPE).format(it=it, new=with_article(new.shape))


def is_clear(scene: Scene) -> bool:
    """Whether every thing can be seen and named: no two alike, and none of the colour of what is behind it."""
    kinds = {(thing.shape, thing.colour) for thing in scene.things}
    if len(kinds) < len(scene.things) or scene.background.colour in {colour for _, colour in kinds}:
        return False
    if scene.relation != "inside":
        return True
    inner, outer = scene.things
    return inner.colour != outer.colour and outer.shape in HOLDERS


def sample_pair(
    generator: Random, what: str, *, held_out: bool = False, kinds: Sequence[str] = KINDS
) -> tuple[Scene, Scene]:
    """A scene with one or two things on a plain background, and the same scene with one change.

    what      one of CHANGES
    kinds     of scenes: "single", with one thing; "pairs", with two
    held_out  whether the change makes a combination that training never shows; if not, neither scene has any
    """
    while True:
        scene = sample_scene(generator, kind=generator.choice(kinds))
        changed = CHANGES[what](scene, generator)
        new = combinations(changed)
        if changed != scene and is_clear(changed) and bool(new & HELD_OUT) == held_out and new != combinations(scene):
            return scene, changed


class PicturePairs:
    """Endless pairs of pictures: numbers 2n and 2n + 1 show the same scene but for one change.

    Each of the two is the result of editing the other, so both can be learned from. Pair n depends only on the seed
    and n.

    size  the pictures' side in pixels
    """

    def __init__(self, seed: int, size: int, *, device: torch.device | str = "cpu"):
        self.seed, self.size, self.device = seed, size, device
        self.name = f"pairs, seed {seed}, {size} pixels: {' '.join(CHANGES)}"

    def scene(self, number: int) -> Scene:
        generator = Random(f"pair {self.seed} {number // 2}")
        return sample_pair(generator, generator.choice(list(CHANGES)))[number % 2]

    def instruction(self, number: int, time: int) -> str:
        """What to do with the other picture of the pair to get this one, worded anew each time."""
        return instruction(self.scene(number ^ 1), self.scene(number), Random(f"words {self.seed} {number} {time}"))

    def batch(self, step: int, batch_size: int, share: slice = slice(None)) -> tuple[Tensor, list[str]]:
        """(B, 3, size, size) in [-1, 1], and B instructions, as in `ShapesDataset`."""
        numbers = range(step * batch_size, (step + 1) * batch_size)[share]
        pictures = render([self.scene(number) for number in numbers], self.size, self.device)
        return pictures, [self.instruction(number, 0) for number in numbers]
