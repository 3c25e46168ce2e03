"""Whether the contenders of `benchmark.py` compute the same: of latents how far they differ, of pictures the PSNR."""

from dataclasses import dataclass

import numpy as np
from benchmark_contender import INT8
from benchmark_workers import CONTENDERS

# Largest relative difference of latents after two guided steps. Guidance multiplies rounding errors by about its scale;
# the unit roundoffs are 6e-8, 5e-4 and 4e-3, and 4e-3 of the largest value of a tensor in 8 bits.
BOUNDS = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 2e-1, INT8: 4e-1}


@dataclass(frozen=True, kw_only=True)
class Case:
    width: int
    height: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, batch {self.batch_size}"

    def request(self) -> dict[str, int]:
        return {"width": self.width, "height": self.height, "batch_size": self.batch_size}


def apart(contender: str) -> str:
    """What sets the table of a contender apart from that of `sd-zoo`: another way, 8 bits."""
    kind = CONTENDERS[contender]
    return f", {kind.way.label}" * bool(kind.way.label) + ", 8 bits" * (kind.own_precision == INT8)


def table(case: Case, contender: str) -> str:
    """The name of the report's table that has a contender."""
    return f"{case}{apart(contender)}"


class Wrong(Exception):
    """The contenders compute different results."""


def check_latents(latents: dict[str, np.ndarray], precisions: dict[str, str], case: str) -> dict[str, float]:
    """Relative difference of each from the first, |a - b| / |b|. Raises Wrong if one exceeds its bound."""
    first, *others = latents
    b = latents[first].astype(np.float64)
    differences = {name: float(np.linalg.norm(latents[name] - b) / np.linalg.norm(b)) for name in others}
    bounds = {name: max(BOUNDS[precisions[name]], BOUNDS[precisions[first]]) for name in others}
    if not all(differences[name] <= bounds[name] for name in others):  # also for nan
        listed = "\n".join(f"  {name}: {differences[name]:.1e}, at most {bounds[name]:.0e}" for name in others)
        raise Wrong(f"{case}: the contenders compute different results, so there is no comparison. Latents after the"
                    f" same two steps differ from those of {first} by\n{listed}")  # fmt: skip
    return differences


def psnr(pictures: np.ndarray, others: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of uint8 pictures, in dB; None if they are the same."""
    error = np.square(pictures.astype(np.float64) - others).mean()
    return float(10 * np.log10(255**2 / error)) if error else None
