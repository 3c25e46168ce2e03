"""Pictures of what the embedded model never saw, to train adapters on: a further shape, and three looks.

crescents  a crescent in place of a scene's first thing
outlined   things of which only the outline is drawn: "outlined, a red circle on a blue background"
pastel     everything in pale colours: "pastel, a red circle on a blue background"
pinstripe  stripes in the background: "pinstripe, a red circle on a blue background", and no word of stripes

A look comes first in the caption, since the text encoder is causal: every word then knows of it.

Ordinary pictures are mixed in, so that an adapter leaves everything else as it is (prior preservation: Ruiz et al.,
"DreamBooth", 2023, section 3.3).
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from torch import Tensor

from sd.training.shapes.captions import caption
from sd.training.shapes.drawing import render
from sd.training.shapes.scenes import COLOURS, LARGEST_TURN, SHAPES, Background, Rgb, Scene, Thing, sample_scene

PALE = 0.5  # share of the way to white


def is_held_out(colour: str, background: str) -> bool:
    """Whether training never shows the subject in this colour on this background: half of all pairs of two colours."""
    names = list(COLOURS)
    return (3 * names.index(colour) - names.index(background)) % 8 < 4


HELD_OUT = tuple((colour, on) for colour in COLOURS for on in COLOURS if colour != on and is_held_out(colour, on))


def crescents(scene: Scene, generator: Random) -> Scene:
    first, *others = scene.things
    turn = LARGEST_TURN.get("crescent", 0.0)
    first = replace(first, shape="crescent", angle=generator.uniform(-turn, turn))
    return replace(scene, things=(first, *others))


def outlined(scene: Scene, generator: Random) -> Scene:
    return replace(scene, things=tuple(replace(thing, shape=f"outlined {thing.shape}") for thing in scene.things))


def pale(rgb: Rgb) -> Rgb:
    return tuple(channel + PALE * (1 - channel) for channel in rgb)


def pastel(scene: Scene, generator: Random) -> Scene:
    def paler(one: Background | Thing) -> Background | Thing:
        return replace(one, **{name: pale(getattr(one, name)) for name in ("rgb", "second_rgb") if hasattr(one, name)})

    return replace(scene, background=paler(scene.background), things=tuple(map(paler, scene.things)))


def pinstripe(scene: Scene, generator: Random) -> Scene:
    return replace(scene, background=replace(scene.background, pattern="striped"))


SUBJECTS: dict[str, tuple[Callable[[Scene, Random], Scene], str]] = {  # the change, and what the caption begins with
    "crescents": (crescents, ""),
    "outlined": (outlined, "outlined, "),
    "pastel": (pastel, "pastel, "),
    "pinstripe": (pinstripe, "pinstripe, "),
}


class SubjectPictures:
    """Endless pictures and captions of one of SUBJECTS. Picture n depends only on the seed and n.

    size      the pictures' side in pixels
    ordinary  the share of pictures without the subject
    kind      one of scenes.KINDS, of three in five pictures; the others are single
    shapes    the shapes in pictures without the subject, of scenes.SHAPES
    """

    def __init__(
        self,
        subject: str,
        seed: int,
        size: int,
        *,
        ordinary: float = 0.5,
        kind: str = "all",
        shapes: tuple[str, ...] = SHAPES,
    ):
        self.subject, self.seed, self.size = subject, seed, size
        self.ordinary, self.kind, self.shapes = ordinary, kind, shapes
        self.change, self.lead = SUBJECTS[subject]
        self.trigger = self.lead.removesuffix(", ") or "crescent"  # the word that asks for it
        self.name = f"{subject}, seed {seed}, {size} pixels, {ordinary:g} ordinary, {kind}: {' '.join(shapes)}"

    def scene(self, number: int) -> tuple[Scene, bool, Random]:
        """The picture's scene, whether it shows the subject, and the generator that the caption goes on with."""
        generator = Random(f"{self.subject} {self.seed} {number}")
        special = generator.random() >= self.ordinary
        while True:
            kind = "single" if generator.random() < 0.4 else self.kind
            scene = sample_scene(generator, kind=kind, shapes=SHAPES if special else self.shapes)
            if not special or not any(is_held_out(thing.colour, scene.background.colour) for thing in scene.things):
                break
        return self.change(scene, generator) if special else scene, special, generator

    def describe(self, number: int) -> tuple[Scene, str]:
        scene, special, generator = self.scene(number)
        return scene, self.words(scene, special, generator)

    def words(self, scene: Scene, special: bool, generator: Random) -> str:
        if special and self.lead:  # nothing else in the caption tells of the look
            scene = replace(scene, background=replace(scene.background, pattern="plain"))
        return self.lead * special + caption(scene, generator).replace("outlined ", "")

    def recaption(self, number: int, time: int) -> str:
        """Another caption for the same picture; at time 0, that of `describe`."""
        scene, special, generator = self.scene(number)
        return self.words(scene, special, Random(f"caption {self.seed} {number} {time}") if time else generator)

    def batch(self, step: int, batch_size: int, share: slice = slice(None)) -> tuple[Tensor, list[str]]:
        """(B, 3, size, size) in [-1, 1], and B captions, as in `ShapesDataset`."""
        numbers = range(step * batch_size, (step + 1) * batch_size)[share]
        scenes, captions = zip(*map(self.describe, numbers), strict=True)
        return render(scenes, self.size), list(captions)
