"""Group norms against float64, where PyTorch's own lose digits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sd
from sd.runtime.cpu.precise_norms import PreciseGroupNorm, make_precise
from sd.training.shapes.drawing import ShapesDataset


@pytest.fixture
def norm():
    norm = PreciseGroupNorm(4, 16, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    for values in norm.parameters():
        nn.init.normal_(values, generator=generator)
    return norm


def values(ratio, *, height=96, width=80):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, height, width, generator=generator) + ratio
    return x.contiguous(memory_format=torch.channels_last)


def exact(norm, x):
    weight, bias = (parameter.double() for parameter in (norm.weight, norm.bias))
    return F.group_norm(x.double().contiguous(), norm.num_groups, weight, bias, norm.eps)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0, 3, 30, 100])
def test_no_digits_are_lost(norm, ratio):
    x = values(ratio)
    before = x.clone()
    found = norm(x)
    bound = 1e-6 * max(4, ratio)  # a mean of 100 has its own rounding
    assert (found.double() - exact(norm, x)).abs().max() < bound
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    if ratio >= 30:
        own = nn.GroupNorm.forward(norm, x)
        assert (own.double() - exact(norm, x)).abs().max() > 10 * bound  # else this file could go


@torch.enable_grad()
def test_gradients_flow(norm):
    x = values(3).requires_grad_(True)
    (norm(x) * values(0)).sum().backward()
    y = x.detach().double().contiguous().requires_grad_(True)
    (exact(norm, y) * values(0)).sum().backward()
    assert (x.grad.double() - y.grad).abs().max() < 1e-5


@torch.no_grad()
def test_others_go_to_pytorch(norm):
    for x in (values(0).contiguous(), values(0, height=4, width=5)):
        assert torch.equal(norm(x), nn.GroupNorm.forward(norm, x))
    norm.bfloat16()
    x = values(0).bfloat16()
    assert torch.equal(norm(x), nn.GroupNorm.forward(norm, x))


def test_a_model_that_is_loaded_has_them_on_the_cpu():
    model = sd.load(device="cpu")
    for network in (model.unet, model.vae):
        norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
        assert norms
        assert {type(module) for module in norms} == {PreciseGroupNorm}


@torch.no_grad()
@pytest.mark.slow
def test_large_pictures_come_back_as_in_float64():
    """Without precise norms, the picture is 64 dB from that in float64; at 512x512, 39 dB."""
    vae = sd.load(device="cpu", precision="fp32").vae
    images, _ = ShapesDataset(3, 256).batch(0, 1)
    latents = vae.encode(images)[0]
    image = vae.decode(latents)
    exact = vae.double().decode(latents.double())
    error = (image - exact).square().mean()
    assert 10 * torch.log10(4 / error) > 90


def test_other_modules_keep_their_class():
    class Own(nn.GroupNorm):
        pass

    network = nn.Sequential(nn.GroupNorm(1, 1), Own(1, 1), nn.LayerNorm(1))
    make_precise(network)
    assert [type(module) for module in network] == [PreciseGroupNorm, Own, nn.LayerNorm]


@torch.no_grad()
def test_who_watches_functions_sees_a_norm(norm):
    from sd.study.benchmark.layer_kinds import NORM, LayerWatch, Rates

    with LayerWatch(torch.device("cpu"), Rates(operations=1e12, bytes=1e10)) as watch:
        norm(values(0))
    kinds = watch.profile(1.0).kinds
    assert {kind: share.calls for kind, share in kinds.items() if share.calls and kind != "rest"} == {NORM: 1}
