"""The running average of the weights during training, which makes better pictures than the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedWeights:
    """An exponential moving average (EMA) of a module's parameters.

    The decay is (1 + n) / (10 + n) after n updates until it reaches its final value, so that the random start is soon
    forgotten: the original training code's rule.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.weights = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.weights.values()), [parameters[name] for name in self.weights], 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Give the module the averaged weights inside the `with` block."""
        plain = {name: value.detach().clone() for name, value in module.named_parameters()}
        try:
            _set(module, self.weights)
            yield
        finally:
            _set(module, plain)


@torch.no_grad()
def _set(module: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in module.named_parameters():
        value.copy_(weights[name])
