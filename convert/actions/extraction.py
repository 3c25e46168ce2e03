"""How far two models are apart, and what of that a LoRA holds."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Sums:
    """Squared norms over several tensors."""

    tensors: int = 0
    base: float = 0.0  # of the first model's weights
    change: float = 0.0  # of the difference
    left: float = 0.0  # of what the LoRA lacks of it

    def add(self, sums: "Sums") -> None:
        self.tensors += sums.tensors
        self.base += sums.base
        self.change += sums.change
        self.left += sums.left

    @property
    def error(self) -> float:
        """The norm of what is left out, relative to that of the difference."""
        return math.sqrt(self.left / self.change) if self.change else 0.0

    @property
    def relative_change(self) -> float:
        return math.sqrt(self.change / self.base) if self.base else math.inf


@dataclass
class Extraction:
    """The result."""

    blocks: dict[tuple[str, str], Sums] = field(default_factory=dict)  # network and block, of what the LoRA holds
    not_held: dict[str, Sums] = field(default_factory=dict)  # kind of tensor, in words -> those that differ
    vae: int = 0  # tensors of the VAE that differ
    rounded: int = 0  # tensors that differ by their precision only
    notes: list[str] = field(default_factory=list)
    tensors: int = 0  # written; 0: there was nothing to write

    @property
    def held(self) -> Sums:
        return _total(self.blocks.values())

    @property
    def whole(self) -> Sums:
        """With everything in the UNet and the text encoder that the LoRA does not hold."""
        return _total([*self.blocks.values(), *self.not_held.values()])


def _total(several: Iterable[Sums]) -> Sums:
    total = Sums()
    for sums in several:
        total.add(sums)
    return total
