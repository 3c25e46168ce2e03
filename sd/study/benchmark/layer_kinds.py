"""Where the time of a step goes: which functions of PyTorch are called, how long they take, and would take at least.

Seen from outside, with a mode that sees every call; the networks know nothing of it.

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
from sd.runtime.cpu import winograd
from sd.runtime.cpu.packing import CONVOLUTION as PACKED
from sd.runtime.cpu.precise_norms import precise_group_norm
from sd.study.architecture.timing import synchronize

CONVOLUTION, LINEAR, ATTENTION, NORM, REST = "convolution", "linear", "attention", "norm_activation", "rest"
KINDS = {  # name -> what a table calls it
    CONVOLUTION: "3x3 convolutions",
    LINEAR: "1x1 and linear layers",
    ATTENTION: "attention",
    NORM: "norms and activations",
    REST: "the rest",
}
NORMS = (F.group_norm, precise_group_norm, F.layer_norm, F.silu, F.gelu, torch.sigmoid, torch.rsqrt)
CONVOLUTIONS = (F.conv2d,) if PACKED is None else (F.conv2d, PACKED)
PRODUCTS = (F.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__)
RATE_RUNS = 5  # repetitions; the best counts
COPIED = 1 << 28  # bytes, more than caches hold


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine reaches at its best."""

    operations: float  # a second, in a product of large matrices
    bytes: float  # a second, read and written, in a copy of a large array

    def least(self, operations: int, nbytes: int) -> float:
        """Seconds that a call takes at least: it computes and moves data at the same time, and the longer one counts.

        Williams et al., "Roofline: An Insightful Visual Performance Model" (2009), section 3.
        """
        return max(operations / self.operations, nbytes / self.bytes)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What the calls of one kind took together."""

    seconds: float
    least_seconds: float  # by the rates of the machine
    operations: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One step by kinds of layers. The seconds of the kinds add up to those of the step."""

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
    if winograd.OPERATOR.is_(function):
        return CONVOLUTION
    if function in CONVOLUTIONS:
        return CONVOLUTION if max(args[1].shape[2:]) > 1 else LINEAR
    if function in PRODUCTS or joined_gates.OPERATOR.is_(function):  # the GELU and the gate are done on the way
        return LINEAR
    if function is F.scaled_dot_product_attention or fast_attention.OPERATOR.is_(function):
        return ATTENTION
    return NORM if function in NORMS else REST


def operations_of(function: Callable, args: Sequence[object], output: Tensor) -> int:
    """Operations of one call, a multiply-add being 2; `sd.study.architecture.calls.COUNTED` says which."""
    if winograd.OPERATOR.is_(function):
        return 2 * 9 * args[0].shape[1] * output.numel()  # those of the definition, as for any convolution
    if function in CONVOLUTIONS:
        return 2 * args[1].shape[1:].numel() * output.numel()  # each output value sums over C * k * k products
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
    """Bytes that a call reads and writes, each once; 0 for one that gives back what it was given, seen otherwise."""
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
    """While it is entered: how long the calls of each kind take. The device is waited for at both ends of each."""

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
        """By kinds, of a step that took so long: what is not in a call of another kind belongs to the rest."""
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
    """The best of a few products of square matrices and of a few copies, in the precision of the networks."""
    side = 1024 if device.type == "cpu" else 8192
    matrices = [torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2)]
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _shortest(lambda: torch.mm(*matrices), device)
    copy = _shortest(lambda: target.copy_(source), device)
    return Rates(operations=2 * side**3 / product, bytes=2 * COPIED / copy)


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, after a warm-up."""
    times = []
    for _ in range(1 + RATE_RUNS):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
