"""A picture through the VAE in tiles is what the whole would be, in the memory of a tile."""

import copy
import math
from functools import partial
from itertools import product

import pytest
import torch
from conftest import TINY, fill
from torch import nn
from torch.overrides import TorchFunctionMode

import sd
from sd.runtime.low_memory.tiled_vae import decode_tiled, encode_tiled, in_file, normalising, split
from sd.runtime.seamless import seamless
from sd.training.shapes.drawing import ShapesDataset

FLOAT_ERROR = 2e-5  # of float32 sums in another order; a tile without its surroundings is off by more than 0.1


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def worst(ours, expected):
    return (ours - expected).abs().max().item()


@pytest.fixture(scope="module")
def vae():
    return fill(TINY)["vae"]


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(12, 12), (5, 23), (23, 5), (16, 17)])
def test_tiles_decode_to_the_whole_picture(vae, sides):
    latents = randn(1, 4, *sides)
    image = decode_tiled(vae, latents, tile=8)
    assert image.shape == (1, 3, 8 * sides[0], 8 * sides[1])
    assert worst(image, vae.decode(latents)) < FLOAT_ERROR


@pytest.mark.parametrize("sides", [(12, 12), (5, 23), (16, 17)])
def test_tiles_encode_to_the_latents_of_the_whole_picture(vae, sides):
    image = randn(1, 3, 8 * sides[0], 8 * sides[1])
    for ours, expected in zip(encode_tiled(vae, image, tile=64), vae.encode(image), strict=True):
        assert ours.shape == (1, 4, *sides)
        assert worst(ours, expected) < FLOAT_ERROR


def test_tiles_may_begin_and_end_between_latents(vae):
    image = randn(1, 3, 72, 80)
    assert worst(encode_tiled(vae, image, tile=27)[0], vae.encode(image)[0]) < FLOAT_ERROR


def test_every_picture_of_a_batch_has_its_own_statistics(vae):
    latents = torch.cat([randn(1, 4, 9, 9), 3 * randn(1, 4, 9, 9) + 1])
    image = decode_tiled(vae, latents, tile=5)
    assert worst(image, vae.decode(latents)) < FLOAT_ERROR
    assert worst(image[1:], decode_tiled(vae, latents[1:], tile=5)) < FLOAT_ERROR


@pytest.mark.parametrize("axes", ["x", "y", "xy"])
def test_a_seamless_vae_stays_seamless_in_tiles(vae, axes):
    latents, image = randn(1, 4, 10, 7), randn(1, 3, 80, 56)
    with seamless(vae, axes):
        decoded = decode_tiled(vae, latents, tile=5, axes=axes)
        assert worst(decoded, vae.decode(latents)) < FLOAT_ERROR
        assert worst(encode_tiled(vae, image, tile=40, axes=axes)[0], vae.encode(image)[0]) < FLOAT_ERROR
    assert worst(decoded, vae.decode(latents)) > 0.1


def test_a_picture_of_one_tile_goes_the_ordinary_way_bit_for_bit(vae):
    latents, image = randn(2, 4, 8, 6), randn(2, 3, 64, 48)
    assert torch.equal(decode_tiled(vae, latents, tile=8), vae.decode(latents))
    assert all(map(torch.equal, encode_tiled(vae, image, tile=64), vae.encode(image)))


def test_what_is_given_stays_as_it_was_and_so_does_the_vae(vae):
    latents, image = randn(1, 4, 9, 9), randn(1, 3, 72, 72)
    decode_tiled(vae, latents, tile=5)
    encode_tiled(vae, image, tile=40)
    assert torch.equal(latents, randn(1, 4, 9, 9))
    assert torch.equal(image, randn(1, 3, 72, 72))
    with pytest.raises(RuntimeError):
        decode_tiled(vae, randn(1, 5, 9, 9), tile=5)
    assert not any("forward" in vars(module) for module in vae.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tiles_have_the_precision_of_the_networks(vae, dtype):
    """Beside the whole in float64, tiles are no further off than the whole is."""
    latents = randn(1, 4, 12, 9)
    exact = copy.deepcopy(vae).double().decode(latents.double())
    narrow = copy.deepcopy(vae).to(dtype)
    image = decode_tiled(narrow, latents.to(dtype), tile=6)
    assert image.dtype == dtype
    allowed = (narrow.decode(latents.to(dtype)) - exact).square().mean().sqrt()
    assert (image - exact).square().mean().sqrt() < max(1.2 * allowed, 1e-5)


# The embedded model, whose group norms have one channel a group where the picture is largest.


@pytest.fixture(scope="module")
def drawn():
    """Latents and their picture in float64, and the VAE in float32."""
    vae = sd.load(device="cpu", precision="fp32").vae
    with torch.no_grad():
        latents, _ = vae.encode(ShapesDataset(7, 192).batch(0, 1)[0])
        return vae, latents, copy.deepcopy(vae).double().decode(latents.double())


@pytest.mark.slow
def test_a_drawn_picture_is_the_same_to_less_than_a_level(drawn):
    vae, latents, exact = drawn
    error = 127.5 * (decode_tiled(vae, latents, tile=10) - exact)
    psnr = 10 * math.log10(255**2 / error.square().mean().item())
    print(f"PSNR {psnr:.1f} dB, largest difference {error.abs().max().item():.5f} of 255 levels")
    assert psnr > 90
    assert error.abs().max() < 0.1


def test_no_seam_shows_where_tiles_meet(drawn):
    """Differences between neighbours are those of the whole across borders, as elsewhere; alone, tiles break there."""
    vae, latents, exact = drawn
    borders = [8 * columns.stop - 1 for columns in split(24, 3)[:-1]]  # the pixel before each

    def seam(image):
        error = (image - exact).diff(dim=-1).abs().mean((0, 1, 2))
        elsewhere = [place for place in range(len(error)) if place not in borders]
        return (error[borders].mean() / error[elsewhere].mean()).item()

    alone = torch.cat([vae.decode(part) for part in latents.chunk(3, dim=-1)], dim=-1)
    tiled = seam(decode_tiled(vae, latents, tile=8))
    print(f"seam: {tiled:.2f} in tiles, {seam(alone):.2f} when each tile is decoded alone")
    assert tiled < 2 < seam(alone)


# Memory


class LargestTensor(TorchFunctionMode):
    """The most numbers in a tensor that any function of PyTorch returned; what was given and what is in files aside."""

    def __init__(self, given):
        super().__init__()
        self.largest, self.aside = 0, [given]

    def in_file(self, shape, dtype):
        with torch._C.DisableTorchFunction():
            self.aside.append(in_file(shape, dtype))  # kept, so that its address belongs to nothing else
        return self.aside[-1]

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            with torch._C.DisableTorchFunction():
                storage = result.untyped_storage()
                if storage.data_ptr() not in [other.untyped_storage().data_ptr() for other in self.aside]:
                    self.largest = max(self.largest, storage.nbytes() // 4)
        return result


@pytest.fixture
def largest(monkeypatch):
    def largest(function, given, **options):
        with LargestTensor(given) as seen:
            monkeypatch.setattr("sd.runtime.low_memory.tiled_vae.in_file", seen.in_file)
            function(given, **options)
        return seen.largest

    return largest


@pytest.mark.slow
def test_the_largest_tensor_depends_on_the_tile_and_not_on_the_picture(vae, largest):
    width = TINY.vae.width
    decode, encode = partial(decode_tiled, vae, tile=6), partial(encode_tiled, vae, tile=64)
    sizes = [largest(decode, randn(1, 4, side, side)) for side in (18, 30)]
    assert sizes[0] == sizes[1] <= 2 * width * (6 * 8 + 4) ** 2  # in the last step up; twice the channels come to it
    assert largest(vae.decode, randn(1, 4, 18, 18)) == 2 * width * (18 * 8) ** 2
    sizes = [largest(encode, randn(1, 3, side, side)) for side in (192, 256)]
    assert sizes[0] == sizes[1] <= width * (64 + 4) ** 2
    assert largest(vae.encode, randn(1, 3, 192, 192)) >= width * 192**2


def test_features_wait_in_files_that_vanish(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tensor = in_file((2, 3, 5), torch.bfloat16)
    tensor.copy_(torch.arange(30.0).reshape(2, 3, 5))
    assert tensor.sum(dtype=torch.float32) == 29 * 30 / 2
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(
        OSError, match=r"of a picture in tiles do not fit into .* name another folder in TMPDIR\."
    ) as told:
        in_file((2**20, 2**20, 2**10), torch.float32)
    assert "4503599.6 GB" in str(told.value)


# Parts.


def test_tiles_cover_a_side_without_gap_and_are_equal_but_for_one_position():
    for side, count in product((1, 7, 64, 65, 200), (1, 2, 3)):
        if count <= side:
            parts = split(side, count)
            assert [position for part in parts for position in part] == list(range(side))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_group_norm_with_its_own_statistics_given_is_that_group_norm():
    norm = nn.GroupNorm(2, 6, eps=1e-6)
    norm.weight.copy_(randn(6)), norm.bias.copy_(randn(6))
    x = randn(3, 6, 4, 5) + 2
    variance, mean = torch.var_mean(x.reshape(3, 2, 60).double(), dim=-1, correction=0)
    assert worst(normalising(norm, mean, variance)(x), norm(x)) < 1e-5
    assert worst(normalising(norm, mean + 0.1, variance)(x), norm(x)) > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: decode_tiled(vae, randn(1, 4, 9, 9), tile=0), "tile must be 1 latent or more, got 0"),
        (
            lambda vae: encode_tiled(vae, randn(1, 3, 72, 72), tile=0),
            r"tile must be 8 pixels or more \(one latent\), got 0",
        ),
        (
            lambda vae: encode_tiled(vae, randn(1, 3, 72, 68), tile=64),
            r"image sides must be multiples of 8 \(one latent per 8x8\), got 68x72",
        ),
    ],
)
def test_impossible_tiles_and_sides_are_refused(vae, call, message):
    with pytest.raises(ValueError, match=message):
        call(vae)
