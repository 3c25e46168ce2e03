"""What Python programs give as pictures and masks: paths, PIL images and arrays, all read alike."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd.pipeline.image.given import given_picture
from sd.pipeline.image.input_settings import Expansion, InputSettings
from sd.pipeline.image.reading import PictureError

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
FAST = {"steps": 1, "seed": 3, "guidance_scale": 1}
SMALL = {**FAST, "size": (64, 64)}


def forms_of(pixels, tmp_path):
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "x.png")
    return {"path": tmp_path / "x.png", "text": str(tmp_path / "x.png"), "PIL": picture, "array": pixels}


@pytest.mark.parametrize("form", ["path", "text", "PIL", "array"])
def test_every_form_gives_the_same_picture(model, tmp_path, form):
    (made,) = model.img2img("a", forms_of(PIXELS, tmp_path)[form], **SMALL)
    (expected,) = model.img2img("a", Image.fromarray(PIXELS), **SMALL)
    assert (made.size, made.tobytes()) == ((64, 64), expected.tobytes())
    stripe = np.zeros((64, 64), np.uint8)
    stripe[:, :32] = 255
    (made,) = model.inpaint("a", PIXELS, forms_of(stripe, tmp_path)[form], **SMALL)
    assert np.array_equal(np.asarray(made)[:, 56:], PIXELS[:, 56:])
    assert not np.array_equal(np.asarray(made)[:, :20], PIXELS[:, :20])


@pytest.mark.parametrize(
    ("array", "mode", "pixel"),
    [
        (np.array([[False, True]]), "RGB", (255, 255, 255)),
        (np.array([[0, 7]], np.uint8), "RGB", (7, 7, 7)),
        (np.array([[[0], [7]]], np.uint8), "RGB", (7, 7, 7)),
        (np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), "RGB", (4, 5, 6)),
        (np.array([[[1, 2, 3, 255], [4, 5, 6, 9]]], np.uint8), "RGBA", (4, 5, 6, 9)),
        (np.array([[[4, 5, 6], [1, 2, 3]]], np.uint8)[:, ::-1], "RGB", (4, 5, 6)),
    ],
)
def test_arrays_are_levels_of_8_bits_or_true_and_false(array, mode, pixel):
    picture = given_picture(array)
    assert (picture.mode, picture.getpixel((1, 0))) == (mode, pixel)


ALLOWED = "Give a path, a PIL image or a uint8 array of shape (H, W), (H, W, 3) or (H, W, 4)."


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (None, "is of type NoneType."),
        (b"\x89PNG", "is of type bytes."),
        ([Image.new("RGB", (8, 8))], "is of type list."),
        (torch.zeros(3, 8, 8), "is of type torch.Tensor."),
        (np.zeros((8, 8, 3)), "is an array of float64."),
        (np.zeros((8, 8), np.int64), "is an array of int64."),
        (np.zeros((3, 8, 8), np.uint8), "is an array of shape (3, 8, 8)."),
        (np.zeros((1, 8, 8, 3), np.uint8), "is an array of shape (1, 8, 8, 3)."),
        (np.zeros((0, 8, 3), np.uint8), "is an array of shape (0, 8, 3)."),
    ],
)
def test_anything_else_is_refused_with_what_is_allowed(model, given, what):
    with pytest.raises(TypeError) as caught:
        model.img2img("a", given, **SMALL)
    assert str(caught.value).startswith(f"picture {what} {ALLOWED}")
    if given is not None:
        with pytest.raises(TypeError) as caught:
            model.inpaint("a", PIXELS, given, **SMALL)
        assert str(caught.value).startswith(f"mask {what} {ALLOWED}")


def test_a_float_array_is_told_how_to_become_levels():
    with pytest.raises(TypeError, match=r"if it is 1, give \(255 \* array\)\.round\(\)\.astype\('uint8'\)"):
        given_picture(np.zeros((8, 8, 3), np.float32))


def test_files_that_cannot_be_read_and_large_pictures_are_refused(model, tmp_path):
    with pytest.raises(PictureError, match=r"absent\.png does not exist"):
        model.img2img("a", "absent.png")
    with pytest.raises(PictureError, match=r"does not exist\. Download the picture, and give the file\."):
        model.img2img("a", "https://example.com/photo.png")
    large = Image.new("L", (1001, 1000))
    with pytest.raises(PictureError, match=r"the picture has 1001x1000 pixels; at most 1 million are read\."):
        model.img2img("a", large, max_megapixels=1)
    assert given_picture(large, megapixels=2).size == (1001, 1000)
    Image.effect_noise((64, 64), 60).save(tmp_path / "x.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:2000])
    with pytest.raises(PictureError, match="the picture is cut off or damaged"):
        model.img2img("a", Image.open(tmp_path / "cut.png"))


def test_a_given_picture_is_not_changed(model):
    picture = Image.new("RGB", (64, 64), "red")
    picture.info["key"] = "value"
    model.img2img("a", picture, **SMALL)
    assert picture.info == {"key": "value"}


def test_the_working_size_is_given_either_way(model):
    for options in ({"size": (64, 80)}, {"width": 64, "height": 80}):
        assert model.img2img("a", PIXELS, **options, **FAST)[0].size == (64, 80)
    with pytest.raises(ValueError, match="width and height go together here"):
        model.img2img("a", PIXELS, width=64)
    for size in ("64x64", (64,), ("a", 64), (64.0, 64)):
        with pytest.raises(TypeError, match=r"a working size is \(width, height\) in whole pixels"):
            model.img2img("a", PIXELS, size=size)
    with pytest.raises(ValueError, match="not both"):
        model.inpaint("a", PIXELS, PIXELS, width=64, height=64, size=(64, 64))


def with_hole():
    opacity = np.full((64, 64, 1), 255, np.uint8)
    opacity[:, :32] = 0
    return np.concatenate([PIXELS, opacity], axis=2)


def test_a_picture_with_a_hole_can_be_its_own_mask(model):
    inputs = InputSettings(mask_blur=0)
    with pytest.raises(PictureError, match="has a transparent part: to repaint that, give the picture as its own mask"):
        model.inpaint("a", with_hole())
    (made,) = model.inpaint("a", with_hole(), with_hole(), inputs=inputs, **SMALL)
    assert np.array_equal(np.asarray(made)[:, 32:], PIXELS[:, 32:])
    assert (np.asarray(made)[:, :32] != 255).any()
    with pytest.raises(PictureError, match=r"Give one of the two\.$"):
        model.inpaint("a", PIXELS)
    inputs = InputSettings(expand=Expansion(left=64))
    assert model.inpaint("a", with_hole(), inputs=inputs, size=(128, 64), **FAST)[0].size == (128, 64)


def test_masks_are_read_as_the_command_reads_them(model, tmp_path, run, tiny_ckpt):
    """Black strokes on an empty layer, some of them half transparent."""
    layer = Image.new("RGBA", (64, 64))
    layer.paste((0, 0, 0, 255), (0, 0, 20, 64))
    layer.paste((0, 0, 0, 100), (20, 0, 40, 64))
    layer.save(tmp_path / "strokes.png")
    Image.fromarray(PIXELS).save(tmp_path / "in.png")
    flags = ["--init", "in.png", "--mask", "strokes.png", "--seed", 3, "--steps", 1, "-g", 1, "--precision", "fp32"]
    flags += ["-W", 64, "-H", 64]
    code, (path,), err = run("inpaint", "a", *flags, "-m", tiny_ckpt)
    assert code == 0
    assert "strokes.png: the strokes in the mask are repainted, whatever their colour; its empty part is kept" in err
    (made,) = model.inpaint("a", tmp_path / "in.png", layer, **SMALL)
    assert np.abs(np.asarray(made).astype(int) - np.asarray(Image.open(path))).max() <= 1
