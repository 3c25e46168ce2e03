"""What a request of OpenAI's images API means, and how its pictures are to be sent."""

import contextlib
import io
import math

import numpy as np
import pytest
from PIL import Image

from sd.app.web.formats import in_format
from sd.app.web.openai_fields import CANNOT, CHOICES, KINDS, OWN, WITHOUT_EFFECT, FieldError, wanted_from
from sd.pipeline.image.stored_settings.other_programs import settings_of_texts
from sd.pipeline.image.stored_settings.texts import read_foreign_texts

DEFAULT_STEPS = 30


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({}, {"count": 1, "batch_size": 1}),
        ({"n": 2, "size": "512x768"}, {"count": 2, "width": 512, "height": 768}),
        ({"size": "auto", "quality": "auto", "n": None}, {"count": 1}),
        ({"quality": "low"}, {"steps": 15}),
        ({"quality": "hd"}, {"steps": 60}),
        ({"quality": "high", "steps": 8}, {"steps": 8}),
        ({"seed": 7, "negative_prompt": "blurry", "guidance_scale": 5, "sampler": "Euler a"}, {"seed": 7}),
        ({"input_fidelity": "high"}, {"strength": 0.5}),
        ({"n": "3", "steps": "12", "strength": "0.4", "guidance_scale": "5"}, {"steps": 12, "strength": 0.4}),  # a form
    ],
)
def test_fields_of_a_job(given, ours):
    assert wanted_from({"prompt": "a horse", **given}, steps=DEFAULT_STEPS).fields.items() >= ours.items()


def test_how_pictures_are_sent():
    given = {"output_format": "webp", "output_compression": 80, "response_format": "url", "background": "opaque"}
    wanted = wanted_from({"prompt": "", "stream": "true", "partial_images": "2", "user": "me", **given}, steps=1)
    assert {name: getattr(wanted, name) for name in given} == given
    assert (wanted.stream, wanted.partial_images, wanted.ignored) == (True, 2, ["user"])


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        *(({name: value}, name, f"{name} {value} cannot be used: ") for name, value in CANNOT),
        ({"size": "big"}, "size", "size 'big' is not a size. Give one such as"),
        ({"size": 512}, "size", "size cannot be 512; it is of type str."),
        ({"n": 0}, "n", "n 0 is out of range: 1 to 1000."),
        ({"n": "two"}, "n", "n cannot be 'two'"),
        ({"quality": "best"}, "quality", "quality 'best' does not exist."),
        ({"partial_images": 4}, "partial_images", "partial_images 4 is out of range: 0 to 3."),
        ({"output_compression": 101}, "output_compression", "output_compression 101 is out of range: 0 to 100."),
        ({"response_format": "png"}, "response_format", "response_format 'png' does not exist."),
        ({"stream": "maybe"}, "stream", "stream cannot be 'maybe'; it is of type bool."),
        ({"seeds": 7}, "'seeds'", "'seeds' does not exist. Did you mean seed?"),
        ({"guidance_scale": "much"}, "guidance_scale", "guidance_scale cannot be 'much'; it is of type float."),
    ],
)
def test_wrong_values_are_refused_with_the_field(given, field, message):
    with pytest.raises(FieldError) as caught:
        wanted_from({"prompt": "", **given}, steps=DEFAULT_STEPS)
    assert caught.value.field == field
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture_in_another_format_looks_the_same_and_carries_its_settings(kind, tmp_path):
    text = "a horse ünder, trees\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 7, Size: 64x48, Version: sd-zoo 0.1"
    picture, file = Image.linear_gradient("L").resize((64, 48)).convert("RGB"), io.BytesIO()
    picture.save(file, "PNG")
    data = in_format(file.getvalue(), kind, 95, text)
    assert (data == file.getvalue()) == (kind == "png")
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == kind.upper()
        assert np.abs(np.asarray(opened.convert("RGB")).astype(int) - np.asarray(picture)).max() < 12
    if kind != "png":
        (tmp_path / "a").write_bytes(data)
        assert settings_of_texts(read_foreign_texts(tmp_path / "a")).settings["prompt"] == "a horse ünder, trees"


def test_no_value_of_any_field_is_an_internal_error():
    odd = [None, "", "x", "9" * 50, -1, 0, 10**50, 1.5, math.inf, True, [], [1], {}, "1e400"]
    for name in (*OWN, *KINDS, *CHOICES, *WITHOUT_EFFECT, "image", "\ud800"):
        for value in odd:
            with contextlib.suppress(FieldError):
                wanted_from({"prompt": "", name: value}, steps=DEFAULT_STEPS)
