"""Where all randomness comes from: one CPU generator for each picture, so that its noise depends on its seed alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sd.settings import SEED_LIMIT


class PictureNoise:
    """Standard normal noise for a batch; picture i has a generator of its own, seeded with seeds[i].

    A call returns (B, *shape) float32 on the CPU. Neither the batch size, nor the order, nor the device of the networks
    changes what a picture gets.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]):
        for seed in seeds:
            if not 0 <= seed < SEED_LIMIT:
                raise ValueError(f"a seed must be 0 to {SEED_LIMIT - 1}, got {seed}")
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
