"""Outpainting: the canvas, its mask, and that the old picture stays. Expectations by hand."""

import numpy as np
import pytest
from PIL import Image

from sd.pipeline.image.input_settings import Expansion
from sd.pipeline.image.masks import masked_region, paste_back
from sd.pipeline.image.outpainting import expand
from sd.pipeline.image.resizing import natural
from sd.pipeline.settings import SettingError


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_the_canvas_has_the_old_picture_in_its_place():
    picture = noise(50, 40)
    canvas, mask = expand(picture, Expansion(left=16, right=24, top=8, bottom=32), overlap=4)
    assert canvas.size == mask.size == (90, 80)
    assert (canvas.mode, mask.mode) == ("RGB", "L")
    assert np.array_equal(np.asarray(canvas)[8:48, 16:66], np.asarray(picture))


def test_the_mask_is_white_where_it_is_new_and_fades_into_the_old_picture():
    _, mask = expand(noise(16, 16), Expansion(right=8), overlap=4)
    row = [0] * 12 + [51, 102, 153, 204] + [255] * 8  # in fifths
    assert np.array_equal(np.asarray(mask), np.tile(np.uint8(row), (16, 1)))
    _, mask = expand(noise(16, 16), Expansion(top=8), overlap=1)
    column = [255] * 8 + [128] + [0] * 15
    assert np.array_equal(np.asarray(mask), np.tile(np.uint8(column), (16, 1)).T)
    _, mask = expand(noise(16, 16), Expansion(left=8), overlap=0)
    assert np.array_equal(np.asarray(mask), np.tile(np.uint8([255] * 8 + [0] * 16), (16, 1)))


def test_the_mask_fades_from_each_side_that_grows_and_from_no_other():
    _, mask = expand(noise(32, 32), Expansion(left=8, bottom=16), overlap=8)
    levels = np.asarray(mask)
    assert (levels == 0)[: 32 - 8, 8 + 8 :].all()  # the corner away from both
    assert (levels[:32, 8:] > 0)[:, :8].all()
    assert (levels[:32, 8:] > 0)[-8:].all()
    assert (levels[32:] == 255).all()
    assert (levels[:, :8] == 255).all()
    # nine steps of 255 / 9: where both fade, the nearer side decides
    assert levels[32 - 1 - 2, 8 + 5] == round(255 * 6 / 9)


@pytest.mark.parametrize("overlap", [1, 100, 256])
def test_every_pixel_of_the_overlap_is_mixed_at_least_a_little(overlap):
    _, mask = expand(noise(300, 8), Expansion(left=8), overlap=overlap)
    row = np.asarray(mask)[0]
    assert (row[8 : 8 + overlap] > 0).all()
    assert (row[8 + overlap :] == 0).all()
    assert (np.diff(row.astype(int)) <= 0).all()


def test_a_picture_of_one_colour_grows_in_that_colour():
    canvas, _ = expand(Image.new("RGB", (24, 24), (10, 120, 230)), Expansion(left=64, top=40))
    assert canvas.getcolors() == [(88 * 64, (10, 120, 230))]


def test_the_fill_goes_on_from_the_edges_and_is_smooth_far_away():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[::2, :, 0] = 200  # red stripes that run to the right edge
    picture[:, :, 2] = 90
    canvas, _ = expand(Image.fromarray(picture), Expansion(right=128))
    fill = np.asarray(canvas)[:, 64:].astype(int)
    roughness = np.abs(np.diff(fill[:, :, 0], axis=0)).mean(axis=0)  # from row to row, for each column
    assert roughness[0] > 180
    assert (np.diff(roughness[:30]) < 0).all()
    assert roughness[40:].max() <= 1
    assert np.abs(fill[:, 40:, 0] - 100).max() <= 4  # the mean of the stripes
    assert (fill[:, :, 2] == 90).all()


@pytest.mark.parametrize(
    "place", [lambda mask: natural(mask.size, 128), lambda mask: masked_region(mask, (64, 128), 16)]
)
def test_old_pixels_outside_the_overlap_keep_every_bit(place):
    picture = noise(101, 90)
    canvas, mask = expand(picture, Expansion(left=40, top=16), overlap=12)
    placement = place(mask)
    made = noise(*placement.working, seed=1)
    result = np.asarray(paste_back(canvas, made, mask, placement))
    assert result.shape == (106, 141, 3)
    assert np.array_equal(result[16 + 12 :, 40 + 12 :], np.asarray(picture)[12:, 12:])
    changed = (result != np.asarray(canvas)).any(axis=-1)
    assert changed[:, :40].mean() > 0.9
    assert changed[:16].mean() > 0.9


def test_a_canvas_too_large_to_work_on_is_refused():
    with pytest.raises(SettingError) as caught:
        expand(Image.new("RGB", (4000, 8)), Expansion(left=104))
    assert str(caught.value) == (
        "expand left=104 makes 4104x8 of 4000x8; the limit is 4096. Add less, or scale the picture down first."
    )
    canvas, _ = expand(Image.new("RGB", (4000, 8)), Expansion(left=96))
    assert canvas.size == (4096, 8)
