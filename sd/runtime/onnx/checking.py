"""How far an exported network is from the network itself.

The yardstick is the network in float64, so that what is measured is the error of the exported one alone. PyTorch in
float32 would not do: its group norm on CPUs is off by up to 1e-3 in a VAE's decoder (`sd.runtime.cpu.precise_norms`
says why), a hundred times as much as onnxruntime.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

LIMIT = 1e-4  # of float32, which has 7 digits and loses about 2 of them on the way through a network


@contextmanager
def computing_in_float64(network: nn.Module) -> Iterator[None]:
    """Within this context, each layer has weights in float64 while it runs, so that they take no memory together.

    Inputs must be float64, too. Weights that are used outside their layers are widened where they meet float64.
    """
    kept: dict[nn.Parameter, Tensor] = {}

    def widen(layer: nn.Module, _: object) -> None:
        for parameter in layer.parameters(recurse=False):
            kept[parameter] = parameter.data
            parameter.data = parameter.data.double()

    def restore(layer: nn.Module, *_: object) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = kept.pop(parameter)

    layers = [module for module in network.modules() if not any(True for _ in module.children())]
    hooks = [layer.register_forward_pre_hook(widen) for layer in layers]
    hooks += [layer.register_forward_hook(restore, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def exact_outputs(call: nn.Module, values: Sequence[Tensor]) -> list[np.ndarray]:
    """What a network gives in float64."""
    widened = [value.double() if value.is_floating_point() else value for value in values]
    with torch.no_grad(), computing_in_float64(call):
        return [output.numpy() for output in call(*widened)]


def difference(outputs: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """The largest error, in units of the largest value of that output where this is above 1: rounding grows with it.

    NaN if any value is.
    """
    pairs = zip(outputs, exact, strict=True)
    return float(np.max([np.abs(found - right).max() / max(1.0, np.abs(right).max()) for found, right in pairs]))
