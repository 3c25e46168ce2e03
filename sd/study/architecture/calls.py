"""Hooks that watch modules run: shapes, operations, skip connections.

B batch, T tokens, S tokens attended to, D width.
"""

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sd.networks.attention import Attention

COUNTED = (
    "a multiply-add is 2 operations; counted are convolutions, linear layers and the two matrix products of attention"
    " (in full also where it is causal), but not norms, activations, additions and resampling"
)
Shape = tuple[int, ...]


@dataclass(kw_only=True)
class Call:
    """One call of a module."""

    number: int  # in the order that calls began
    inputs: dict[str, Shape]  # tensors by the names of `forward`'s parameters
    skips: tuple[str, ...]  # paths of the modules whose outputs were concatenated to an input
    output: Shape = ()
    operations: int = 0  # without the children's


def operations(module: nn.Module, inputs: Mapping[str, Shape], output: Shape) -> int:
    """Operations that a module does itself, without its children. `COUNTED` says what is counted."""
    outputs = torch.Size(output).numel()
    if isinstance(module, nn.Conv2d):
        return 2 * module.weight[0].numel() * outputs  # each output value sums over a window of all its channels
    if isinstance(module, nn.Linear):
        return 2 * module.in_features * outputs
    if isinstance(module, Attention):
        (batch, queries, width), keys = output, inputs.get("context", inputs["x"])[1]
        return 2 * 2 * batch * queries * keys * width  # (T, D) x (D, S), then (T, S) x (S, D)
    return 0


class Watcher(TorchFunctionMode):
    """Inside the `with` block, records the calls of all modules, and what is concatenated into their inputs."""

    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        self.networks = networks
        self.calls: dict[str, Call] = {}  # by path
        self._makers: dict[int, str] = {}  # id of a tensor -> the outermost module that returned it
        self._joined: dict[int, list[Tensor]] = {}  # id of a concatenation -> its parts
        self._kept: list[Tensor] = []  # keeps tensors alive, so that no id is reused
        self._hooks: list = []

    def __enter__(self):
        for component, network in self.networks.items():
            for name, module in network.named_modules(prefix=component):
                before, after = functools.partial(self._before, name), functools.partial(self._after, name)
                self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(after))
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.cat:
            self._joined[id(result)] = list(args[0])
            self._kept.append(result)
        return result

    def _before(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        # The first part is the main path, the others are skips; only the outermost module that takes them counts.
        others = [part for tensor in tensors.values() for part in self._joined.pop(id(tensor), [])[1:]]
        self.calls[path] = Call(
            number=len(self.calls),
            inputs={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            skips=tuple(self._makers[id(part)] for part in others if id(part) in self._makers),
        )

    def _after(self, path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        call = self.calls[path]
        call.output = tuple(output.shape)
        call.operations = operations(module, call.inputs, call.output)
        if not any(output is given for given in args):  # not an identity
            self._makers[id(output)] = path
        self._kept.append(output)
