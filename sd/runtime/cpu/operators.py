"""The project's functions as PyTorch operators, so that profilers and function modes see them.

An operator is registered at its first use; importing a module registers nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Operator:
    """One function, on the CPU and without gradients.

    schema  its name and the types of its arguments, as PyTorch writes them
    """

    def __init__(self, schema: str, function: Callable[..., Tensor]):
        self.schema, self.function = schema, function
        self._library: torch.library.Library | None = None  # the operator lives as long as this

    @property
    def call(self) -> Callable[..., Tensor]:
        name = self.schema.partition("(")[0]
        if self._library is None:
            self._library = torch.library.Library("sd_zoo", "FRAGMENT")
            self._library.define(self.schema)
            self._library.impl(name, self.function, "CPU")
        return getattr(torch.ops.sd_zoo, name).default

    def is_(self, function: Callable) -> bool:
        """Whether a function is this operator."""
        return self._library is not None and function is self.call
