"""Functions of ours as operators of PyTorch: who watches PyTorch's functions sees them, and its compiler calls them.

An operator is not there before it is needed, as importing a module registers nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Operator:
    """One function, on the CPU and without gradients.

    schema  its name and the types of its arguments, as PyTorch writes them
    shape   from the same arguments to what the compiler may know of the result, an empty tensor; without it, the
            operator is not for compiled networks
    """

    def __init__(self, schema: str, function: Callable[..., Tensor], shape: Callable[..., Tensor] | None = None):
        self.schema, self.function, self.shape = schema, function, shape
        self._library: torch.library.Library | None = None  # the operator ends with it

    @property
    def call(self) -> Callable[..., Tensor]:
        name = self.schema.partition("(")[0]
        if self._library is None:
            self._library = torch.library.Library("sd_zoo", "FRAGMENT")
            self._library.define(self.schema)
            self._library.impl(name, self.function, "CPU")
            if self.shape is not None:
                torch.library.register_fake(f"sd_zoo::{name}", self.shape, lib=self._library)
        return getattr(torch.ops.sd_zoo, name).default

    def is_(self, function: Callable) -> bool:
        """Whether a function that somebody saw called is this operator."""
        return self._library is not None and function is self.call
