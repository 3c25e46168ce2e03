"""Time each module, on made-up weights: their values do not change the times."""

import time
from collections.abc import Callable

import torch
from torch import nn

from sd.config import ModelConfig
from sd.networks.build import build_networks
from sd.study.architecture.description import passes
from sd.study.clock import synchronize

ROUNDS = 3  # the first warms up and does not count


class Stopwatch:
    """Hooks that time each call of a module. They wait for the device at both ends of the call."""

    def __init__(self, component: str, network: nn.Module, device: torch.device):
        self.device = device
        self.milliseconds: dict[str, float] = {}  # by path, of the latest call
        self._started: dict[str, float] = {}
        for name, module in network.named_modules(prefix=component):
            module.register_forward_pre_hook(lambda *_, name=name: self._start(name))
            module.register_forward_hook(lambda *_, name=name: self._stop(name))

    def _start(self, path: str) -> None:
        synchronize(self.device)
        self._started[path] = time.perf_counter()

    def _stop(self, path: str) -> None:
        synchronize(self.device)
        self.milliseconds[path] = 1000 * (time.perf_counter() - self._started[path])


def measure(
    config: ModelConfig,
    *,
    width: int,
    height: int,
    device: torch.device,
    dtype: torch.dtype,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Milliseconds of one call of each module, by path: the shortest of the rounds after a warm-up.

    width, height  of the picture in pixels, multiples of `config.vae.factor`
    on_round       called `ROUNDS` times for each network

    One network is in memory at a time. A module's time includes its inner modules and the small cost of timing them.
    """
    shortest: dict[str, float] = {}
    networks = build_networks(config)
    for component in list(networks):
        network = networks.pop(component).to(dtype).to_empty(device=device).to(memory_format=torch.channels_last)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.02)
        stopwatch = Stopwatch(component, network, device)
        runs = passes(config, {component: network}, width, height, device)[component]
        for number in range(ROUNDS):
            with torch.no_grad():
                for run in runs:
                    run()
            if number > 0:
                for path, milliseconds in stopwatch.milliseconds.items():
                    shortest[path] = min(milliseconds, shortest.get(path, milliseconds))
            on_round()
    return shortest
