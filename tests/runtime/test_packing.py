"""Packed convolutions give the same predictions, and the network knows nothing of them."""

import pytest
import torch
from conftest import TINY, fill, settings
from torch import nn

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


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_prediction_is_the_same(unet, dtype, error):
    """Where bf16 cannot be packed, the plain weights run."""
    unet.to(dtype)
    plain = unet(*inputs(dtype)).float()
    with patched(PackedConvolutions(unet).forwards()):
        packed = unet(*inputs(dtype)).float()
    assert (packed - plain).norm() / plain.norm() < error
    assert torch.equal(unet(*inputs(dtype)).float(), plain)


@torch.no_grad()
def test_every_convolution_is_packed_and_packed_once(unet, monkeypatch):
    import sd.runtime.cpu.packing

    made = []
    monkeypatch.setattr(
        sd.runtime.cpu.packing,
        "pack",
        lambda *given, own=sd.runtime.cpu.packing.pack: made.append(given[0]) or own(*given),
    )
    packed = PackedConvolutions(unet)
    for _ in range(2):
        with patched(packed.forwards()):
            unet(*inputs())
    assert set(made) == {module for module in unet.modules() if isinstance(module, nn.Conv2d)}
    assert len(made) == len(set(made))


@torch.no_grad()
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
    assert (packed_in_double(packed, unet) - before).norm() / before.norm() < 1e-5


def packed_in_double(packed, unet):
    with patched(packed.forwards()):
        return unet(*inputs(torch.float64)).float()


@torch.no_grad()
def test_activations_lie_in_channels_last_order_whatever_comes_in():
    conv = nn.Conv2d(4, 16, 3, padding=1).requires_grad_(False)
    with patched(PackedConvolutions(nn.Sequential(conv)).forwards()):
        assert conv(torch.randn(2, 4, 8, 8)).is_contiguous(memory_format=torch.channels_last)


def test_weights_and_their_names_stay_what_they_are(unet):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    packed = PackedConvolutions(unet)
    with patched(packed.forwards()):
        assert list(unet.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert not any("forward" in vars(module) for module in unet.modules())


def test_pictures_are_made_with_packed_convolutions(model, monkeypatch):
    import sd.runtime.cpu.packing

    seen = []
    monkeypatch.setattr(
        sd.runtime.cpu.packing,
        "convolve",
        lambda *given, own=sd.runtime.cpu.packing.convolve: seen.append(1) or own(*given),
    )
    model.make([settings(steps=2)])
    assert len(seen) == 2 * len(model.runner.packed.convolutions)
