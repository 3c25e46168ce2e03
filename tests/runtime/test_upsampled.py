"""Convolutions behind upsampling, computed on what is upsampled: the same results with fewer multiplications."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, fill
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sd.runtime.cpu.upsampling
from sd.networks import unet, vae
from sd.runtime.cpu.packing import can_pack
from sd.runtime.cpu.upsampling import UpsampledConvolutions, phase_weights
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.runtime.patching import exchanged

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="this build of PyTorch has no oneDNN"
)
PRECISIONS = [torch.float32] + [torch.bfloat16] * can_pack(torch.device("cpu"), torch.bfloat16)


def layer(kind=vae.Upsample, channels=32, dtype=torch.float32):
    torch.manual_seed(0)
    return kind(channels).to(dtype).requires_grad_(False)


def exact(layer, x):
    """The definition, in float64."""
    large = x.double().repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.conv2d(large, layer.conv.weight.double(), layer.conv.bias.double(), padding=1)


def error(found, right):
    return ((found.double() - right).norm() / right.norm()).item()


def in_pieces(layer, x, *size):
    network = nn.Sequential(layer)
    with torch.no_grad(), exchanged(UpsampledConvolutions(network).forwards(x)):
        assert "forward" in vars(layer)
        return layer(x, *size)


def test_weights_of_a_window_that_is_all_inside_have_the_same_sum():
    weights = phase_weights(torch.arange(9.0).reshape(1, 1, 3, 3))
    assert [each.sum() for each in weights.values()] == [36] * 4
    assert weights[0, 0].tolist() == [[[[0, 1 + 2], [3 + 6, 4 + 5 + 7 + 8]]]]
    assert weights[1, 0].tolist() == [[[[0 + 3, 1 + 2 + 4 + 5], [6, 7 + 8]]]]
    assert weights[0, 1].tolist() == [[[[0 + 1, 2], [3 + 4 + 6 + 7, 5 + 8]]]]
    assert weights[1, 1].tolist() == [[[[0 + 1 + 3 + 4, 2 + 5], [6 + 7, 8]]]]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 15, 19), (1, 1, 256), (3, 300, 1)])
def test_the_error_is_that_of_rounding(shape, dtype):
    batch, height, width = shape
    own = layer(dtype=dtype)
    x = torch.randn(batch, 32, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    right = exact(own, x)
    plain, found = own(x), in_pieces(own, x)
    assert found.shape == plain.shape
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error(found, right) < (1e-6 if dtype == torch.float32 else 1.6 * error(plain, right))


def test_other_sizes_than_twice_as_large_small_ones_and_gradients_go_the_plain_way():
    own = layer(unet.Upsample)
    x = torch.randn(1, 32, 16, 16)
    assert error(in_pieces(own, x, torch.Size([32, 32])), exact(own, x)) < 1e-6
    assert torch.equal(in_pieces(own, x, torch.Size([31, 32])), own(x, torch.Size([31, 32])))
    small = x[:, :, :8, :8]
    assert torch.equal(in_pieces(own, small, torch.Size([16, 16])), own(small, torch.Size([16, 16])))
    with torch.enable_grad(), exchanged(UpsampledConvolutions(nn.Sequential(own)).forwards(x)):
        assert "forward" not in vars(own)


@torch.no_grad()
def test_changed_weights_are_seen():
    own = layer()
    pieces, x = UpsampledConvolutions(nn.Sequential(own)), torch.randn(1, 32, 16, 16)

    def found():
        with exchanged(pieces.forwards(x)):
            return own(x)

    before = found()
    own.conv.weight.mul_(2)
    assert error(found(), exact(own, x)) < 1e-6
    own.conv.weight = nn.Parameter(own.conv.weight / 3, requires_grad=False)
    assert error(found(), exact(own, x)) < 1e-6
    assert not torch.equal(found(), before)


@torch.no_grad()
@pytest.mark.parametrize("options", [RunOptions(), RunOptions(low_memory=True)])
def test_pictures_are_decoded_with_fewer_multiplications(options):
    network, latents = fill(TINY)["vae"], torch.randn(1, 4, 16, 17)
    upsampled = [module.conv for module in network.modules() if isinstance(module, vae.Upsample)]
    with FlopCounterMode(display=False) as plain:
        right = network.decode(latents)
    seen = []
    original = sd.runtime.cpu.upsampling.convolve_upsampled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sd.runtime.cpu.upsampling, "convolve_upsampled", lambda *given: seen.append(1) or original(*given)
        )
        with FlopCounterMode(display=False) as less:  # which does not know oneDNN's own call
            found = Execution(options).decode(network, latents, "")
        assert len(seen) == len(upsampled) > 0
        assert error(found, right.double()) < 1e-4
        Execution(options).decode(network, latents, "x")  # goes on at the other side: the plain way
        assert len(seen) == len(upsampled)
    assert less.get_total_flops() < plain.get_total_flops()
    assert not any("forward" in vars(module) for module in network.modules())


@torch.no_grad()
@pytest.mark.parametrize("sides", [(32, 32), (32, 33)])
def test_predictions_are_the_same_where_sides_can_be_halved_and_where_not(sides):
    network = fill(TINY)["unet"]
    x_t, context = torch.randn(1, 4, *sides), torch.randn(1, 77, TINY.unet.context_width)
    right = network(x_t, torch.tensor(500.0), context)
    found = Execution().predict(network, x_t, torch.tensor(500.0), context)
    assert error(found, right.double()) < 1e-5
