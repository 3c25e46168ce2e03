"""Packed convolutions give the same predictions, and everything else about the network stays as it is."""

import copy

import pytest
import torch
from conftest import TINY, fill, pixels, settings
from torch import nn

import sd
from sd.runtime.cpu import packing
from sd.runtime.cpu.packing import PackedConv2d, can_pack, convolutions_of, make_packed, pack

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="this build of PyTorch has no oneDNN")


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x_t, context = torch.randn(2, 4, 8, 9, generator=generator), torch.randn(2, 77, 64, generator=generator)
    return x_t.to(dtype), torch.tensor(321.5), context[..., : TINY.unet.context_width].to(dtype)


def distance(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def packed_unet():
    unet = fill(TINY)["unet"]
    make_packed({conv: pack(conv, conv.weight) for conv in convolutions_of(unet).values()}, torch.float32)
    return unet


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_a_loaded_model_predicts_with_packed_weights_and_keeps_the_files(tiny_ckpt, monkeypatch, precision, error):
    plain, packed = fill(TINY)["unet"], sd.load(tiny_ckpt, device="cpu", precision=precision).unet
    if not can_pack(CPU, packed.out.conv.bias.dtype):
        pytest.skip("this processor does not pack bf16")
    plain.load_state_dict(packed.float().state_dict() if precision == "fp32" else packed.state_dict())
    assert all(type(conv) is PackedConv2d for conv in convolutions_of(packed).values())
    assert {conv.weight.dtype for conv in convolutions_of(packed).values()} == {torch.float32}  # as in the file
    made = []
    monkeypatch.setattr(packing, "pack", lambda *given, own=pack: made.append(given[0]) or own(*given))
    dtype = packed.out.conv.bias.dtype
    assert distance(packed(*inputs(dtype)), plain.to(dtype)(*inputs(dtype))) < error
    assert not made  # the copies that were made while the file was read are used


@torch.no_grad()
def test_pictures_are_made_with_packed_convolutions(tiny_ckpt, monkeypatch):
    model, seen = sd.load(tiny_ckpt, device="cpu", precision="fp32"), []
    own = packing.CONVOLUTION
    monkeypatch.setattr(packing, "CONVOLUTION", lambda *given: seen.append(1) or own(*given))
    picture = pixels(model.make([settings(steps=2)])[0])
    assert len(seen) == 2 * len(convolutions_of(model.unet))
    monkeypatch.setattr(packing, "CONVOLUTION", None)  # where oneDNN is missing, the weights themselves are used
    assert abs(pixels(model.make([settings(steps=2)])[0]) - picture).max() <= 1


@torch.no_grad()
def test_changed_weights_are_packed_again():
    packed, plain = packed_unet(), fill(TINY)["unet"]

    def expect_plain(change):
        before = packed(*inputs())
        for unet in (packed, plain):
            change(unet)
        expected = plain(*inputs())
        assert distance(packed(*inputs()), expected) < 1e-5
        assert distance(before, expected) > 1e-3

    def train(unet):  # some optimisers change weights without a trace
        unet.requires_grad_(True)
        optimiser = torch.optim.AdamW(unet.parameters(), lr=0.01, fused=True)
        for weight in unet.parameters():
            weight.grad = torch.ones_like(weight)
        optimiser.step()

    expect_plain(lambda unet: unet.out.conv.weight.mul_(2))
    expect_plain(lambda unet: setattr(unet.out.conv, "weight", nn.Parameter(-unet.out.conv.weight, False)))
    expect_plain(train)


@torch.no_grad()
def test_other_precisions_and_copies_have_weights_of_their_own():
    unet = packed_unet()
    expected = unet(*inputs())
    assert distance(copy.deepcopy(unet)(*inputs()), expected) == 0
    assert distance(unet.to(torch.float64)(*inputs(torch.float64)), expected) < 1e-5  # not packed
    if can_pack(CPU, torch.bfloat16):
        assert distance(unet.to(torch.bfloat16)(*inputs(torch.bfloat16)), expected) < 3e-2


def test_gradients_pass_through_frozen_weights():
    gradients = []
    for unet in (packed_unet(), fill(TINY)["unet"]):
        x_t, timestep, context = inputs()
        with torch.enable_grad():
            unet(x_t.requires_grad_(), timestep, context).square().mean().backward()
        gradients.append(x_t.grad)
    assert distance(*gradients) < 1e-5


def test_gradients_reach_the_weights():
    unet = packed_unet().requires_grad_(True)
    with torch.enable_grad():
        unet(*inputs()).square().sum().backward()
    assert unet.input_blocks[0].conv.weight.grad.norm() > 0
