"""Temporarily patch the forward functions of modules: how everything in `sd.runtime` acts on the networks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def patched(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Within this context, these modules have these forward functions. Nested uses restore the previous ones."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is not None:
                module.forward = forward
            elif "forward" in vars(module):
                del module.forward  # the class has its own
