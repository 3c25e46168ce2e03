"""The attention kernel is as near to the formula as PyTorch's; without it, PyTorch's own attention runs."""

import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, compiled_into, fill
from torch.overrides import TorchFunctionMode

import sd.runtime.cpu.attention as module
from sd.runtime.cpu.attention import KERNEL, OPERATOR, attention_applied, is_supported, plain_attention
from sd.runtime.cpu.native import compiler, cpu_flags
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.study.benchmark.layer_kinds import ATTENTION, kind_of, operations_of

CPU, BF16 = torch.device("cpu"), torch.bfloat16
needs_kernel = pytest.mark.skipif(
    not is_supported(CPU, BF16) or compiler() is None,
    reason="this processor has no AVX512-BF16, or there is no compiler",
)
SHAPES = [  # batch, heads, tokens, tokens attended to, width of a head
    (1, 8, 256, 256, 40),
    (2, 2, 33, 77, 40),
    (3, 2, 45, 33, 8),
    (1, 3, 100, 777, 64),
    (2, 1, 31, 65, 80),
    (1, 2, 70, 129, 160),
    (1, 1, 1, 1, 2),
    (1, 1, 5, 64, 18),
    (1, 1, 70, 130, 512),
]


@pytest.fixture(scope="module", autouse=True, params=["vectors"] + ["tiles"] * (cpu_flags() >= module.TILES))
def _own_kernel(tmp_path_factory, request):
    """Compiled once; on a processor that has tiles, also as for one that has none."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "vectors":
            patch.setattr(module, "TILES", {"no such flag"})
        with compiled_into(KERNEL, tmp_path_factory.getbasetemp() / "cache"):
            yield


def inputs(batch, heads, tokens, attended, width, *, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, heads * width) for length in (tokens, attended, attended)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return (scale * q).to(BF16), k.to(BF16), v.to(BF16)


def formula(q, k, v, heads):
    """Vaswani et al. (2017), eq. 1, one head of one row after the other, in float64."""
    width, out = q.shape[-1] // heads, torch.empty(q.shape, dtype=torch.float64)
    for row in range(len(q)):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            queries, keys, values = (t[row, :, part].double() for t in (q, k, v))
            scores = (queries @ keys.T / math.sqrt(width)).exp()
            out[row, :, part] = scores / scores.sum(dim=1, keepdim=True) @ values
    return out


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_that_of_rounding(shape):
    """A number in bf16 is off by 1.7e-3 in the mean; PyTorch's kernel is measured beside it."""
    q, k, v = inputs(*shape)
    exact = formula(q, k, v, shape[1])
    assert KERNEL.library() is not None
    own, plain = (error(each(q, k, v, shape[1]), exact) for each in (OPERATOR.call, plain_attention))
    assert own < max(1.25 * plain, 2.5e-3)


@needs_kernel
def test_rows_are_rescaled_where_late_keys_match_far_better():
    """Weights grow by more than 2 to the 8th from one group of 64 keys to the next."""
    q, k, v = inputs(1, 2, 40, 300, 40, scale=4)
    k = k * torch.linspace(0.01, 3, 300)[:, None].to(BF16)
    exact = formula(q, k, v, 2)
    assert error(OPERATOR.call(q, k, v, 2), exact) < 3e-3
    assert error(OPERATOR.call(q, k.flip(1), v.flip(1), 2), exact) < 3e-3
    q, k, v = inputs(1, 2, 40, 100, 40, scale=100)  # scores too large for an exponential
    assert error(OPERATOR.call(q, k, v, 2), plain_attention(q.double(), k.double(), v.double(), 2)) < 3e-3


@needs_kernel
def test_numbers_that_are_not_finite_stay_so():
    """The pipeline goes to float32 where it sees them."""
    for bad in (math.nan, math.inf):
        for which in range(3):
            given = inputs(1, 2, 40, 100, 40)
            given[which][0, 7, 3] = bad
            assert not OPERATOR.call(*given, 2).isfinite().all(), (bad, which)


@needs_kernel
def test_rows_of_a_wider_array_and_other_orders_are_read_in_place():
    q, k, v = inputs(2, 2, 70, 70, 40)
    expected = OPERATOR.call(q, k, v, 2)
    joined = torch.cat([q, k, v], dim=-1)
    assert torch.equal(OPERATOR.call(*joined.chunk(3, dim=-1), 2), expected)
    assert torch.equal(OPERATOR.call(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)), 2), expected)
    assert torch.equal(OPERATOR.call(*(t.mT.contiguous().mT for t in (q, k, v)), 2), expected)


@needs_kernel
def test_neither_the_batch_nor_the_number_of_threads_changes_anything():
    q, k, v = inputs(3, 2, 200, 150, 40)
    whole, before = OPERATOR.call(q, k, v, 2), torch.get_num_threads()
    for row in range(3):
        own = slice(row, row + 1)
        assert torch.equal(OPERATOR.call(q[own], k[own], v[own], 2), whole[own])
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(OPERATOR.call(q, k, v, 2), whole)
    finally:
        torch.set_num_threads(before)


def unet_and_inputs(height, width, dtype=BF16):
    unet = fill(replace(TINY, unet=replace(TINY.unet, depths=(1, 0, 0, 0))))["unet"].to(dtype)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, height, width, generator=generator).to(dtype)
    return unet, x_t, torch.randn(2, 77, TINY.unet.context_width, generator=generator).to(dtype)


class Seen(TorchFunctionMode):
    """The kernel's calls and PyTorch's attention among those of PyTorch's functions."""

    def __init__(self):
        super().__init__()
        self.kinds, self.operations, self.plain = [], 0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.plain += operations_of(function, args, result) if function is F.scaled_dot_product_attention else 0
        if function is OPERATOR.call:
            self.kinds.append(kind_of(function, args))
            self.operations += operations_of(function, args, result)
        return result


@needs_kernel
@pytest.mark.parametrize("guided", [False, True])
def test_a_prediction_is_the_same_up_to_rounding(guided):
    unet, x_t, context = unet_and_inputs(32, 33)
    x_t = torch.cat([x_t[:1]] * 2) if guided else x_t
    with Seen() as by_pytorch:
        plain = unet(x_t, torch.tensor(500.0), context).float()
    with Seen() as seen:
        found = Execution().predict(unet, x_t, torch.tensor(500.0), context, predictions=1 + guided).float()
    assert (found - plain).norm() / plain.norm() < 3e-2
    layers = [each for each in unet.modules() if isinstance(each, module.Attention)]
    assert seen.kinds == [ATTENTION] * len(layers) * (1 if guided else 2)  # two pictures, one after the other
    once = 4 * (32 * 33) ** 2 * layers[0].q.out_features  # what the halves of guidance have in common
    assert (seen.operations, seen.plain) == (by_pytorch.plain - once * guided, 0)
    assert torch.equal(unet(x_t, torch.tensor(500.0), context).float(), plain)  # the patches are gone


@needs_kernel
def test_with_half_of_the_memory_and_with_merged_tokens_too():
    unet, x_t, context = unet_and_inputs(32, 32)
    for execution, more in ((Execution(RunOptions(low_memory=True)), {}), (Execution(), {"merge": 0.5})):
        with Seen() as seen:
            assert execution.predict(unet, x_t, torch.tensor(500.0), context, **more).isfinite().all()
        assert seen.kinds


def patched_by(context, network):
    """The modules whose forward functions are patched within a context."""
    with context:
        return [each for each in network.modules() if "forward" in vars(each)]


def test_small_pictures_other_precisions_and_gradients_go_without(monkeypatch):
    def never(*_):
        raise AssertionError("nothing is compiled for these")

    monkeypatch.setattr(KERNEL, "library", never)
    for height, dtype in ((31, BF16), (32, torch.float32)):
        unet, x_t, _ = unet_and_inputs(height, 32, dtype)
        assert not patched_by(attention_applied(unet, x_t), unet)
    unet, x_t, _ = unet_and_inputs(32, 32)
    with torch.enable_grad():
        assert not patched_by(attention_applied(unet, x_t), unet)


def test_where_the_processor_cannot_nothing_is_compiled(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags : fpu avx512f amx_int8\n")
    monkeypatch.setattr("sd.runtime.cpu.native.CPU_INFO", tmp_path / "cpuinfo")
    assert cpu_flags() == {"fpu", "avx512f", "amx_int8"}
    assert not is_supported(CPU, BF16)
    monkeypatch.setattr("sd.runtime.cpu.native.CPU_INFO", tmp_path / "nothing")
    assert not is_supported(CPU, BF16)


@pytest.mark.parametrize(
    "spoil", [{"CXX": "false"}, {"XDG_CACHE_HOME": "/proc/none"}], ids=["no compiler", "no folder"]
)
def test_without_a_kernel_pytorch_attends(monkeypatch, tmp_path, spoil):
    for name, value in {"XDG_CACHE_HOME": os.fspath(tmp_path), **spoil}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(KERNEL, "_found", [])
    monkeypatch.setattr(module, "is_supported", lambda device, dtype: True)
    unet, x_t, _ = unet_and_inputs(32, 32)
    assert not patched_by(attention_applied(unet, x_t), unet)
    q, k, v = inputs(1, 2, 40, 50, 40)
    assert torch.equal(OPERATOR.call(q, k, v, 2), plain_attention(q, k, v, 2))
