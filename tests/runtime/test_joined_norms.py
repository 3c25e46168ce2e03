"""Group norms with the SiLU behind them are those of the formula, and where there is no kernel, all is as ever."""

import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, compiled_into, fill
from torch import nn
from torch.overrides import TorchFunctionMode

from sd.runtime.cpu.attention import is_supported
from sd.runtime.cpu.native import compiler
from sd.runtime.cpu.norms import KERNEL, OPERATOR, by_kernel, joined, norms_joined, one_after_the_other
from sd.runtime.execution import Execution
from sd.study.benchmark.layer_kinds import NORM, kind_of

CPU, BF16 = torch.device("cpu"), torch.bfloat16
needs_kernel = pytest.mark.skipif(
    not is_supported(CPU, BF16) or compiler() is None,
    reason="this processor has no AVX512-BF16, or there is no compiler",
)
SHAPES = [  # batch, channels, groups, height, width
    (1, 16, 16, 1, 1),
    (2, 32, 8, 3, 5),
    (1, 48, 16, 12, 11),
    (2, 320, 32, 16, 16),
    (3, 128, 32, 40, 33),
]


@pytest.fixture(scope="module", autouse=True)
def _own_kernel(tmp_path_factory):
    with compiled_into(KERNEL, tmp_path_factory.mktemp("cache")):
        yield


def norm_and_maps(batch, channels, groups, height, width, *, mean=0.0):
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(groups, channels, eps=1e-5).requires_grad_(False)
    norm.weight.normal_(1, 0.3, generator=generator)
    norm.bias.normal_(generator=generator)
    x = mean + torch.randn(batch, channels, height, width, generator=generator)
    return norm.to(BF16), x.to(BF16).contiguous(memory_format=torch.channels_last)


def formula(norm, x):
    """Wu & He (2018), eq. 1 and 6, and x / (1 + exp(-x)), in float64."""
    groups = x.double().unflatten(1, (norm.num_groups, -1))
    mean = groups.mean((2, 3, 4), keepdim=True)
    variance = (groups - mean).square().mean((2, 3, 4), keepdim=True)
    normed = ((groups - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
    normed = normed * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    return normed / (1 + (-normed).exp())


def error(found, right):
    return ((found.double() - right).norm() / right.norm()).item()


@needs_kernel
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_that_of_rounding_the_result(shape, mean, in_place):
    """1.7e-3 in the mean, also where the mean is far from zero."""
    norm, x = norm_and_maps(*shape, mean=mean)
    right, before = formula(norm, x), x.clone()
    found = by_kernel(norm, x, in_place)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error(found, right) < (3e-3 if x.numel() < 1000 else 2e-3)
    assert (found.data_ptr() == x.data_ptr()) is in_place
    assert torch.equal(x, before) is not in_place


@needs_kernel
def test_large_and_small_values_keep_their_signs_and_limits():
    """SiLU goes to x on one side and to zero on the other; a group of equal numbers is its bias."""
    norm, x = norm_and_maps(1, 16, 1, 8, 8)
    norm.weight.fill_(60)
    right = formula(norm, x)
    found = by_kernel(norm, x, False)
    assert found.isfinite().all()
    assert (found.double() - right).abs().max() < 0.6  # 2 ** -9 of 150
    equal = torch.full_like(x, 3)
    assert error(by_kernel(norm, equal, False), formula(norm, equal)) < 2**-8  # 16 different numbers


@needs_kernel
def test_numbers_that_are_not_finite_stay_so():
    for bad in (math.nan, math.inf):
        norm, x = norm_and_maps(1, 32, 8, 20, 20)
        x[0, 5, 3, 3] = bad
        assert not by_kernel(norm, x, False)[0, 5, 3, 3].isfinite()


@needs_kernel
def test_neither_the_batch_nor_the_number_of_threads_changes_anything():
    norm, x = norm_and_maps(3, 64, 32, 31, 23)
    whole, before = by_kernel(norm, x, False), torch.get_num_threads()
    for row in range(3):
        assert torch.equal(by_kernel(norm, x[row : row + 1], False), whole[row : row + 1])
    assert torch.equal(by_kernel(norm, x.contiguous(), False), whole)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(by_kernel(norm, x, False), whole)
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_what_does_not_fit_together_is_not_read():
    norm, x = norm_and_maps(1, 32, 8, 5, 5)
    for weight in (norm.weight[:16], norm.weight.float()):
        with pytest.raises(RuntimeError, match="32 channels"):
            OPERATOR.call(x, weight, norm.bias, 8, 1e-5, torch.empty_like(x))


@needs_kernel
def test_odd_numbers_of_channels_go_the_plain_way():
    norm, x = norm_and_maps(1, 24, 8, 40, 40)
    assert torch.equal(by_kernel(norm, x, False), F.silu(norm(x)))


class Seen(TorchFunctionMode):
    """How often the kernel is called, and PyTorch's group norm."""

    def __init__(self):
        super().__init__()
        self.own, self.plain = 0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if OPERATOR.is_(function):
            assert kind_of(function, args) == NORM
            self.own += 1
        self.plain += function is F.group_norm
        return function(*args, **(kwargs or {}))


@needs_kernel
@torch.no_grad()
def test_predictions_and_pictures_are_the_same_up_to_rounding():
    config = replace(TINY, unet=replace(TINY.unet, depths=(1, 0, 0, 0)))
    networks = fill(config, dtype=BF16)
    unet, vae = networks["unet"], networks["vae"]
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, 4, 32, 32, generator=generator).to(BF16)
    context = torch.randn(1, 77, TINY.unet.context_width, generator=generator).to(BF16)
    predict = (unet, x_t, torch.tensor(500.0), context)
    for plain, run in (
        (unet(*predict[1:]), lambda execution: execution.predict(*predict)),
        (vae.decode(x_t), lambda execution: execution.decode(vae, x_t, "")),
    ):
        with Seen() as seen:
            found = run(Execution())
        assert error(found, plain.double()) < 4e-2
        assert seen.own > seen.plain
    small = x_t[:, :, :31]
    with Seen() as seen:
        Execution().decode(vae, small, "")
    assert not seen.own


def test_other_precisions_small_pictures_and_gradients_go_without(monkeypatch):
    monkeypatch.setattr(KERNEL, "library", lambda *_: pytest.fail("nothing is compiled for these"))
    x = torch.randn(1, 4, 32, 32)
    assert joined(x, 1024) is one_after_the_other
    assert joined(x.to(BF16), 1023) is one_after_the_other
    with torch.enable_grad():
        assert joined(x.to(BF16), 1024) is one_after_the_other
    network = fill(TINY)["unet"]
    with norms_joined(network, x):
        assert not any("forward" in vars(module) for module in network.modules())


def test_without_a_compiler_all_is_as_ever(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(KERNEL, "_found", [])
    monkeypatch.setattr("sd.runtime.cpu.norms.is_supported", lambda device, dtype: True)
    norm, x = norm_and_maps(1, 32, 8, 5, 5)
    assert joined(x, 1024) is one_after_the_other
    with pytest.raises(RuntimeError, match="not compiled"):
        OPERATOR.call(x, norm.weight, norm.bias, 8, 1e-5, torch.empty_like(x))
