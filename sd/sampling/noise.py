"""The source of all randomness: a generator on the CPU for each picture, so its noise depends on its seed alone."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sd.config import SEED_LIMIT

Draw = Callable[[Sequence[int]], Tensor]  # a shape -> the next standard normal numbers, float32 on the CPU


def cpu_source(seed: int) -> Draw:
    """PyTorch's generator for the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def philox_source(seed: int) -> Draw:
    """What PyTorch draws on an NVIDIA GPU, computed on the CPU."""
    from sd.sampling.philox import PhiloxGenerator

    return PhiloxGenerator(seed).randn


SOURCES = {"cpu": cpu_source, "philox": philox_source}


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


def slerp_columns(start: Tensor, end: Tensor, share: float) -> Tensor:
    """`slerp` of (C, H, W) noises as the web UI has it: each channel's column of H numbers is a vector of its own."""
    p, q = start.double(), end.double()
    cosine = (p * q).sum(dim=1, keepdim=True) / (p.norm(dim=1, keepdim=True) * q.norm(dim=1, keepdim=True))
    angle = torch.acos(cosine.clamp(-1, 1))
    turned = (((1 - share) * angle).sin() * p + (share * angle).sin() * q) / angle.sin()
    return torch.where(angle.sin() < 1e-6, p, turned).float()


class PictureNoise:
    """Standard normal noise for a batch; picture i has its own generator, seeded with seeds[i].

    variations  for each picture None, or a second seed and a share: its noise then lies that share of the way from the
                noise of its seed to that of the second seed
    rng         "cpu": PyTorch's generator for the CPU; "philox": a GPU's, as in the web UI. As there, a variation then
                changes the first noise only, and by columns
    seed_delta  added to all seeds after the first noise

    A call returns (B, *shape) float32 on the CPU. What a picture gets depends neither on the batch size nor on the
    order nor on the device of the networks.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        variations: Sequence[tuple[int, float] | None] | None = None,
        *,
        rng: str = "cpu",
        seed_delta: int = 0,
    ):
        self.seeds, self.variations = list(seeds), list(variations or [None] * len(seeds))
        for seed in [*seeds, *(variation[0] for variation in self.variations if variation)]:
            if not 0 <= seed < SEED_LIMIT:
                raise ValueError(f"a seed must be 0 to {SEED_LIMIT - 1}, got {seed}")
        if rng not in SOURCES:
            raise ValueError(f"rng must be one of {', '.join(SOURCES)}, got {rng!r}")
        self.shape, self.rng, self.seed_delta = tuple(shape), rng, seed_delta
        self._seed(0)
        self.is_first = True

    def _seed(self, delta: int) -> None:
        def source(seed: int) -> Draw:
            return SOURCES[self.rng]((seed + delta) % SEED_LIMIT)

        self.sources = [source(seed) for seed in self.seeds]
        self.others = [variation and source(variation[0]) for variation in self.variations]

    def __call__(self) -> Tensor:
        noise = torch.stack([self._of(picture) for picture in range(len(self.seeds))])
        if self.is_first and self.seed_delta:
            self._seed(self.seed_delta)
        self.is_first = False
        return noise

    def _of(self, picture: int) -> Tensor:
        noise, variation = self.sources[picture](self.shape), self.variations[picture]
        if variation is None or (self.rng == "philox" and not self.is_first):
            return noise
        between = slerp_columns if self.rng == "philox" else slerp
        return between(noise, self.others[picture](self.shape), variation[1])
