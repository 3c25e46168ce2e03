"""The lessons in which the small model learns everything from nothing, in this order.

First the autoencoder, at first on parts of pictures, which have more outline for each pixel. Then the text encoder
learns to read captions, and stays as it is. The UNet, which is given its output, need only learn to draw: one thing,
then everything, at last in smaller and smaller steps. The decoder is last: from the same latents, it learns to draw
sharper. `scripts/training/train_tiny.py` runs them.
"""

from dataclasses import dataclass, replace
from math import ceil, sqrt
from random import Random

from torch import Tensor

from sd.training.shapes.drawing import ShapesDataset


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str  # of its folder
    trains: str  # "vae", "text encoder", "unet" or "decoder"
    steps: int
    batch_size: int
    learning_rate: float  # after the warm-up
    falls_to: float = 1.0  # share of the learning rate that is left at the end
    ema_decay: float = 0.999  # of the averaged weights
    scenes: str = "all"  # which pictures: one of scenes.KINDS
    part: int = 0  # of the autoencoder's pictures: side of the part that it sees, in pixels; 0: the whole picture
    pictures: int = 0  # for the UNet: how many are encoded; each comes again with a new caption

    def enlarged(self, factor: int) -> "Stage":
        """Batches that many times as large, and as many times fewer of them: for a GPU."""
        steps, rate = ceil(self.steps / factor), sqrt(factor) * self.learning_rate
        return replace(self, steps=steps, batch_size=factor * self.batch_size, learning_rate=rate)


STAGES = (
    Stage(name="vae-parts", trains="vae", part=64, steps=2_500, batch_size=8, learning_rate=2e-3),
    Stage(name="vae", trains="vae", steps=1_800, batch_size=4, learning_rate=2e-3, falls_to=0.02),
    Stage(name="reading", trains="text encoder", steps=3_000, batch_size=128, learning_rate=1e-3, falls_to=0.05),
    Stage(name="one-thing", trains="unet", scenes="single", pictures=4_096, steps=1_200, batch_size=32,
          learning_rate=3e-3),
    Stage(name="everything", trains="unet", pictures=16_384, steps=3_000, batch_size=64, learning_rate=3e-3),
    Stage(name="settling", trains="unet", scenes="nested", pictures=16_384, steps=2_000, batch_size=64,
          learning_rate=3e-3, falls_to=0.01, ema_decay=0.998),
    Stage(name="more-pictures", trains="unet", scenes="nested", pictures=32_768, steps=2_000, batch_size=64,
          learning_rate=2e-3, falls_to=0.01, ema_decay=0.998),
    Stage(name="decoder", trains="decoder", steps=2_000, batch_size=4, learning_rate=5e-4, falls_to=0.05),
)  # fmt: skip


class Parts:
    """Square parts of drawn pictures around places of their things, where most of what there is to learn is.

    side  in pixels
    """

    def __init__(self, pictures: ShapesDataset, side: int):
        self.pictures, self.side = pictures, side

    def batch(self, step: int, batch_size: int, share: slice = slice(None)) -> tuple[Tensor, list[str]]:
        """-> (B, 3, side, side) in [-1, 1], and the captions of the whole pictures; as in `ShapesDataset`"""
        images, captions = self.pictures.batch(step, batch_size, share)
        parts = images.new_empty(len(images), 3, self.side, self.side)
        for i, number in enumerate(range(step * batch_size, (step + 1) * batch_size)[share]):
            x, y = self.corner(number)
            parts[i] = images[i, :, y : y + self.side, x : x + self.side]
        return parts, captions

    def corner(self, number: int) -> tuple[int, int]:
        """Left and top of a picture's part: anywhere so that its middle is within a thing's square, or near it."""
        generator = Random(f"part {self.pictures.seed} {number}")
        thing = generator.choice(self.pictures.describe(number)[0].things)
        size = self.pictures.size
        middles = (generator.uniform(place - thing.radius, place + thing.radius) for place in (thing.x, thing.y))
        left, top = (min(max(round(size * middle - self.side / 2), 0), size - self.side) for middle in middles)
        return left, top
