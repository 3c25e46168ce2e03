"""The project's functions as operators of PyTorch, so that whoever watches PyTorch's functions sees them.

An operator is registered when it is first needed, as importing a module registers nothing.
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
        self._library: torch.library.Library | None = None  # the operator ends with it

    @property
    def call(self) -> Callable[..., Tensor]:
        name = self.schema.partition("(")[0]
        if self._library is None:
            self._library = torch.library.Library("sd_zoo", "FRAGMENT")
            self._library.define(self.schema)
            self._library.impl(name, self.function, "CPU")
        return getattr(torch.ops.sd_zoo, name).default

    def is_(self, function: Callable) -> bool:
        """Whether a function that somebody saw called is this operator."""
        return self._library is not None and function is self.call
