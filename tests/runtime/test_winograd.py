"""Winograd's algorithm gives the convolutions of the definition; where it is not used, PyTorch's own run."""

import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, compiled_into, fill
from torch import nn
from torch.overrides import TorchFunctionMode

import sd.runtime.cpu.winograd as module
from sd.networks import unet, vae
from sd.runtime.cpu.native import compiler, cpu_flags
from sd.runtime.cpu.winograd import KERNEL, OPERATOR, WinogradConvolutions, fits, is_supported, lay_out
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.runtime.patching import patched
from sd.study.benchmark.layer_kinds import CONVOLUTION, kind_of, operations_of

CPU, BF16 = torch.device("cpu"), torch.bfloat16
needs_kernel = pytest.mark.skipif(
    not is_supported(CPU, torch.float32) or compiler() is None,
    reason="this processor has no AVX-512, or there is no compiler",
)
PRECISIONS = [torch.float32] + [BF16] * ({module.PAIRS} <= cpu_flags())
SHAPES = [  # batch, inputs, outputs, height, width
    (1, 16, 64, 1, 1),
    (1, 64, 64, 2, 2),
    (2, 32, 64, 9, 7),
    (3, 48, 128, 8, 13),
    (1, 320, 64, 32, 31),
]


@pytest.fixture(scope="module", autouse=True)
def _own_kernel(tmp_path_factory):
    """Compiled once; also on a processor whose tiles would be faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILES", {"no such flag"})
        with compiled_into(KERNEL, tmp_path_factory.getbasetemp() / "cache"):
            yield


def convolution(inputs, outputs, dtype):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, 3, padding=1).requires_grad_(False)
    conv.weight.normal_(0, (9 * inputs) ** -0.5, generator=generator)
    conv.bias.normal_(generator=generator)
    return conv.to(dtype)


def maps(batch, inputs, height, width, dtype):
    return torch.randn(batch, inputs, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def exact(conv, x, upsampled=False):
    """The definition, in float64."""
    x = x.double().repeat_interleave(2, 2).repeat_interleave(2, 3) if upsampled else x.double()
    return F.conv2d(x, conv.weight.double(), conv.bias.double(), padding=1)


def error(found, right):
    return ((found.double() - right).norm() / right.norm()).item()


def convolve(conv, x, *, upsampled=False):
    return OPERATOR.call(x, lay_out(conv.weight, upsampled=upsampled), conv.bias, upsampled)


@needs_kernel
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("upsampled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_that_of_rounding(shape, upsampled, dtype):
    """A number in bf16 is off by 1.7e-3 in the mean; here what is multiplied is rounded, and the result."""
    batch, inputs, outputs, height, width = shape
    conv, x = convolution(inputs, outputs, dtype), maps(batch, inputs, height, width, dtype)
    assert KERNEL.library() is not None
    found = convolve(conv, x, upsampled=upsampled)
    scale = 2 if upsampled else 1
    assert found.shape == (batch, outputs, scale * height, scale * width)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error(found, exact(conv, x, upsampled)) < (5e-7 if dtype == torch.float32 else 4e-3)


@needs_kernel
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_whole_numbers_come_out_exactly(dtype):
    """Small ones, halves and quarters of which bf16 holds, too: nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    conv, x = convolution(16, 64, dtype), torch.randint(-2, 3, (1, 16, 6, 5), generator=generator).to(dtype)
    conv.weight.copy_(torch.randint(-2, 3, conv.weight.shape, generator=generator))
    conv.bias.zero_()
    for upsampled in (False, True):
        expected = exact(conv, x, upsampled)
        assert expected.abs().max() < 256
        assert torch.equal(convolve(conv, x, upsampled=upsampled).double(), expected)


@needs_kernel
def test_other_orders_in_memory_are_read_right():
    conv, x = convolution(32, 64, torch.float32), maps(2, 32, 6, 5, torch.float32)
    expected = convolve(conv, x)
    last = torch.channels_last
    assert torch.equal(convolve(conv, x.contiguous(memory_format=last)), expected)
    assert torch.equal(convolve(conv.to(memory_format=last), x.mT.contiguous().mT), expected)


@needs_kernel
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_neither_the_batch_nor_the_number_of_threads_changes_anything(dtype):
    conv, x = convolution(32, 128, dtype), maps(3, 32, 20, 17, dtype)
    whole, before = convolve(conv, x), torch.get_num_threads()
    for row in range(3):
        assert torch.equal(convolve(conv, x[row : row + 1]), whole[row : row + 1])
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(convolve(conv, x), whole)
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_numbers_that_are_not_finite_stay_so():
    """The pipeline goes to float32, or says so, where it sees them."""
    for bad in (math.nan, math.inf):
        conv, x = convolution(16, 64, torch.float32), maps(1, 16, 6, 6, torch.float32)
        x[0, 3, 2, 2] = bad
        plain, found = conv(x).isfinite(), convolve(conv, x).isfinite()
        assert not (found & ~plain).any()


@needs_kernel
def test_what_does_not_fit_together_is_not_read():
    conv, x = convolution(16, 64, torch.float32), maps(1, 16, 6, 6, torch.float32)
    weights = lay_out(conv.weight, upsampled=False)
    for given in ((x, weights, conv.bias, True), (x[:, :8], weights, conv.bias, False)):
        with pytest.raises(RuntimeError, match="need weights"):
            OPERATOR.call(*given)
    for given in ((x.double(), weights, conv.bias), (x, weights.double(), conv.bias), (x, weights, conv.bias.double())):
        with pytest.raises(RuntimeError, match="same precision"):
            OPERATOR.call(*given, False)


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "options", "expected"),
    [
        (16, 64, 3, {"padding": 1}, True),
        (1920, 640, 3, {"padding": 1}, True),
        (4, 64, 3, {"padding": 1}, False),
        (16, 32, 3, {"padding": 1}, False),
        (1 << 14, 64, 3, {"padding": 1}, False),
        (16, 64, 3, {}, False),
        (16, 64, 1, {}, False),
        (16, 64, 3, {"padding": 1, "stride": 2}, False),
        (16, 64, 3, {"padding": 1, "bias": False}, False),
        (16, 64, 3, {"padding": 1, "padding_mode": "circular"}, False),
    ],
)
def test_it_is_for_plain_3x3_windows_and_full_vectors_only(inputs, outputs, size, options, expected):
    assert fits(nn.Conv2d(inputs, outputs, size, **options, device="meta")) == expected


WIDE = replace(
    TINY,
    unet=replace(TINY.unet, width=64, multipliers=(1, 1), residuals_per_level=1, depths=(1, 0), heads=(2, 2)),
    vae=replace(TINY.vae, width=64, multipliers=(1, 1, 1, 1)),
)


def inputs_of(dtype, side=64):
    generator = torch.Generator().manual_seed(2)
    x_t = torch.randn(1, 4, side, side, generator=generator)
    return x_t.to(dtype), torch.randn(1, 77, WIDE.unet.context_width, generator=generator).to(dtype)


class Seen(TorchFunctionMode):
    """The convolutions among calls of PyTorch's functions: their operations, and how many are of which kind."""

    def __init__(self):
        super().__init__()
        self.operations, self.own, self.upsampled = 0, 0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if kind_of(function, args) == CONVOLUTION:
            self.operations += operations_of(function, args, result)
        if OPERATOR.is_(function):
            self.own, self.upsampled = self.own + 1, self.upsampled + args[3]
        return result


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_prediction_is_the_same_up_to_rounding_and_counts_the_same_operations(dtype):
    network, (x_t, context) = fill(WIDE)["unet"].to(dtype), inputs_of(dtype)
    with Seen() as by_pytorch:
        plain = network(x_t, torch.tensor(500.0), context)
    execution = Execution()
    with Seen() as seen:
        found = execution.predict(network, x_t, torch.tensor(500.0), context)
    assert error(found, plain.double()) < (1e-5 if dtype == torch.float32 else 4e-2)
    assert seen.operations == by_pytorch.operations
    # those with too few or odd channels are not; on the lower level, with 32x32 positions, all are
    windows = [each for each in network.modules() if isinstance(each, nn.Conv2d) and fits(each)]
    assert (seen.own, seen.upsampled) == (len(windows), 1)
    assert torch.equal(network(x_t, torch.tensor(500.0), context), plain)  # the patches are gone
    for execution, tile in ((Execution(RunOptions(low_memory=True)), ""), (Execution(), "xy")):
        with Seen() as seen:
            execution.predict(network, x_t, torch.tensor(500.0), context, tile=tile)
        assert not seen.own


@needs_kernel
@pytest.mark.slow
def test_pictures_become_latents_and_back_and_nothing_is_kept():
    network, execution = fill(WIDE)["vae"], Execution()
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(3))
    latents = image[:, :1, ::8, ::8].repeat(1, 4, 1, 1)
    for plain, run in (
        (network.encode(image)[0], lambda: execution.encode(network, image, "")[0]),
        (network.decode(latents), lambda: execution.decode(network, latents, "")),
    ):
        with Seen() as seen:
            assert error(run(), plain.double()) < 1e-5
        assert seen.own
    assert seen.upsampled == len([each for each in network.modules() if isinstance(each, vae.Upsample)])
    assert not execution.winograd[vae.VAE]._made
    for options, tile in ((RunOptions(), "x"), (RunOptions(tiled_vae=True), "")):
        with Seen() as seen:
            Execution(options).decode(network, latents, tile)
        assert not seen.own


@needs_kernel
def test_changed_weights_are_seen_and_kept_ones_are_made_once(monkeypatch):
    made = []
    monkeypatch.setattr(
        module, "lay_out", lambda *given, own=lay_out, **options: made.append(1) or own(*given, **options)
    )
    conv, x = convolution(16, 64, torch.float32), maps(1, 16, 32, 32, torch.float32)
    network = nn.Sequential(conv)
    for keep, times in ((True, 2), (False, 4)):
        made.clear()
        own = WinogradConvolutions(network, keep=keep)
        for change in (1, 1, -2, 1):
            conv.weight.mul_(change) if change != 1 else None
            with patched(own.forwards(x, 1024)):
                assert error(conv(x), exact(conv, x)) < 1e-6
        assert len(made) == times


@needs_kernel
def test_small_maps_odd_sizes_and_gradients_go_another_way():
    conv, layer, seen = convolution(16, 64, torch.float32), unet.Upsample(64).requires_grad_(False), []
    network = nn.ModuleList([conv, layer])
    conv.forward = lambda x: seen.append(x.shape) or x  # as another patch has it
    own = WinogradConvolutions(network, keep=True)
    x = maps(1, 16, 31, 32, torch.float32)
    with patched(own.forwards(x, 1024)):
        conv(x)
        large = maps(1, 64, 16, 16, torch.float32)
        with Seen() as even:
            layer(large, torch.Size([32, 32]))
        with Seen() as odd:
            layer(large, torch.Size([31, 32]))
    assert (even.own, odd.own) == (1, 0)
    assert seen == [x.shape]
    assert own.forwards(x, 1023) == {}
    with torch.enable_grad():
        assert own.forwards(x, 1024) == {}
    assert own.forwards(x.double(), 1024) == {}


def test_which_processors_it_is_for(monkeypatch):
    flags = set(module.AVX512)
    monkeypatch.setattr(module, "TILES", {"amx_tile", "amx_bf16"})
    monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(flags))
    assert is_supported(CPU, torch.float32)
    assert not is_supported(CPU, BF16)
    flags.add("avx512_bf16")
    assert is_supported(CPU, BF16)
    assert not is_supported(CPU, torch.float16)
    assert not is_supported(torch.device("meta"), BF16)
    flags.update(module.TILES)  # faster by their own
    assert is_supported(CPU, torch.float32)
    assert not is_supported(CPU, BF16)
    flags.remove("avx512dq")
    assert not is_supported(CPU, torch.float32)


def test_without_a_compiler_nothing_is_patched(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(KERNEL, "_found", [])
    monkeypatch.setattr(module, "is_supported", lambda device, dtype: True)
    conv, x = convolution(16, 64, torch.float32), maps(1, 16, 32, 32, torch.float32)
    assert WinogradConvolutions(nn.Sequential(conv), keep=True).forwards(x, 1024) == {}
    with pytest.raises(RuntimeError, match="not compiled"):
        lay_out(conv.weight, upsampled=False)
