"""Where the time of a step goes: which PyTorch functions run, how long they take, and the least they could take.

A torch function mode sees every call; the networks do not know of it.

B batch, h heads, T tokens, S tokens attended to, d width of a head, C channels, k sides of a convolution's window.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sd.runtime.cpu import attention as fast_attention
from sd.runtime.cpu import gates as joined_gates
from sd.runtime.cpu import int8, winograd
from sd.runtime.cpu.packing import CONVOLUTION as PACKED
from sd.runtime.cpu.precise_norms import precise_group_norm
from sd.study.clock import seconds_of, synchronize

CONVOLUTION, LINEAR, ATTENTION, NORM, REST = "convolution", "linear", "attention", "norm_activation", "rest"
KINDS = {  # name -> heading in a table
    CONVOLUTION: "3x3 convolutions",
    LINEAR: "1x1 and linear layers",
    ATTENTION: "attention",
    NORM: "norms and activations",
    REST: "the rest",
}
NORMS = (F.group_norm, precise_group_norm, F.layer_norm, F.silu, F.gelu, torch.sigmoid, torch.rsqrt)
CONVOLUTIONS = (F.conv2d,) if PACKED is None else (F.conv2d, PACKED)
PRODUCTS = (F.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, int8.LINEAR)
RATE_RUNS = 5  # repetitions; the best counts
COPIED = 1 << 28  # bytes, more than caches hold


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The best rates of a machine."""

    operations: float  # per second, in a product of large matrices
    bytes: float  # per second, read and written, in a copy of a large array

    def least(self, operations: int, nbytes: int) -> float:
        """The least seconds for a call: it computes and moves data at the same time, so the longer of the two.

        Williams et al., "Roofline: An Insightful Visual Performance Model" (2009), section 3.
        """
        return max(operations / self.operations, nbytes / self.bytes)


@dataclass(frozen=True, kw_only=True)
class Share:
    """All calls of one kind together."""

    seconds: float
    least_seconds: float  # by the rates of the machine
    operations: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One step by kinds of layers. The seconds of all kinds add up to the step's."""

    seconds: float
    kinds: dict[str, Share]  # by the names in KINDS

    @property
    def operations(self) -> int:
        return sum(share.operations for share in self.kinds.values())

    @property
    def least_seconds(self) -> float:
        return sum(share.least_seconds for share in self.kinds.values())


def kind_of(function: Callable, args: Sequence[object]) -> str:
    """The name in KINDS under which a call counts."""
    if winograd.OPERATOR.is_(function) or int8.WINOGRAD.is_(function) or function is int8.CONVOLUTION:
        return CONVOLUTION
    if function in CONVOLUTIONS:
        return CONVOLUTION if max(args[1].shape[2:]) > 1 else LINEAR
    if function in PRODUCTS or joined_gates.OPERATOR.is_(function):  # which also applies the GELU and the gate
        return LINEAR
    if function is F.scaled_dot_product_attention or fast_attention.OPERATOR.is_(function):
        return ATTENTION
    return NORM if function in NORMS else REST


def operations_of(function: Callable, args: Sequence[object], output: Tensor) -> int:
    """Operations of one call; `sd.study.architecture.calls.COUNTED` says what is counted."""
    if winograd.OPERATOR.is_(function) or int8.WINOGRAD.is_(function):
        return 2 * 9 * args[0].shape[1] * output.numel()  # by the definition, as for any convolution
    if function in CONVOLUTIONS:
        return 2 * args[1].shape[1:].numel() * output.numel()  # each output value sums over C * k * k products
    if function is int8.CONVOLUTION:
        return 2 * args[3].shape[1:].numel() * output.numel()
    if function in PRODUCTS:
        return 2 * args[0].shape[-1] * output.numel()
    if joined_gates.OPERATOR.is_(function):
        return 4 * args[0].shape[-1] * output.numel()  # of the values and of the gate
    if function is F.scaled_dot_product_attention:
        queries, keys, values = args[:3]  # (B, h, T, d), (B, h, S, d), (B, h, S, d)
        return 2 * queries.shape[:-1].numel() * keys.shape[-2] * (queries.shape[-1] + values.shape[-1])
    if fast_attention.OPERATOR.is_(function):
        queries, keys = args[:2]  # (B, T, h * d), (B, S, h * d)
        return 4 * queries.numel() * keys.shape[1]
    return 0


def bytes_of(args: Sequence[object], output: Tensor) -> int:
    """Bytes that a call reads and writes, each once; 0 for one that returns a view of its input."""
    given = list(_tensors(args))
    plain = (tensor for tensor in given if tensor.layout == torch.strided)  # packed weights have no address
    if any(output.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for tensor in plain):
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in [*given, output])


def _tensors(values: Sequence[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class LayerWatch(TorchFunctionMode):
    """Inside the `with` block, times the calls of each kind. It waits for the device at both ends of each call."""

    def __init__(self, device: torch.device, rates: Rates, clock: Callable[[], float] = time.perf_counter):
        super().__init__()
        self.device, self.rates, self.clock = device, rates, clock
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._least = dict.fromkeys(KINDS, 0.0)
        self._operations = dict.fromkeys(KINDS, 0)
        self._calls = dict.fromkeys(KINDS, 0)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        synchronize(self.device)
        started = self.clock()
        result = function(*args, **kwargs)
        synchronize(self.device)
        seconds = self.clock() - started
        if isinstance(result, Tensor):
            given = (*args, *kwargs.values())
            kind, operations = kind_of(function, args), operations_of(function, args, result)
            self._seconds[kind] += seconds
            self._least[kind] += self.rates.least(operations, bytes_of(given, result))
            self._operations[kind] += operations
            self._calls[kind] += 1
        return result

    def profile(self, seconds: float) -> Profile:
        """The profile of a step that took so many seconds; time outside the calls counts as the rest."""
        named = {kind: time for kind, time in self._seconds.items() if kind != REST}
        spent = {**named, REST: seconds - sum(named.values())}
        shares = {
            kind: Share(
                seconds=spent[kind],
                least_seconds=self._least[kind],
                operations=self._operations[kind],
                calls=self._calls[kind],
            )
            for kind in KINDS
        }
        return Profile(seconds=seconds, kinds=shares)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best rates of a few matrix products, in the precision of the networks, and of a few copies."""
    side = 1024 if device.type == "cpu" else 8192
    matrices = [torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2)]
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = (
        min([seconds_of(work, device) for _ in range(1 + RATE_RUNS)][1:])  # the first warms up
        for work in (lambda: torch.mm(*matrices), lambda: target.copy_(source))
    )
    return Rates(operations=2 * side**3 / product, bytes=2 * COPIED / copy)
