"""How picture and mask are prepared: what is refused, and how new area is written."""

import pytest

from sd.pipeline.image.input_settings import Expansion, InputSettings
from sd.pipeline.settings import SettingError


@pytest.mark.parametrize(
    ("text", "expansion"),
    [
        ("left=128,right=64", Expansion(left=128, right=64)),
        (" top = 8 , bottom=0 ", Expansion(top=8)),
        ("bottom=16,top=24,right=32,left=40", Expansion(left=40, right=32, top=24, bottom=16)),
    ],
)
def test_expansions_are_read(text, expansion):
    assert Expansion.parse(text) == expansion


def test_an_expansion_is_written_as_it_is_read():
    assert str(Expansion(left=128, bottom=64)) == "left=128,bottom=64"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("left=130", "expand left=130 is not a multiple of 8. Nearest: 128 or 136."),
        ("left=-8", "expand left=-8 is out of range: 0 to 4088."),
        ("top=4096", "expand top=4096 is out of range: 0 to 4088."),
        ("left=1e3", "expand left=1e3 is not a whole number of pixels, such as left=128."),
        ("left=٨", "expand left=٨ is not a whole number of pixels"),
        ("left=--8", "expand left=--8 is not a whole number of pixels"),
        ("left=", "expand left= is not a whole number of pixels, such as left=128."),
        ("left=" + "9" * 5000, "expand left=99999999999999999999 is not a whole number"),
        ("leftt=8", "expand 'leftt' does not exist. Did you mean left? There are: bottom, left, right, top."),
        ("left=8,left=16", "expand left is given twice."),
        ("128", "expand '128' is not SIDE=PIXELS. Example: left=128,right=64."),
        ("left=8,", "expand '' is not SIDE=PIXELS. Example: left=128,right=64."),
        ("", "expand '' is not SIDE=PIXELS. Example: left=128,right=64."),
        ("left=0", "expand names no pixels to add. Example: left=128,right=64."),
    ],
)
def test_expansions_that_cannot_be_are_refused_with_what_is_allowed(text, message):
    with pytest.raises(SettingError) as caught:
        Expansion.parse(text)
    assert str(caught.value).startswith(message)
    assert caught.value.name == "expand"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resize_mode": "corp"}, "resize_mode corp does not exist. Did you mean crop? There are: crop, pad, stretch."),
        (
            {"masked_content": "filled"},
            "masked_content filled does not exist. Did you mean fill? There are: fill, original.",
        ),
        (
            {"masked_content": "fill", "expand": Expansion(left=8)},
            "masked_content does nothing with expand, which fills the new area anyway.",
        ),
        ({"invert_mask": 1}, "invert_mask cannot be 1; it is of type bool."),
        ({"mask_threshold": True}, "mask_threshold cannot be True; it is of type int."),
        ({"mask_threshold": 256}, "mask_threshold 256 is out of range: 0 to 255."),
        ({"mask_blur": -1}, "mask_blur -1 is out of range: 0 to 64."),
        ({"mask_blur": float("nan")}, "mask_blur nan is out of range: 0 to 64."),
        ({"mask_padding": 2000}, "mask_padding 2000 is out of range: 0 to 1024."),
        ({"overlap": 257}, "overlap 257 is out of range: 0 to 256."),
        ({"expand": "left=8"}, "expand cannot be 'left=8'; it is of type Expansion or None."),
    ],
)
def test_settings_that_cannot_be_are_refused_with_what_is_allowed(given, message):
    with pytest.raises(SettingError) as caught:
        InputSettings(**given)
    assert str(caught.value) == message


def test_a_number_that_is_no_number_of_pixels_is_refused():
    with pytest.raises(SettingError, match=r"expand left=8.0 is not a whole number of pixels"):
        Expansion(left=8.0)
