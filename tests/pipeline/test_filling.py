"""The masked part in the colours around it: `--masked-content fill`."""

import numpy as np
import pytest
from PIL import Image

from sd.pipeline.image.canvas import inpainting
from sd.pipeline.image.filling import filled
from sd.pipeline.image.input_settings import InputSettings

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def halves(size):
    """Red on the left, blue on the right, and in the middle a green square."""
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (size[0] // 2, 0, *size))
    picture.paste(GREEN, square(size))
    return picture


def square(size):
    return (size[0] // 2 - 10, size[1] // 2 - 10, size[0] // 2 + 10, size[1] // 2 + 10)


@pytest.mark.parametrize("size", [(64, 64), (61, 47), (40, 128)])
def test_a_hole_gets_the_colours_on_each_side_of_it_and_nothing_else_changes(size):
    picture, mask = halves(size), Image.new("L", size)
    mask.paste(255, square(size))
    result, kept = np.asarray(filled(picture, mask)).astype(int), np.asarray(mask) == 0
    assert np.array_equal(result[kept], np.asarray(picture)[kept])
    left, top, right, _ = square(size)
    assert np.abs(result[top + 9, left] - RED).max() < 40
    assert np.abs(result[top + 9, right - 1] - BLUE).max() < 40
    assert result[..., 1].max() == 30  # no green is left, and none is made


def test_a_grey_mask_mixes_and_a_white_one_leaves_nothing_to_fill_from():
    picture = Image.new("RGB", (32, 32), RED)
    picture.paste(BLUE, (16, 0, 32, 32))
    mask = Image.new("L", (32, 32))
    mask.paste(51, (24, 0, 32, 32))
    assert np.array_equal(filled(picture, mask), picture)  # blue in blue
    assert filled(picture, Image.new("L", (32, 32), 255)) is picture


def test_the_run_begins_with_the_fill_and_the_result_is_mixed_with_the_picture():
    picture, mask = halves((64, 64)), Image.new("L", (64, 64))
    mask.paste(255, square((64, 64)))
    canvas = inpainting(picture, mask, (64, 64), 64, InputSettings(masked_content="fill", mask_blur=2.0))
    assert np.asarray(canvas.working_picture)[32, 32, 1] == 30
    made = canvas.finish(Image.new("RGB", (64, 64), GREEN))
    expected = inpainting(picture, mask, (64, 64), 64, InputSettings(mask_blur=2.0)).finish(
        Image.new("RGB", (64, 64), GREEN)
    )
    assert np.array_equal(made, expected)
