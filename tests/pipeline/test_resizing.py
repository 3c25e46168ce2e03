"""Resizing: which part is taken, where it lies, and the way back. Expectations by hand."""

import numpy as np
import pytest
from PIL import Image

from sd.pipeline.image.input_settings import RESIZE_NAMES
from sd.pipeline.image.reading import PictureError
from sd.pipeline.image.resizing import fit, natural


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("picture", "working", "taken"),
    [
        ((1000, 500), (512, 512), (250, 0, 750, 500)),  # the middle square
        ((500, 1000), (512, 512), (0, 250, 500, 750)),
        ((100, 100), (512, 256), (0, 25, 100, 75)),  # enlarged
        ((515, 512), (512, 512), (1, 0, 513, 512)),  # as large already: only cut
        ((519, 263), (512, 256), (3, 3, 515, 259)),
        ((520, 512), (512, 512), (4, 0, 516, 512)),
        ((1, 3000), (512, 512), (0, 1499, 1, 1500)),
    ],
)
def test_crop_takes_the_middle(picture, working, taken):
    placement = fit(picture, working, "crop")
    assert (placement.taken, placement.shown) == (taken, (0, 0, *working))


@pytest.mark.parametrize(
    ("picture", "working", "shown"),
    [
        ((1000, 500), (512, 512), (0, 128, 512, 384)),
        ((500, 1000), (512, 512), (128, 0, 384, 512)),
        ((100, 100), (512, 256), (128, 0, 384, 256)),
        ((505, 510), (512, 512), (3, 1, 508, 511)),  # as large already: only padded
        ((1, 3000), (512, 512), (255, 0, 256, 512)),
    ],
)
def test_pad_shows_all_in_the_middle(picture, working, shown):
    placement = fit(picture, working, "pad")
    assert (placement.taken, placement.shown) == ((0, 0, *picture), shown)


def test_stretch_fills_everything_with_everything():
    placement = fit((1000, 500), (512, 512), "stretch")
    assert (placement.taken, placement.shown) == ((0, 0, 1000, 500), (0, 0, 512, 512))


@pytest.mark.parametrize("mode", RESIZE_NAMES)
@pytest.mark.parametrize("size", [(300, 200), (64, 64), (200, 300), (1, 900), (900, 1)])
def test_pictures_and_masks_come_out_at_the_working_size_and_go_back_to_theirs(mode, size):
    picture = noise(*size)
    placement = fit(size, (128, 64), mode)
    placed = placement.place(picture)
    left, top, right, bottom = placement.taken
    assert (placed.size, placed.mode) == ((128, 64), "RGB")
    assert (placement.place(picture.convert("L")).size, placement.place(picture.convert("L")).mode) == ((128, 64), "L")
    assert placement.back(placed).size == (right - left, bottom - top)


def test_a_picture_of_the_right_size_keeps_every_bit():
    picture = noise(128, 64)
    for mode in RESIZE_NAMES:
        placed = fit((128, 64), (128, 64), mode).place(picture)
        assert np.array_equal(np.asarray(placed), np.asarray(picture))


def test_a_picture_that_is_only_cut_or_padded_keeps_every_bit():
    picture = noise(130, 69)
    placed = fit(picture.size, (128, 64), "crop").place(picture)
    assert np.array_equal(np.asarray(placed), np.asarray(picture)[2:66, 1:129])
    padded = fit(picture.size, (136, 72), "pad")
    assert np.array_equal(np.asarray(padded.back(padded.place(picture))), np.asarray(picture))


def test_padding_repeats_the_edges():
    rows = np.array([[[10], [20]]], np.uint8).repeat(3, axis=2).repeat(32, axis=1).repeat(64, axis=0)  # dark, bright
    placed = np.asarray(fit((64, 64), (128, 64), "pad").place(Image.fromarray(rows)))
    assert placed[:, :64].max() == 10
    assert placed[:, 64:].min() == 20


def test_stretch_shows_left_as_left_and_right_as_right():
    halves = Image.new("RGB", (200, 100), "red")
    halves.paste("blue", (100, 0, 200, 100))
    placement = fit((200, 100), (64, 128), "stretch")
    placed = placement.place(halves)
    assert (placed.getpixel((0, 64)), placed.getpixel((63, 64))) == ((255, 0, 0), (0, 0, 255))
    back = placement.back(placed)
    assert (back.size, back.getpixel((0, 0)), back.getpixel((199, 99))) == ((200, 100), (255, 0, 0), (0, 0, 255))


def test_cutting_the_padding_off_leaves_the_picture_at_the_working_size():
    placement = fit((1000, 500), (512, 512), "pad")
    made = Image.new("RGB", (512, 512), "red")
    made.paste("green", (0, 128, 512, 384))
    assert placement.cut(made).getcolors() == [(512 * 256, (0, 128, 0))]


def test_enlarging_a_mask_leaves_black_black_away_from_its_edge():
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    levels = np.asarray(fit((64, 64), (512, 512), "stretch").place(mask))
    assert levels[:, : 8 * 31].max() == 0  # Lanczos would leave specks up to three old pixels away
    assert levels[:, 8 * 33 :].min() == 255


def test_whether_the_part_that_is_worked_on_has_all_of_the_mask():
    placement = fit((1000, 500), (512, 512), "crop")  # 250 to 750
    mask = Image.new("L", (1000, 500))
    assert placement.covers(mask)
    mask.paste(255, (250, 0, 750, 500))
    assert placement.covers(mask)
    mask.putpixel((750, 3), 1)
    assert not placement.covers(mask)


@pytest.mark.parametrize("working", [(500, 512), (512, 56), (4104, 512), (0, 512)])
def test_working_sizes_that_cannot_be_are_refused(working):
    with pytest.raises(ValueError, match=f"multiples of 8, got {working[0]}x{working[1]}"):
        fit((512, 512), working, "crop")


def test_a_mode_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="resize mode 'squash' does not exist; there are crop, pad and stretch"):
        fit((512, 512), (512, 512), "squash")


def test_pictures_of_other_sizes_than_the_placement_is_for_are_refused():
    placement = fit((100, 100), (128, 128), "crop")
    with pytest.raises(ValueError, match=r"for a picture of \(100, 100\), got one of \(99, 100\)"):
        placement.place(Image.new("RGB", (99, 100)))
    with pytest.raises(ValueError, match=r"made at \(128, 128\), got one of \(100, 100\)"):
        placement.back(Image.new("RGB", (100, 100)))


@pytest.mark.parametrize(
    ("picture", "working", "shown"),
    [
        ((512, 512), (512, 512), (0, 0, 512, 512)),
        ((768, 512), (768, 512), (0, 0, 768, 512)),  # 1.5 times as many pixels as 512x512
        ((500, 501), (504, 504), (2, 1, 502, 502)),
        ((1024, 512), (1024, 512), (0, 0, 1024, 512)),  # twice as many, the last that is kept
    ],
)
def test_a_picture_of_about_the_native_size_is_not_resampled(picture, working, shown):
    placement = natural(picture, 512)
    assert (placement.taken, placement.working, placement.shown) == ((0, 0, *picture), working, shown)


@pytest.mark.parametrize(
    ("picture", "working"),
    [
        ((4000, 3000), (592, 440)),  # 512 / sqrt(12 million) = 0.1478: 591.2 x 443.4
        ((1032, 512), (728, 360)),  # just above twice: 726.9 x 360.6
        ((256, 256), (512, 512)),
        ((64, 48), (592, 440)),
    ],
)
def test_other_pictures_are_scaled_to_the_native_number_of_pixels(picture, working):
    placement = natural(picture, 512)
    assert (placement.taken, placement.working) == ((0, 0, *picture), working)
    assert placement.shown == (0, 0, *working)


@pytest.mark.parametrize("picture", [(10000, 10), (1, 1000), (4200, 60)])
def test_a_picture_too_long_and_thin_needs_a_size(picture):
    with pytest.raises(PictureError, match=f"the picture is {picture[0]}x{picture[1]}, too long and thin"):
        natural(picture, 512)
