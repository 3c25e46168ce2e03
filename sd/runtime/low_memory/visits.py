"""One network at a time: weights are copied to where it computes while it is in use.

With a GPU, they rest in main memory. A CPU has nothing else, so there they rest in the mapped file, which is memory
that the system can take back at any time, and are read again.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from sd.pipeline.runner import dtype_of
from sd.runtime.cpu.process_memory import give_back_freed_memory
from sd.runtime.weights import laid_out


class Visits:
    """The networks that are on a device now, for all threads and for all that use them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._users: Counter[nn.Module] = Counter()  # number of users of each network
        self._ends: dict[nn.Module, ExitStack] = {}
        self._lock = threading.RLock()  # while weights are put in place: a second user waits for them

    @contextmanager
    def of(self, network: nn.Module, release: Callable[[str], None]) -> Iterator[None]:
        """Within this context, in all threads, the weights of a network are on the device.

        release  called with the name of a weight in the file that has been read, to give its memory back
        """
        with self._lock:
            if not self._users[network]:
                visit = ExitStack()
                visit.enter_context(visiting(network, self.device, release))
                self._ends[network] = visit
            self._users[network] += 1
        try:
            yield
        finally:
            with self._lock:
                self._users[network] -= 1
                if not self._users[network]:
                    self._ends.pop(network).close()
                    give_back_freed_memory()


@contextmanager
def visiting(network: nn.Module, device: torch.device, release: Callable[[str], None]) -> Iterator[None]:
    """Within this context, the network uses copies of its weights on that device; afterwards, the originals again."""
    homes, dtype, part = dict(network.named_parameters()), dtype_of(network), getattr(network, "rests_as", None)

    def put(name: str, parameter: nn.Parameter) -> None:
        module, _, leaf = name.rpartition(".")
        network.get_submodule(module)._parameters[leaf] = parameter
        if part:
            release(f"{part}.{name}")

    def in_8_bits(name: str) -> nn.Module | None:
        """The layer that computes with a copy of this weight that it makes itself; in float32, there is none."""
        module, _, leaf = name.rpartition(".")
        layer = network.get_submodule(module)
        return layer if leaf == "weight" and hasattr(layer, "packed") and dtype == torch.bfloat16 else None

    try:
        for name, home in homes.items():
            if layer := in_8_bits(name):
                layer.packed()
                release(f"{part}.{name}")
                continue
            put(name, nn.Parameter(laid_out(home.detach(), device, dtype), requires_grad=home.requires_grad))
        yield
    finally:
        for name, home in homes.items():
            if layer := in_8_bits(name):
                layer.__dict__.pop("_packed", None)
            put(name, home)
