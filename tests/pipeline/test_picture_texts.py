"""The texts in picture files, wherever programs put them and however they are written."""

import gzip

import numpy as np
import pytest
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from sd.app.cli.like import read
from sd.pipeline.image.stored_settings.other_programs import NoSettings
from sd.pipeline.image.stored_settings.texts import read_foreign_texts, text_of

TEXT = "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64"
CAT = TEXT.replace("cat", "猫 and a 🐈")
USER_COMMENT, XP_COMMENT, XMP = 0x9286, 0x9C9C, "<x:xmpmeta xmlns:x='adobe:ns:meta/'><d a='%s'>%s</d></x:xmpmeta>"
CODES = {"ascii": b"ASCII\0\0\0", "unicode": b"UNICODE\0", "jis": b"JIS\0\0\0\0\0", "undefined": bytes(8), "none": b""}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", [TEXT, CAT])
def test_a_comment_is_read_whatever_it_says_of_its_encoding(code, encoding, text):
    for ending in (b"", b"\0", b"\0\0"):
        assert text_of(CODES[code] + text.encode(encoding) + ending) == text


@pytest.mark.parametrize("encoding", ["iso2022_jp", "shift_jis"])
def test_japanese_is_read(encoding):
    text = TEXT.replace("cat", "猫が好き")
    assert text_of(CODES["jis"] + text.encode(encoding)) == text


def test_a_comment_without_settings_is_read_as_it_says():
    assert text_of(b"UNICODE\0" + "a cat".encode("utf-16-le")) == "a cat"
    assert text_of(b"UNICODE\0holiday in Rome") == "holiday in Rome"
    assert text_of(b"Unicode\0" + "a cat".encode("utf-16-be")) == "a cat"
    assert text_of(b"ASCII\0\0\0a cat") == "a cat"
    assert text_of("déjà vu".encode("cp1252")) == "déjà vu"
    assert text_of(b"UNICODE\0") == text_of(b"") == ""


def exif_with(tag, value):
    exif = Image.Exif()
    (exif.get_ifd(0x8769) if tag == USER_COMMENT else exif)[tag] = value
    return exif.tobytes()


def chunk(kind, name, text):
    info = PngInfo()
    if kind == "latin":  # UTF-8 in a chunk that has no encoding of its own
        info.add(b"tEXt", name.encode() + b"\0" + text.encode("utf-8"))
    elif kind == "itxt":
        info.add_itxt(name, text)
    else:
        info.add_text(name, text, zip=kind == "zip")
    return {"pnginfo": info}


PLACES = {  # file -> how a text is put into it
    "itxt.png": lambda text: chunk("itxt", "parameters", text),
    "zip.png": lambda text: chunk("zip", "parameters", text),
    "latin.png": lambda text: chunk("latin", "parameters", text),
    "other-name.png": lambda text: chunk("text", "Comment", text),
    "exif.png": lambda text: {"exif": exif_with(USER_COMMENT, b"UNICODE\0" + text.encode("utf-16-be"))},
    "exif.jpg": lambda text: {"exif": exif_with(USER_COMMENT, b"UNICODE\0" + text.encode("utf-8"))},
    "exif.webp": lambda text: {"exif": exif_with(USER_COMMENT, b"ASCII\0\0\0" + text.encode("utf-8"))},
    "description.jpg": lambda text: {"exif": exif_with(0x010E, text.encode("utf-8"))},
    "windows.jpg": lambda text: {"exif": exif_with(XP_COMMENT, text.encode("utf-16-le"))},
    "description.tiff": lambda text: {"tiffinfo": {270: text}},
    "comment.jpg": lambda text: {"comment": text.encode("utf-8")},
    "comment.gif": lambda text: {"comment": text.encode("utf-8")},
    "xmp.webp": lambda text: {"xmp": (XMP % ("", text)).encode()},
    "attribute.jpg": lambda text: {"xmp": (XMP % (text.replace("\n", "&#10;"), "")).encode()},
}


@pytest.mark.parametrize("name", PLACES)
def test_settings_are_found_in_every_place_of_every_format(name, tmp_path):
    text = TEXT if name.endswith("tiff") else CAT
    Image.new("RGB", (64, 64)).save(tmp_path / name, **PLACES[name](text))
    found, _ = read(tmp_path / name)
    assert (found.settings["prompt"], found.settings["seed"]) == (text.split("\n")[0], 5)
    assert found.settings["negative_prompt"] == "dog"


def stealthy(ending, text, size=(64, 48)):
    """A picture with a text in its lowest bits."""
    data = text.encode()
    data = gzip.compress(data) if ending.endswith("comp") else data
    data = f"stealth_{ending}".encode() + (8 * len(data)).to_bytes(4, "big") + data
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    channels = 1 if ending.startswith("png") else 3
    levels = np.full(size[0] * size[1] * channels, 254, np.uint8)
    levels[: len(bits)] |= bits
    part = levels.reshape(size[0], size[1], channels).swapaxes(0, 1)
    whole = part if channels == 3 else np.concatenate([np.full((size[1], size[0], 3), 7, np.uint8), part], 2)
    return Image.fromarray(whole)


@pytest.mark.parametrize("ending", ["pnginfo", "pngcomp", "rgbinfo", "rgbcomp"])
def test_a_text_in_the_lowest_bits_is_read(ending, tmp_path):
    stealthy(ending, CAT).save(tmp_path / "a.png")
    assert read_foreign_texts(tmp_path / "a.png")["stealth"] == CAT
    assert read(tmp_path / "a.png")[0].settings["seed"] == 5


def test_damaged_and_endless_texts_in_the_lowest_bits_are_passed_over(tmp_path):
    picture = stealthy("pngcomp", CAT)
    levels = np.asarray(picture).copy()
    levels[20:, :, 3] ^= 1
    Image.fromarray(levels).save(tmp_path / "damaged.png")
    stealthy("pngcomp", "\0" * 30_000_000, (256, 1024)).save(tmp_path / "bomb.png")
    assert "stealth" not in read_foreign_texts(tmp_path / "damaged.png")
    assert len(read_foreign_texts(tmp_path / "bomb.png")["stealth"]) <= 4_000_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "has no settings that can be read. Pictures lose them when they are edited or sent."),
        ({"comment": b"holiday in Rome"}, "its text 'holiday in Rome' has no line such as"),
        (
            {"exif": exif_with(USER_COMMENT, b"UNICODE\0" + "Rom".encode("utf-16-le"))},
            "its text 'Rom' has no line such",
        ),
        ({"comment": b'{"nodes": []}'}, "is JSON of no program that is known here."),
        ({"exif": exif_with(0x0131, "Adobe Firefly")}, "It was made by Adobe Firefly."),
        ({"comment": b"x" * 1_000_001}, "of 1,000,001 characters; at most 1,000,000 are read."),
        ({"xmp": b"<!DOCTYPE x [<!ENTITY a 'Steps: 5'>]><x>&a;</x>"}, "has no settings that can be read."),
    ],
)
def test_without_settings_no_prompt_is_taken(options, said, tmp_path):
    name = "a.png" if len(options.get("comment", b"")) > 65000 else "a.jpg"
    options = chunk("itxt", "parameters", options["comment"].decode()) if name == "a.png" else options
    Image.new("RGB", (8, 8)).save(tmp_path / name, **options)
    with pytest.raises(NoSettings) as error:
        read(tmp_path / name)
    assert said in str(error.value)


def test_the_pixels_of_a_huge_picture_are_not_decoded_to_look_for_texts(tmp_path, monkeypatch):
    Image.new("1", (16_384, 4_000)).save(tmp_path / "huge.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert read_foreign_texts(tmp_path / "huge.png") == {"pixels": "16384x4000"}
