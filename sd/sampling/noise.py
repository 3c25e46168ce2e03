"""The source of all randomness: one CPU generator for each picture, so that its noise depends on its seed alone."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sd.config import SEED_LIMIT


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Spherical interpolation: between two noises, noise of the same strength; a plain mean would be weaker.

    start, end  noises of the same shape, each taken as one vector
    share       0 gives the first, 1 the second, both exactly

    Shoemake, "Animating Rotation with Quaternion Curves" (1985):
    slerp(p, q; u) = sin((1 - u) w) / sin(w) p + sin(u w) / sin(w) q, where w is the angle between p and q.
    """
    p, q = start.double(), end.double()
    angle = torch.acos(((p * q).sum() / (p.norm() * q.norm())).clamp(-1, 1)).item()
    if math.sin(angle) < 1e-6:  # the same noise
        return start
    return math.sin((1 - share) * angle) / math.sin(angle) * start + math.sin(share * angle) / math.sin(angle) * end


class PictureNoise:
    """Standard normal noise for a batch; picture i has its own generator, seeded with seeds[i].

    variations  for each picture None, or a second seed and a share: all its noise then lies that share of the way from
                the noise of its seed to that of the second seed

    A call returns (B, *shape) float32 on the CPU. What a picture gets depends neither on the batch size nor on the
    order nor on the device of the networks.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        variations: Sequence[tuple[int, float] | None] | None = None,
    ):
        variations = [None] * len(seeds) if variations is None else variations
        for seed in [*seeds, *(variation[0] for variation in variations if variation)]:
            if not 0 <= seed < SEED_LIMIT:
                raise ValueError(f"a seed must be 0 to {SEED_LIMIT - 1}, got {seed}")
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.variations = [
            variation and (torch.Generator().manual_seed(variation[0]), variation[1]) for variation in variations
        ]

    def __call__(self) -> Tensor:
        return torch.stack([self._of(*picture) for picture in zip(self.generators, self.variations, strict=True)])

    def _of(self, generator: torch.Generator, variation: tuple[torch.Generator, float] | None) -> Tensor:
        noise = torch.randn(self.shape, generator=generator)
        if variation is None:
            return noise
        other, share = variation
        return slerp(noise, torch.randn(self.shape, generator=other), share)
