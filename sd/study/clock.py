"""Time work on a device, which may still be busy when a call returns."""

import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; a CPU always has."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, until the device has finished it."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started
