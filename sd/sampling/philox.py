"""Noise as an NVIDIA GPU draws it, computed on the CPU: the generator Philox 4x32-10, and normal numbers from it.

`torch.randn` on a GPU gives every number a counter of its own; so does the web UI's "NV" source, and
stable-diffusion.cpp. Both take one of the two normal numbers that Box and Muller's method makes. A GPU computes them in
float32 and differs in the last digits; above some 100,000 numbers its order depends on its size, and is not followed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Tensor | int], key: int) -> list[Tensor | int]:
    """Four random words for each counter.

    counter  four words, each a number below 2 ** 32 or an int64 tensor of them, all of one shape
    key      below 2 ** 64

    Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011), Philox 4x32 with 10 rounds.
    """
    a, b, c, d = counter
    low_key, high_key = key & WORD, key >> 32
    for _ in range(10):
        first, second = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c  # in int64, products wrap around: the bits are right
        a, b, c, d = second >> 32 & WORD ^ b ^ low_key, second & WORD, first >> 32 & WORD ^ d ^ high_key, first & WORD
        low_key, high_key = low_key + KEY_STEPS[0] & WORD, high_key + KEY_STEPS[1] & WORD
    return [a, b, c, d]


def box_muller(x: Tensor, y: Tensor) -> Tensor:
    """Normal numbers from two random words for each: int64 below 2 ** 32 -> float32, of the same shape.

    Box & Muller, "A Note on the Generation of Random Normal Deviates" (1958); the words are taken as the middles of
    2 ** 32 intervals. Computed in float64 and rounded once.
    """
    u, v = (x.double() + 0.5) / 2**32, (y.double() + 0.5) / 2**32 * 2 * math.pi
    return ((-2 * u.log()).sqrt() * v.sin()).float()


class PhiloxGenerator:
    """A source of normal numbers. Draw n, counted from 0, has the counters (n, 0, i, 0), where i is the place."""

    def __init__(self, seed: int):
        self.seed, self.draws = seed, 0

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of that shape, float32 on the CPU."""
        place = torch.arange(torch.Size(shape).numel(), dtype=torch.int64, device="cpu")
        zero = torch.zeros_like(place)
        x, y, _, _ = philox((zero + self.draws, zero, place, zero), self.seed)
        self.draws += 1
        return box_muller(x, y).reshape(shape)
