"""Masks: how they are read, blurred and applied, and that what is black in them stays bit for bit."""

import math

import numpy as np
import pytest
from PIL import Image

from sd.pipeline.image.masks import (
    composite,
    faint_note,
    latent_mask,
    mask_from,
    masked_region,
    match,
    paste_back,
    prepare,
    rule_for,
)
from sd.pipeline.image.reading import PictureError, read_rgba
from sd.pipeline.image.resizing import fit, natural


def read_mask(path):
    return mask_from(read_rgba(path, colour_managed=False))


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def rectangle(size, box, level=255):
    mask = Image.new("L", size)
    mask.paste(level, box)
    return mask


def saved(tmp_path, picture, **options):
    picture.save(tmp_path / "mask.png", **options)
    return tmp_path / "mask.png"


# reading


def test_grey_levels_are_kept(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for mode in ("L", "RGB"):
        mask = read_mask(saved(tmp_path, Image.fromarray(levels).convert(mode)))
        assert mask.mode == "L"
        assert np.array_equal(np.asarray(mask), levels)


def test_deep_and_two_level_masks_are_read(tmp_path):
    deep = Image.fromarray(np.array([[0, 257 * 77, 65535]], np.uint16))
    assert list(np.asarray(read_mask(saved(tmp_path, deep)))[0]) == [0, 77, 255]
    flags = Image.fromarray(np.array([[False, True]]))
    assert list(np.asarray(read_mask(saved(tmp_path, flags)))[0]) == [0, 255]


def layer(*pixels):
    picture = Image.new("RGBA", (len(pixels), 1))
    picture.putdata(pixels)
    return picture


def test_strokes_on_an_empty_layer_are_the_white_part_whatever_their_colour(tmp_path):
    for colour in [(255, 255, 255), (0, 0, 0), (200, 30, 40)]:
        strokes = layer((*colour, 255), (*colour, 100), (*colour, 0), (9, 9, 9, 0))  # colours where nothing is seen
        assert list(np.asarray(read_mask(saved(tmp_path, strokes)))[0]) == [255, 100, 0, 0]


def test_rounded_colours_at_soft_edges_of_strokes_are_one_colour(tmp_path):
    # 200 at opacity 3 is stored by some editors as round(200 * 3 / 255) = 2, and read back as 2 * 255 / 3 = 170
    strokes = layer((200, 200, 200, 255), (170, 170, 170, 3), (0, 0, 0, 0))
    assert list(np.asarray(read_mask(saved(tmp_path, strokes)))[0]) == [255, 3, 0]


def test_a_mask_in_black_and_white_with_holes_counts_the_holes_as_black(tmp_path):
    drawn = layer((255, 255, 255, 255), (0, 0, 0, 255), (255, 255, 255, 0), (255, 255, 255, 51))
    assert list(np.asarray(read_mask(saved(tmp_path, drawn)))[0]) == [255, 0, 0, 51]


def photograph(width=64, height=64):
    """Many colours."""
    return noise(width, height).convert("RGBA")


def flat(*colours):
    """A picture (RGBA) of 64x64 with a square of 16x16 in each colour, empty elsewhere."""
    picture = Image.new("RGBA", (64, 64))
    for i, colour in enumerate(colours):
        picture.paste(colour, (i % 4 * 16, i // 4 * 16, i % 4 * 16 + 16, i // 4 * 16 + 16))
    return picture


def opened_up(picture, box, opacity=0):
    """The picture with a hole."""
    alpha = picture.getchannel("A")
    alpha.paste(opacity, box)
    picture.putalpha(alpha)
    return picture


RED, BLUE, BLACK, WHITE, GREY = (200, 0, 0, 255), (0, 0, 200, 255), (0, 0, 0, 255), (255,) * 4, (128, 128, 128, 255)
GREY_PHOTOGRAPH = noise(64, 64).convert("L").point(lambda level: 40 + level // 2).convert("RGBA")


@pytest.mark.parametrize(
    ("picture", "rule", "inside", "outside"),  # levels at (5, 5) and (60, 60)
    [
        (photograph().convert("RGB").convert("L").convert("RGB"), "levels", None, None),
        (opened_up(photograph(), (0, 0, 64, 64), 254), "levels", None, None),  # as some programs save what is opaque
        (opened_up(photograph(), (0, 0, 16, 16)), "hole", 255, 0),
        (opened_up(photograph(), (0, 0, 60, 50)), "hole", 255, 0),  # more hole than picture
        (opened_up(photograph(), (0, 0, 16, 16), 100), "hole", 155, 0),  # half transparent
        (opened_up(GREY_PHOTOGRAPH.copy(), (0, 0, 16, 16)), "hole", 255, 0),
        (opened_up(flat(*[RED, BLUE] * 8), (0, 0, 16, 16)), "hole", 255, 0),  # flat colours on most of it
        (flat(RED), "strokes", 255, 0),
        (flat(BLACK), "strokes", 255, 0),
        (flat((0, 0, 0, 100)), "strokes", 100, 0),
        (flat(RED, BLUE), "strokes", 255, 0),
        (flat(RED, BLUE, WHITE, GREY), "strokes", 255, 0),
        (flat(WHITE, BLACK), "drawing", 255, 0),
        (flat(BLACK, WHITE), "drawing", 0, 0),
        (flat(WHITE, BLACK, GREY), "drawing", 255, 0),
        (flat(), "strokes", 0, 0),  # nothing at all
    ],
)
def test_a_transparent_mask_is_strokes_or_a_picture_with_a_hole(picture, rule, inside, outside):
    assert rule_for(picture) == rule
    if rule != "levels":
        mask = mask_from(picture)
        assert (mask.getpixel((5, 5)), mask.getpixel((60, 60))) == (inside, outside)


def test_a_mask_as_transparent_as_the_picture_itself_is_its_hole():
    drawing = opened_up(flat(*[WHITE] * 16), (0, 0, 64, 60))  # one colour: by itself, strokes
    assert (rule_for(drawing), rule_for(drawing, drawing), rule_for(drawing, flat(RED))) == (
        "strokes",
        "hole",
        "strokes",
    )
    assert rule_for(drawing, drawing.convert("RGB")) == "strokes"


def test_a_rule_is_the_same_at_any_size():
    large = opened_up(photograph(700, 300), (300, 100, 700, 300))
    assert (rule_for(large), mask_from(large).getbbox()) == ("hole", (300, 100, 700, 300))
    speck = flat(RED).resize((700, 700))
    speck.putpixel((650, 650), BLUE)  # of another colour, wherever it is
    assert rule_for(speck) == "strokes"


# matching


@pytest.mark.parametrize("mask", [(512, 384), (256, 192), (1024, 768), (171, 128), (85, 64), (342, 257)])
def test_masks_of_the_same_shape_are_brought_to_the_size_of_the_picture(mask):
    assert match(Image.new("L", mask), (512, 384)).size == (512, 384)


@pytest.mark.parametrize("mask", [(512, 512), (384, 512), (512, 376)])
def test_masks_of_another_shape_are_refused(mask):
    with pytest.raises(PictureError) as caught:
        match(Image.new("L", mask), (512, 384))
    assert str(caught.value) == (
        f"the mask is {mask[0]}x{mask[1]} and the picture 512x384. Give a mask of the same size, or at least of the "
        "same shape."
    )


# preparing


def test_a_mask_is_inverted_before_the_threshold_and_blurred_after_it():
    mask = Image.fromarray(np.array([[0, 100, 155, 255]], np.uint8))
    assert list(np.asarray(prepare(mask))[0]) == [0, 100, 155, 255]
    assert list(np.asarray(prepare(mask, invert=True))[0]) == [255, 155, 100, 0]
    assert list(np.asarray(prepare(mask, threshold=100))[0]) == [0, 255, 255, 255]
    assert list(np.asarray(prepare(mask, threshold=101))[0]) == [0, 0, 255, 255]
    assert list(np.asarray(prepare(mask, invert=True, threshold=101))[0]) == [255, 255, 0, 0]
    grey = rectangle((64, 64), (32, 0, 64, 64), level=128)
    levels = np.asarray(prepare(grey, threshold=128, blur=4))[32]
    assert levels[-1] == 255
    assert len(set(levels)) > 10


@pytest.mark.parametrize("radius", [1, 2.5, 4, 16, 64])
def test_blur_is_a_gaussian_of_that_radius(radius):
    edge = rectangle((800, 9), (400, 0, 800, 9))
    levels = np.asarray(prepare(edge, blur=radius))[4]
    # a Gaussian over a step is its integral, the error function
    exact = [255 * (1 + math.erf((x + 0.5 - 400) / (radius * math.sqrt(2)))) / 2 for x in range(800)]
    assert np.abs(levels - np.array(exact)).max() <= 255 * 0.015  # Pillow makes it from three boxes


@pytest.mark.parametrize("radius", [0.5, 1, 4, 16, 64])
def test_blur_leaves_what_is_far_away_exactly_black_or_white(radius):
    levels = np.asarray(prepare(rectangle((800, 9), (400, 0, 800, 9)), blur=radius))
    reach = math.ceil(3 * radius) + 1
    assert levels[:, : 400 - reach].max() == 0
    assert levels[:, 400 + reach :].min() == 255


def test_blur_does_not_darken_the_border_of_a_picture():
    assert np.asarray(prepare(Image.new("L", (32, 32), 255), blur=8)).min() == 255


def test_a_mask_with_nothing_to_repaint_is_refused():
    black, white = Image.new("L", (8, 8)), Image.new("L", (8, 8), 255)
    with pytest.raises(
        PictureError, match=r"^the mask is black everywhere, so .* or invert the mask .* --invert-mask\.$"
    ):
        prepare(black)
    with pytest.raises(
        PictureError, match=r"^after inverting it, the mask is black everywhere, .* what is to change\.$"
    ):
        prepare(white, invert=True)
    with pytest.raises(PictureError, match="black everywhere at threshold 200,"):
        prepare(rectangle((8, 8), (0, 0, 4, 4), level=199), threshold=200)
    with pytest.raises(PictureError, match="so small that --mask-blur 32 wipes it out"):
        prepare(rectangle((512, 512), (100, 100, 102, 102)), blur=32)


@pytest.mark.parametrize("brightest", [1, 4, 16, 20, 31])
def test_labels_and_truth_values_are_no_mask_without_a_threshold(brightest):
    """Label maps, true as 1, and 8, 10 or 12 bits in a file of 16."""
    labels = rectangle((64, 64), (0, 0, 32, 64), level=brightest)
    message = f"the mask's brightest level is {brightest} of 255, so next to nothing .* --mask-threshold 1 makes it"
    with pytest.raises(PictureError, match=message):
        prepare(labels)
    assert prepare(labels, threshold=1).getcolors() == [(2048, 0), (2048, 255)]
    with pytest.raises(PictureError, match=r"inverting it would repaint .* --mask-threshold 255 makes it"):
        prepare(labels, invert=True)
    assert prepare(labels, threshold=255, invert=True).getpixel((0, 0)) == 0
    with pytest.raises(PictureError, match=f"white everywhere at threshold 1, .* Its levels are 0 to {brightest}."):
        prepare(labels, threshold=1, invert=True)


@pytest.mark.parametrize("level", [32, 100, 127, 128, 255])
def test_grey_masks_are_taken_and_faint_ones_told(level):
    mask = rectangle((64, 64), (0, 0, 32, 64), level=level)
    assert prepare(mask).getextrema() == (0, level)
    told = {32: "at most 13 %", 100: "39 %", 127: "50 %"}.get(level, "")
    assert told in (faint_note(mask) or "")
    assert bool(faint_note(mask)) == bool(told)


def test_a_white_mask_repaints_everything():
    white = Image.new("L", (8, 8), 255)
    assert prepare(white).getextrema() == prepare(white, threshold=9).getextrema() == (255, 255)


def test_a_speck_that_the_blur_leaves_invisible_is_refused():
    with pytest.raises(PictureError, match="so small that --mask-blur 8 wipes it out"):
        prepare(rectangle((64, 64), (30, 30, 32, 32)), blur=8)  # 4 of 2 pi 8^2: level 3
    assert prepare(rectangle((64, 64), (30, 30, 34, 34)), blur=4).getextrema()[1] > 20


# latents


def test_a_latent_is_repainted_as_much_as_the_most_repainted_of_its_pixels():
    mask = Image.new("L", (32, 24))
    mask.putpixel((8, 15), 51)  # the leftmost, lowest pixel of column 1, row 1
    mask.putpixel((31, 0), 255)
    mask.putpixel((24, 7), 100)
    assert latent_mask(mask).dtype == np.float32
    expected = np.zeros((3, 4), np.float32)
    expected[1, 1], expected[0, 3] = 0.2, 1
    assert np.allclose(latent_mask(mask), expected, rtol=0, atol=1e-7)
    assert latent_mask(mask, factor=4).shape == (6, 8)
    assert latent_mask(mask, factor=4)[3, 2] == np.float32(0.2)


def test_masks_with_a_part_of_a_latent_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 8 \(one latent per 8x8\), got 30x24"):
        latent_mask(Image.new("L", (30, 24), 255))


# only masked


@pytest.mark.parametrize(
    ("picture", "box", "working", "padding", "taken"),
    [
        ((1000, 800), (400, 300, 500, 400), (512, 512), 32, (368, 268, 532, 432)),  # square already
        ((1000, 800), (400, 300, 500, 360), (512, 512), 0, (400, 280, 500, 380)),  # grown up and down
        ((1000, 800), (400, 300, 500, 400), (512, 256), 0, (350, 300, 550, 400)),  # grown left and right
        ((1000, 800), (0, 0, 100, 40), (512, 512), 32, (0, 0, 132, 132)),  # moved inside at the corner
        ((1000, 800), (900, 780, 1000, 800), (512, 512), 32, (868, 668, 1000, 800)),
        ((1000, 300), (100, 0, 900, 300), (512, 512), 0, (100, 0, 900, 300)),  # no more height to be had
        ((64, 64), (0, 0, 64, 64), (512, 512), 32, (0, 0, 64, 64)),
        ((1000, 800), (500, 500, 501, 501), (512, 512), 0, (500, 500, 501, 501)),
    ],
)
def test_only_masked_takes_the_surroundings_in_the_shape_of_the_working_size(picture, box, working, padding, taken):
    placement = masked_region(rectangle(picture, box, level=1), working, padding)
    assert (placement.picture, placement.taken, placement.working) == (picture, taken, working)
    if taken != (100, 0, 900, 300):
        assert placement.shown == (0, 0, *working)


def test_only_masked_pads_where_the_picture_is_too_narrow():
    placement = masked_region(rectangle((1000, 300), (100, 0, 900, 300)), (512, 512), 0)
    assert placement.shown == (0, 160, 512, 352)  # 800x300 at 512 wide is 192 high


def test_only_masked_has_all_of_the_mask_wherever_it_lies():
    draw = np.random.default_rng(3)
    for _ in range(300):
        width, height = (int(side) for side in draw.integers(1, 400, 2))
        left, top = int(draw.integers(0, width)), int(draw.integers(0, height))
        right, bottom = int(draw.integers(left, width)) + 1, int(draw.integers(top, height)) + 1
        working = tuple(int(side) * 8 for side in draw.integers(8, 33, 2))
        mask = rectangle((width, height), (left, top, right, bottom))
        placement = masked_region(mask, working, int(draw.integers(0, 64)))
        taken, shown = placement.taken, placement.shown
        assert placement.covers(mask)
        assert 0 <= taken[0] < taken[2] <= width
        assert 0 <= taken[1] < taken[3] <= height
        # one scale across and down, but for what rounding to whole pixels changes
        across, down = (shown[2] - shown[0]) / (taken[2] - taken[0]), (shown[3] - shown[1]) / (taken[3] - taken[1])
        rounding = 1 / min(taken[2] - taken[0], taken[3] - taken[1]) + 1 / min(shown[2] - shown[0], shown[3] - shown[1])
        assert abs(across / down - 1) <= 1.5 * rounding


# putting together


def test_composite_mixes_in_proportion_and_rounds_to_the_nearest():
    old, new, level = np.meshgrid(np.arange(256), [0, 77, 200, 255], np.arange(256), indexing="ij")
    old, new, level = (values.reshape(1024, 256) for values in (old, new, level))
    expected = (2 * (level * new + (255 - level) * old) + 255) // 510  # to the nearest whole number
    pictures = [Image.fromarray(np.stack([values.astype(np.uint8)] * 3, axis=-1)) for values in (old, new)]
    found = composite(*pictures, Image.fromarray(level.astype(np.uint8)))
    assert np.array_equal(np.asarray(found)[:, :, 1], expected)


PLACEMENTS = {
    "crop": lambda mask: fit(mask.size, (64, 64), "crop"),
    "pad": lambda mask: fit(mask.size, (128, 128), "pad"),
    "stretch": lambda mask: fit(mask.size, (64, 128), "stretch"),
    "natural, kept": lambda mask: natural(mask.size, 128),
    "natural, scaled": lambda mask: natural(mask.size, 512),
    "only masked": lambda mask: masked_region(mask, (128, 64), 8),
    "only masked, padded": lambda mask: masked_region(mask, (64, 256), 8),
}


@pytest.mark.parametrize("blur", [0, 3])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_black_pixels_keep_every_bit_in_the_whole_picture(name, blur):
    picture = noise(133, 101)
    mask = prepare(rectangle((133, 101), (50, 30, 90, 70)), blur=blur)
    placement = PLACEMENTS[name](mask)
    result = paste_back(picture, noise(*placement.working, seed=1), mask, placement)
    assert placement.covers(mask)
    same, levels = (np.asarray(result) == np.asarray(picture)).all(axis=-1), np.asarray(mask)
    assert same[levels == 0].all()
    assert same[levels == 255].mean() < 0.1
    assert np.array_equal(np.asarray(picture), np.asarray(noise(133, 101)))  # the old one is not changed


def test_what_was_made_comes_to_where_it_was_taken_from():
    picture = Image.new("RGB", (400, 300), "white")
    mask = rectangle((400, 300), (200, 100, 300, 200))
    placement = masked_region(mask, (64, 64), 10)  # 190 to 310 and 90 to 210
    seen = placement.place(picture)
    seen.paste("red", (0, 0, 32, 64))
    seen.paste("blue", (32, 0, 64, 64))
    result = paste_back(picture, seen, mask, placement)
    corners = [(200, 100), (240, 199), (260, 100), (299, 199), (199, 150), (300, 150)]
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    assert [result.getpixel(corner) for corner in corners] == [red, red, blue, blue, white, white]


def test_what_crop_cuts_off_stays_as_it_was():
    picture = noise(200, 100)
    mask = Image.new("L", (200, 100), 255)
    placement = fit((200, 100), (64, 64), "crop")  # 50 to 150
    result = np.asarray(paste_back(picture, noise(64, 64, seed=1), mask, placement))
    same = (result == np.asarray(picture)).all(axis=-1)
    assert same[:, :50].all()
    assert same[:, 150:].all()
    assert same[:, 50:150].mean() < 0.1
