"""One network on the device at a time: weights stay in main memory and are copied to the device while in use."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


class Visits:
    """The networks that are on a device now."""

    def __init__(self, device: torch.device):
        self.device = device
        self._users: Counter[nn.Module] = Counter()  # number of users of each network
        self._ends: dict[nn.Module, ExitStack] = {}

    @contextmanager
    def of(self, network: nn.Module) -> Iterator[None]:
        """Within this context, in all threads, the weights of a network are on the device."""
        if not self._users[network]:
            self._ends[network] = ExitStack()
            self._ends[network].enter_context(visiting(network, self.device))
        self._users[network] += 1
        try:
            yield
        finally:
            self._users[network] -= 1
            if not self._users[network]:
                self._ends.pop(network).close()


@contextmanager
def visiting(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Within this context, the network uses copies of its weights on that device; afterwards, the originals again."""
    homes = [
        (module, name, parameter)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    try:
        for module, name, parameter in homes:
            module._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=parameter.requires_grad)
        yield
    finally:
        for module, name, parameter in homes:
            module._parameters[name] = parameter
