"""Packed convolutions give the same predictions, and leave the network unchanged."""

import pytest
import torch
from conftest import TINY, fill, settings
from torch import nn

from sd.runtime.cpu import packing
from sd.runtime.cpu.packing import PackedConvolutions, can_pack
from sd.runtime.patching import patched

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="this build of PyTorch has no oneDNN"
)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x_t, context = torch.randn(2, 4, 8, 9, generator=generator), torch.randn(2, 77, 64, generator=generator)
    return x_t.to(dtype), torch.tensor(321.5), context[..., : TINY.unet.context_width].to(dtype)


@pytest.fixture
def unet():
    return fill(TINY)["unet"]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_prediction_is_the_same_and_so_are_the_weights_and_their_names(unet, dtype, error):
    """Where bf16 cannot be packed, the plain weights run."""
    unet.to(dtype)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    plain = unet(*inputs(dtype)).float()
    with patched(PackedConvolutions(unet).forwards()):
        packed = unet(*inputs(dtype)).float()
        assert list(unet.state_dict()) == list(before)
    assert (packed - plain).norm() / plain.norm() < error
    assert torch.equal(unet(*inputs(dtype)).float(), plain)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


@pytest.fixture
def counted(monkeypatch):
    """Calls of a function in the module, by its name: the convolution that each was for."""

    def counted(name):
        calls, own = [], getattr(packing, name)
        monkeypatch.setattr(packing, name, lambda conv, *given: calls.append(conv) or own(conv, *given))
        return calls

    return counted


def test_every_convolution_is_packed_and_packed_once(unet, counted):
    made, packed = counted("pack"), PackedConvolutions(unet)
    for _ in range(2):
        with patched(packed.forwards()):
            unet(*inputs())
    assert set(made) == {module for module in unet.modules() if isinstance(module, nn.Conv2d)}
    assert len(made) == len(set(made))


def test_pictures_are_made_with_packed_convolutions(model, counted):
    seen = counted("convolve")
    model.make([settings(steps=2)])
    assert len(seen) == 2 * len(model.runner.packed.convolutions)


def test_changed_weights_are_packed_anew(unet):
    packed = PackedConvolutions(unet)

    def predicted():
        with patched(packed.forwards()):
            return unet(*inputs())

    def expect_plain(before):
        plain = unet(*inputs())
        assert (predicted() - plain).norm() / plain.norm() < 1e-5
        assert (before - plain).norm() / plain.norm() > 1e-3

    before = predicted()
    unet.out.conv.weight.mul_(2)
    expect_plain(before)
    before = predicted()
    unet.out.conv.weight = nn.Parameter(-unet.out.conv.weight)
    expect_plain(before)
    before = predicted()
    unet.requires_grad_(True)  # in training: some optimisers change weights without a trace
    optimiser = torch.optim.AdamW(unet.parameters(), lr=0.01, fused=True)
    for weight in unet.parameters():
        weight.grad = torch.ones_like(weight)
    optimiser.step()
    expect_plain(before)
    assert not packed.forwards()
    unet.requires_grad_(False)
    before = predicted()
    unet.to(torch.float64)  # is not packed: the plain ones run
    with patched(packed.forwards()):
        assert (unet(*inputs(torch.float64)).float() - before).norm() / before.norm() < 1e-5


def test_outputs_are_channels_last_whatever_comes_in():
    conv = nn.Conv2d(4, 16, 3, padding=1).requires_grad_(False)
    with patched(PackedConvolutions(nn.Sequential(conv)).forwards()):
        assert conv(torch.randn(2, 4, 8, 8)).is_contiguous(memory_format=torch.channels_last)
