"""Preparing pictures for the depth network and depth for the UNet; maps of one's own; maps to look at."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from sd.pipeline.errors import PictureError
from sd.pipeline.image.depth_maps import (
    colour_picture,
    colour_table,
    given_depth_map,
    grey_picture,
    latent_depth,
    network_input,
    network_size,
    to_depth,
)
from sd.pipeline.image.masks import match
from sd.pipeline.image.resizing import fit, resized
from sd.pipeline.image.tensors import save_png


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def map_of(levels):
    return torch.as_tensor(levels, dtype=torch.float32)[None, None]


# By hand: 384 / width and 384 / height, the nearer to 1 times both sides, to the nearest 32.
SIZES = {
    (512, 512): (384, 384),
    (768, 512): (576, 384),  # 0.5 and 0.75
    (512, 768): (384, 576),
    (384, 384): (384, 384),
    (1920, 1080): (672, 384),  # 0.2 and 0.3556: 682.7 is nearer to 672 than to 704
    (1024, 64): (384, 32),  # 0.375 and 6: 24 high, which rounds to 32
    (4096, 200): (384, 32),  # 0.094 and 1.92: 0.906 away from 1 and 0.92; 18.75 high
    (4096, 100): (384, 32),  # 9.4 high would be none
    (256, 512): (192, 384),  # 1.5 and 0.75
    (300, 200): (384, 256),  # 1.28 and 1.92
    (768, 256): (1152, 384),  # 0.5 and 1.5, as near: the height decides
    (256, 768): (128, 384),
    (64, 64): (384, 384),
    (416, 368): (448, 384),  # 0.923 and 1.043: 434.1 is nearer to 448 than to 416
}


@pytest.mark.parametrize(("size", "expected"), SIZES.items(), ids=[f"{w}x{h}" for w, h in SIZES])
def test_network_size_is_the_one_that_scales_least(size, expected):
    assert network_size(*size, 384) == expected


def test_networks_trained_on_other_sizes_see_pictures_of_theirs():
    assert network_size(512, 512, 64) == (64, 64)
    assert network_size(96, 64, 64) == (96, 64)


def keys_cubic(distance, a=-0.75):
    """Keys, "Cubic Convolution Interpolation for Digital Image Processing" (1981), eq. 15, with OpenCV's a."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def slow_bicubic(values, height, width):
    """As OpenCV: four neighbours along each side whatever the scale, edges repeated. values (H, W)"""

    def weights(length, wanted):
        table = np.zeros((wanted, length))
        for i in range(wanted):
            place = (i + 0.5) * length / wanted - 0.5
            for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
                table[i, min(max(j, 0), length - 1)] += keys_cubic(place - j)
        return table

    return weights(values.shape[0], height) @ values @ weights(values.shape[1], width).T


@pytest.mark.parametrize("size", [(40, 88), (96, 70), (150, 200)])
def test_network_input_is_opencvs_bicubic(size):
    """And not antialiased where the picture becomes smaller."""
    image = randn(1, 3, *size).clamp(-1, 1)
    found = network_input(image, 64)
    assert found.shape[-2:] == network_size(size[1], size[0], 64)[::-1]
    for channel in range(3):
        slow = slow_bicubic(image[0, channel].double().numpy(), *found.shape[-2:])
        np.testing.assert_allclose(found[0, channel].numpy(), slow, atol=1e-4)  # a = -0.5 or antialias: 0.1 or more


def test_network_input_is_normalised_after_resizing_in_the_original_with_the_same_result():
    image = randn(1, 3, 100, 132).clamp(-1, 1)
    size = network_size(132, 100, 96)[::-1]
    theirs = torch.nn.functional.interpolate((image + 1) / 2, size, mode="bicubic", align_corners=False)
    torch.testing.assert_close(network_input(image, 96), (theirs - 0.5) / 0.5, rtol=0, atol=1e-5)


def test_network_input_is_not_clipped():
    image = -torch.ones(1, 3, 64, 64)
    image[..., 32:] = 1
    assert network_input(image, 96).max() > 1.02
    assert network_input(image, 96).min() < -1.02


def test_network_input_of_the_right_size_is_the_image_itself():
    image = randn(1, 3, 96, 64)
    assert torch.equal(network_input(image, 64), image)


def test_depth_for_the_unet_spans_each_picture_after_resizing():
    depth = 1000 * randn(2, 1, 64, 96).abs() * torch.tensor([1.0, 7.0]).reshape(2, 1, 1, 1)
    found = latent_depth(depth, (8, 12))
    assert found.shape == (2, 1, 8, 12)
    for number in range(2):
        slow = slow_bicubic(depth[number, 0].double().numpy(), 8, 12)
        low, high = slow.min(), slow.max()
        np.testing.assert_allclose(found[number, 0].numpy(), 2 * (slow - low) / (high - low + 0.001) - 1, atol=1e-5)
    assert found.amin((1, 2, 3)).tolist() == [-1, -1]


def test_depth_for_the_unet_is_diffusers_up_to_its_division_by_zero():
    """`StableDiffusionDepth2ImgPipeline.prepare_depth_map`, given a map."""
    from diffusers import StableDiffusionDepth2ImgPipeline

    depth = 100 + 900 * torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0))
    pipeline = StableDiffusionDepth2ImgPipeline.__new__(StableDiffusionDepth2ImgPipeline)
    object.__setattr__(pipeline, "vae_scale_factor", 8)
    image = torch.zeros(1, 3, 64, 64)
    theirs = pipeline.prepare_depth_map(image, depth, 1, False, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(latent_depth(depth[:, None], (8, 8)), theirs, rtol=0, atol=1e-5)


def test_a_thousandth_of_a_unit_is_added_to_the_span():
    """As the original model class does; it counts only where the depth is almost constant."""
    assert latent_depth(map_of([[0.0, 0.001]]), (1, 2)).flatten().tolist() == pytest.approx([-1, 0])
    assert latent_depth(map_of([[5.0, 5.003]]), (1, 2)).flatten().tolist() == pytest.approx([-1, 0.5], abs=1e-3)


@pytest.mark.parametrize("level", [0.0, 0.7, 65535.0])
def test_constant_depth_is_far_everywhere(level):
    assert (latent_depth(torch.full((1, 1, 16, 16), level), (2, 2)) == -1).all()
    assert np.asarray(grey_picture(torch.full((1, 1, 16, 16), level), (16, 16))).max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    values = randn(1, 3, 40, 40).to(dtype)
    assert network_input(values, 64).dtype == latent_depth(values[:, :1], (5, 5)).dtype == torch.float32


RAMP = np.linspace(0, 255, 48).round().astype(np.uint8).reshape(6, 8)
DEEP = RAMP.astype(np.uint16) * 257 + np.arange(8, dtype=np.uint16)  # differs in the lower 8 bits
GIVEN = {  # what is given -> its levels, 0 to 65535
    "8 bits": (RAMP, RAMP * 257.0),
    "8 bits in colour": (np.stack([RAMP] * 3, axis=2), RAMP * 257.0),
    "8 bits, transparent": (np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, 0)]), RAMP * 0.0),
    "black and white": (RAMP > 99, (RAMP > 99) * 65535.0),
    "16 bits": (DEEP, (DEEP - DEEP.min()) * (65535.0 / np.ptp(DEEP))),
    "floats": (3 - RAMP / 255.0, (255.0 - RAMP) * 257),
    "negative integers": (RAMP.astype(np.int32) - 300, RAMP * 257.0),
    "constant floats": (np.full((6, 8), 0.3), RAMP * 0.0),
}


@pytest.mark.parametrize(("given", "levels"), GIVEN.values(), ids=GIVEN)
def test_given_arrays_become_levels_with_near_large(given, levels):
    found = given_depth_map(given)
    assert (found.mode, found.size) == ("F", (8, 6))
    np.testing.assert_allclose(np.asarray(found), levels, atol=0.01)
    np.testing.assert_allclose(np.asarray(given_depth_map(given, invert=True)), 65535 - levels, atol=0.01)


FILES = {  # name, picture, its levels
    "8 bits": ("x.png", Image.fromarray(RAMP), RAMP * 257.0),
    "16 bits": ("x.png", Image.fromarray(DEEP), DEEP),
    "16 bits, TIFF": ("x.tiff", Image.fromarray(DEEP), DEEP),
    "16 bits, PGM": ("x.pgm", Image.fromarray(DEEP), DEEP),
    "floats, TIFF": ("x.tiff", Image.fromarray(RAMP.astype(np.float32) / 100), RAMP * 257.0),
    "32 bits, TIFF": ("x.tiff", Image.fromarray(RAMP.astype(np.int32) - 99), RAMP * 257.0),
    "colours": ("x.png", Image.fromarray(np.stack([RAMP] * 3, axis=2)), RAMP * 257.0),
    "palette": ("x.gif", Image.fromarray(RAMP), RAMP * 257.0),
}


@pytest.mark.parametrize(("name", "picture", "levels"), FILES.values(), ids=FILES)
def test_given_files_and_pictures_keep_every_level(tmp_path, name, picture, levels):
    picture.save(tmp_path / name)
    np.testing.assert_allclose(np.asarray(given_depth_map(tmp_path / name)), levels, atol=0.01)
    with Image.open(tmp_path / name) as opened:
        np.testing.assert_allclose(np.asarray(given_depth_map(opened)), levels, atol=0.01)


def test_given_map_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    for name, picture in (("deep.png", Image.fromarray(DEEP)), ("plain.png", Image.fromarray(RAMP))):
        picture.save(tmp_path / name, exif=exif)
        upright = np.rot90(np.asarray(given_depth_map(picture)), -1)
        assert np.array_equal(np.asarray(given_depth_map(tmp_path / name)), upright)


def test_deep_tiff_in_which_0_is_white_has_white_near(tmp_path):
    Image.fromarray(DEEP).save(tmp_path / "x.tiff")
    data, entry = (tmp_path / "x.tiff").read_bytes(), struct.pack("<HHI", 262, 3, 1)  # TIFF 6.0: what 0 is
    assert data.count(entry + b"\1\0") == 1
    (tmp_path / "x.tiff").write_bytes(data.replace(entry + b"\1\0", entry + b"\0\0"))
    assert np.array_equal(np.asarray(given_depth_map(tmp_path / "x.tiff")), 65535 - DEEP)


def test_map_of_8_and_of_16_bits_tell_the_unet_the_same():
    plain, deep = (
        to_depth(given_depth_map(Image.fromarray(levels))) for levels in (RAMP, RAMP.astype(np.uint16) * 257)
    )
    assert torch.equal(plain, deep)
    assert plain.shape == (1, 1, 6, 8)
    assert latent_depth(plain, (3, 4)).max() > 0.9999  # the 0.001 is small beside the levels


BAD = {
    "text": (object(), TypeError, "depth map is of type object"),
    "complex": (np.zeros((4, 4), complex), TypeError, "depth map is an array of complex128"),
    "three axes": (
        np.zeros((4, 4, 3)),
        TypeError,
        r"shape \(4, 4, 3\). Give .* or an array of numbers of shape \(H, W\)",
    ),
    "empty": (np.zeros((0, 4)), TypeError, r"shape \(0, 4\)"),
    "NaN": (np.array([[0.0, np.nan]]), PictureError, "depth map has numbers that are not finite"),
    "infinite": (np.array([[0.0, np.inf]]), PictureError, "depth map has numbers that are not finite"),
    "absent": ("nothere.png", PictureError, "nothere.png does not exist"),
}


@pytest.mark.parametrize(("given", "error", "sentence"), BAD.values(), ids=BAD)
def test_what_is_no_depth_map_is_refused_in_a_sentence(given, error, sentence):
    with pytest.raises(error, match=sentence):
        given_depth_map(given)


def test_map_of_another_shape_than_its_picture_is_refused():
    depth_map = given_depth_map(RAMP)
    assert match(depth_map, (16, 12), "depth map").size == (16, 12)
    with pytest.raises(PictureError, match=r"the depth map is 8x6 and the picture 16x16. Give a depth map of the same"):
        match(depth_map, (16, 16), "depth map")


def test_map_goes_to_the_working_size_as_its_picture_does():
    """Between its levels, never beyond them: Lanczos would ring at every edge."""
    steps = given_depth_map(np.kron(np.array([[0, 65535]], np.uint16), np.ones((100, 75), np.uint16)))
    assert resized(steps, (300, 200)).getextrema() == (0, 65535)
    placed = np.asarray(fit((150, 100), (64, 64), "crop").place(steps))
    assert placed.shape == (64, 64)
    assert placed.min() >= 0
    assert placed.max() <= 65535
    assert (placed[:, 0] == 0).all()
    assert (placed[:, -1] == 65535).all()


def test_grey_picture_keeps_16_bits_in_a_png(tmp_path):
    depth = map_of(DEEP) / 3000
    save_png(grey_picture(depth, (8, 6)), tmp_path / "x.png", {"made by": "a test"})
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode.startswith("I")
        levels = np.asarray(picture).astype(int)
    spread = (DEEP.astype(float) - DEEP.min()) * 65535 / np.ptp(DEEP)
    assert np.abs(levels - spread).max() <= 1
    assert (levels.min(), levels.max()) == (0, 65535)
    assert np.abs(np.asarray(given_depth_map(tmp_path / "x.png")) - levels).max() == 0


def test_grey_picture_spans_all_levels_at_every_size():
    depth = map_of(np.where(np.arange(64)[:, None] > np.arange(64), 900.0, 100.0))
    for size in ((64, 64), (200, 100), (33, 47)):
        picture = grey_picture(depth, size)
        assert picture.size == size
        assert picture.getextrema() == (0, 65535)


def cielab(colours):
    """(N, 3) sRGB of 8 bits -> CIE 1976 L* a* b*: IEC 61966-2-1 and CIE 15, white point D65."""
    values = colours / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def test_colours_become_lighter_evenly_from_far_to_near():
    assert colour_table().shape == (256, 3)
    assert len(np.unique(colour_table(), axis=0)) == 256
    lab = cielab(colour_table().astype(float))
    rises = np.diff(lab[::8, 0])
    assert rises.min() > 0
    assert rises.max() < 1.5 * rises.min()
    assert lab[0, 0] < 12
    assert lab[-1, 0] > 92
    steps = np.linalg.norm(np.diff(lab[::8], axis=0), axis=1)
    assert steps.max() < 2 * steps.min()


def test_colour_picture_has_the_colours_of_its_levels():
    depth = map_of(np.arange(256.0).reshape(16, 16))
    picture = colour_picture(depth, (16, 16))
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture).reshape(256, 3), colour_table())


def test_coloured_map_given_back_keeps_its_order():
    back = np.asarray(given_depth_map(Image.fromarray(colour_table()[None])))[0] / 257
    assert np.diff(back).min() >= -1  # the brightness is rounded to 8 bits
    assert np.diff(back[::4]).min() > 0
