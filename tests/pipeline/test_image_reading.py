"""Reading picture files: every kind of pixel and orientation, and what is refused. Expectations by hand."""

import io
import os
import random
import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, features

from sd.pipeline.image.reading import LARGEST_PIXELS, PictureError, read_picture, read_rgba

UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40  # two rows, three columns, all different

# TIFF 6.0, tag 274: what the first row and the first column of the file are in the upright picture
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored(upright, orientation):
    """The rows and columns of a file that is to be shown as the given array, straight from the definition."""
    height, width = upright.shape
    first_row, first_column = ORIENTATIONS[orientation]
    if orientation <= 4:
        rows = range(height) if first_row == "top" else reversed(range(height))
        columns = range(width) if first_column == "left" else reversed(range(width))
        columns = list(columns)
        return np.array([[upright[y, x] for x in columns] for y in rows], np.uint8)
    rows = range(width) if first_row == "left" else reversed(range(width))
    columns = list(range(height) if first_column == "top" else reversed(range(height)))
    return np.array([[upright[y, x] for y in columns] for x in rows], np.uint8)


def rotated(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def written(path, picture, **options):
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("tif", {}), ("webp", {"lossless": True})])
def test_each_orientation_is_shown_upright(tmp_path, orientation, suffix, options):
    file = Image.fromarray(stored(UPRIGHT, orientation)).convert("RGB")
    path = written(tmp_path / f"x.{suffix}", file, exif=rotated(orientation), **options)
    picture, mask = read_picture(path)
    assert np.array_equal(np.asarray(picture), np.stack([UPRIGHT] * 3, axis=-1))
    assert mask is None


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_each_orientation_of_a_jpeg_is_shown_upright(tmp_path, orientation):
    blocks = np.kron(stored(UPRIGHT, orientation), np.ones((16, 16), np.uint8))
    path = written(tmp_path / "x.jpg", Image.fromarray(blocks), exif=rotated(orientation), quality=95)
    middles = np.asarray(read_picture(path)[0])[8::16, 8::16, 0].astype(int)
    assert np.abs(middles - UPRIGHT).max() <= 2  # JPEG's own rounding


def test_transparency_and_16_bits_turn_with_the_picture(tmp_path):
    opacity = Image.fromarray(stored(UPRIGHT, 6))
    file = Image.merge("LA", (Image.new("L", opacity.size), opacity))
    _, mask = read_picture(written(tmp_path / "x.png", file, exif=rotated(6)))
    assert np.array_equal(np.asarray(mask), 255 - UPRIGHT)
    deep = Image.fromarray(stored(UPRIGHT, 6).astype(np.uint16) * 257)
    picture, _ = read_picture(written(tmp_path / "y.png", deep, exif=rotated(6)))
    assert np.array_equal(np.asarray(picture)[:, :, 0], UPRIGHT)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_metadata_does_not_hide_a_sound_picture(tmp_path, suffix):
    path = written(tmp_path / f"x.{suffix}", Image.new("RGB", (16, 8)), exif=b"Exif\0\0junkjunkjunk")
    assert read_picture(path)[0].size == (16, 8)


def palette_picture():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    return picture


GREYS = Image.fromarray(np.array([[0, 200]], np.uint8))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(
    ("picture", "pixels"),
    [
        (Image.fromarray(np.array([[False, True]])), [(0, 0, 0), (255, 255, 255)]),
        (GREYS, [(0, 0, 0), (200, 200, 200)]),
        (Image.merge("RGB", [GREYS, GREYS, GREYS.point(lambda level: 7)]), [(0, 0, 7), (200, 200, 7)]),
        (palette_picture(), [(10, 20, 30), (200, 100, 50)]),
    ],
    ids=["1", "L", "RGB", "P"],
)
def test_pixels_of_each_kind_come_out_as_rgb(tmp_path, suffix, picture, pixels):
    read, mask = read_picture(written(tmp_path / f"x.{suffix}", picture))
    assert read.mode == "RGB"
    assert [read.getpixel((x, 0)) for x in range(2)] == pixels
    assert mask is None


def deep_grey(suffix, levels):
    """A file of one row with these levels of 16 bits."""
    array, file = np.array([levels], np.uint16), io.BytesIO()
    if suffix == "pgm":
        return f"P5 {len(levels)} 1 65535\n".encode() + array.astype(">u2").tobytes()
    Image.fromarray(array).save(file, suffix)
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_greys_of_16_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(deep_grey(suffix, [257 * level for level in range(256)] + [128, 129, 32768, 65535]))
    levels = np.asarray(read_picture(path)[0])[0, :, 1].tolist()
    # 128 / 257 = 0.498, 129 / 257 = 0.502, 32768 / 257 = 127.502
    assert levels == [*range(256), 0, 1, 128, 255]


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_labels_in_16_bits_stay_apart_from_black(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(deep_grey(suffix, [0, 1, 2, 128, 255]))
    assert np.asarray(read_picture(path)[0])[0, :, 1].tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk_is_ink_on_white(tmp_path, suffix):
    """Pillow undoes the inversion that Adobe's programs put into JPEG files."""
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 0, 0, 255): (0, 0, 0), (255, 0, 0, 0): (0, 255, 255)}
    for ink, colour in inks.items():
        path = written(tmp_path / f"x.{suffix}", Image.new("CMYK", (16, 16), ink))
        if suffix == "jpg":
            assert b"Adobe" in path.read_bytes()
        assert np.abs(np.subtract(read_picture(path)[0].getpixel((8, 8)), colour)).max() <= 2


def test_transparent_pixels_are_laid_on_white_and_returned_as_a_mask(tmp_path):
    file = Image.new("RGBA", (3, 1))
    file.putdata([(0, 100, 200, 255), (0, 100, 200, 51), (0, 100, 200, 0)])
    picture, mask = read_picture(written(tmp_path / "x.png", file))
    # 51 is a fifth: 0.2 * (0, 100, 200) + 0.8 * 255
    assert [picture.getpixel((x, 0)) for x in range(3)] == [(0, 100, 200), (204, 224, 244), (255, 255, 255)]
    assert [mask.getpixel((x, 0)) for x in range(3)] == [0, 204, 255]
    black, _ = read_picture(tmp_path / "x.png", background="black")
    assert [black.getpixel((x, 0)) for x in range(3)] == [(0, 100, 200), (0, 20, 40), (0, 0, 0)]


@pytest.mark.parametrize(
    ("picture", "options"),
    [
        (Image.merge("LA", (GREYS, GREYS.point(lambda level: 255 * (level > 0)))), {}),
        (GREYS, {"transparency": 0}),
        (palette_picture(), {"transparency": 0}),
        (palette_picture(), {"transparency": b"\x00\xff"}),
        (Image.merge("RGB", [GREYS] * 3), {"transparency": (0, 0, 0)}),
        (Image.fromarray(np.array([[False, True]])), {"transparency": 0}),
        (Image.fromarray(np.array([[300, 40000]], np.uint16)), {"transparency": 300}),
    ],
    ids=["LA", "L", "P", "P levels", "RGB", "1", "16 bits"],
)
def test_each_way_to_be_transparent_gives_the_mask(tmp_path, picture, options):
    read, mask = read_picture(written(tmp_path / "x.png", picture, **options))
    assert [mask.getpixel((x, 0)) for x in range(2)] == [255, 0]
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert read.getpixel((1, 0)) != (255, 255, 255) or picture.mode == "1"


def test_an_opaque_alpha_channel_is_no_mask(tmp_path):
    picture, mask = read_picture(written(tmp_path / "x.png", Image.new("RGBA", (4, 4), (1, 2, 3, 255))))
    assert (picture.getpixel((0, 0)), mask) == ((1, 2, 3), None)


# colour profiles


def fixed(*numbers):
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def profile(space, tags, name=b"handmade"):
    """A minimal display profile, ICC.1:2001-04, with straight lines for tone curves."""
    description = b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name + bytes(1 + 8 + 3 + 67)
    bodies = {b"desc": description, b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249), **tags}
    bodies = {tag: body + bytes(-len(body) % 4) for tag, body in bodies.items()}
    place = 128 + 4 + 12 * len(bodies)
    table, data = struct.pack(">I", len(bodies)), b""
    for tag, body in bodies.items():
        table += tag + struct.pack(">II", place + len(data), len(body))
        data += body
    header = struct.pack(">II", 0, 0x02400000) + b"mntr" + space + b"XYZ "
    header = header[:4] + bytes(4) + header[4:] + struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp"
    header = header.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249)
    whole = header.ljust(128, b"\0") + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


LINE = b"curv" + bytes(8)
# primaries of sRGB, adapted to D50
RED, GREEN, BLUE = (0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)


def rgb_profile(red, green, blue, **options):
    tags = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue}
    bodies = {tag: b"XYZ " + bytes(4) + fixed(*xyz) for tag, xyz in tags.items()}
    return profile(b"RGB ", {**bodies, b"rTRC": LINE, b"gTRC": LINE, b"bTRC": LINE}, **options)


def encoded(linear):
    """IEC 61966-2-1: light between 0 and 1 as sRGB's level."""
    return 255 * (12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055)


def near(picture, colour):
    return np.abs(np.subtract(picture.getpixel((0, 0)), colour)).max() <= 1


def test_colours_are_brought_to_srgb(tmp_path):
    swapped = rgb_profile(GREEN, RED, BLUE)
    path = written(tmp_path / "x.png", Image.new("RGB", (4, 4), (128, 0, 20)), icc_profile=swapped)
    assert near(read_picture(path)[0], (0, encoded(128 / 255), encoded(20 / 255)))


def test_transparency_stays_beside_a_colour_profile(tmp_path):
    file = Image.new("RGBA", (4, 4), (128, 0, 0, 51))
    written(tmp_path / "x.png", file, icc_profile=rgb_profile(GREEN, RED, BLUE))
    rgba = read_rgba(tmp_path / "x.png")
    assert near(rgba, (0, encoded(128 / 255), 0, 51))
    assert read_rgba(tmp_path / "x.png", colour_managed=False).getpixel((0, 0)) == (128, 0, 0, 51)


def test_greys_are_brought_to_srgb(tmp_path):
    linear = profile(b"GRAY", {b"kTRC": LINE})
    path = written(tmp_path / "x.png", Image.new("L", (4, 4), 64), icc_profile=linear)
    assert near(read_picture(path)[0], [encoded(64 / 255)] * 3)


@pytest.mark.parametrize(
    "unfit",
    [b"junk", b"", rgb_profile(GREEN, RED, BLUE)[:200], profile(b"GRAY", {b"kTRC": LINE}), profile(b"CMYK", {})],
    ids=["junk", "empty", "cut off", "for greys", "for inks"],
)
def test_a_profile_that_does_not_fit_is_left_aside(tmp_path, unfit):
    path = written(tmp_path / "x.png", Image.new("RGB", (4, 4), (128, 0, 20)), icc_profile=unfit)
    assert read_picture(path)[0].getpixel((0, 0)) == (128, 0, 20)


def test_a_large_colour_profile_is_used(tmp_path):
    swapped = rgb_profile(GREEN, RED, BLUE)
    swapped = struct.pack(">I", 2_000_000) + swapped[4:].ljust(2_000_000 - 4, b"\0")
    written(tmp_path / "x.png", Image.new("RGB", (4, 4), (128, 0, 20)), icc_profile=swapped)
    assert near(read_picture(tmp_path / "x.png")[0], (0, encoded(128 / 255), encoded(20 / 255)))


def test_a_picture_in_srgb_keeps_every_bit(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    srgb = rgb_profile(RED, GREEN, BLUE, name=b"sRGB IEC61966-2.1")  # by name: its curves would change the levels
    path = written(tmp_path / "x.png", Image.fromarray(levels), icc_profile=srgb)
    assert np.array_equal(np.asarray(read_picture(path)[0]), levels)


# what is refused


def refusal(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PictureError) as caught:
            read_picture(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def test_what_is_no_file_is_refused(tmp_path):
    assert refusal(tmp_path / "x.png") == "FILE does not exist. Give a picture file."
    assert refusal(tmp_path / "x.png" / "y.png").startswith("FILE does not exist.")
    assert refusal(tmp_path) == "FILE is a folder. Give one picture file."
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    assert "holds a NUL character" in refusal(tmp_path / "x\0.png")
    (tmp_path / "empty.png").touch()
    assert refusal(tmp_path / "empty.png") == "FILE is empty (0 bytes). Give a picture file."


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a device or a pipe" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize(
    "data",
    [b"hello, this is no picture at all", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
)
def test_what_is_no_picture_is_refused(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    assert refusal(tmp_path / "x.png").startswith("FILE is not a picture that is read here (PNG, JPEG, ")


FRAMES = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
AVIF = pytest.param("avif", marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF"))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif", AVIF])
def test_more_than_one_frame_is_refused(tmp_path, suffix):
    path = written(tmp_path / f"x.{suffix}", FRAMES[0], save_all=True, append_images=FRAMES[1:])
    assert refusal(path).startswith("FILE holds more than one frame or page. Give a single one, saved as PNG: ffmpeg")


def test_a_single_frame_is_read(tmp_path):
    path = written(tmp_path / "x.gif", FRAMES[0])
    assert read_picture(path)[0].getpixel((0, 0)) == (255, 0, 0)


def test_a_photograph_with_a_preview_behind_it_is_read(tmp_path):
    path = tmp_path / "x.jpg"
    FRAMES[0].save(path, "MPO", save_all=True, append_images=FRAMES[1:2])
    with Image.open(path) as file:
        assert (file.format, file.n_frames) == ("MPO", 2)
    assert near(read_picture(path)[0], (254, 0, 0))


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return header + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_more_pixels_than_memory_is_for_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(png_header(2**14, LARGEST_PIXELS // 2**14 + 1))
    assert refusal(path).startswith("FILE has 16384x3907 pixels; at most 64 million are read. Scale it down, or raise")
    path.write_bytes(png_header(10**6, 10**6))
    assert refusal(path).startswith("FILE has 1000000x1000000 pixels; at most 64 million")
    for size, given in ((8001, "8001x8000 pixels; at most 64 million"), (60000, "more than 179 million pixels.")):
        path.write_bytes(f"P5 {size} 8000 255\n".encode())
        assert refusal(path).startswith(f"FILE has {given}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert refusal(path).startswith("FILE has 60000x8000 pixels; at most 64 million are read.")


@pytest.mark.parametrize(
    ("picture", "reason"),
    [(Image.new("F", (4, 4)), "32 bits"), (Image.new("I", (4, 4)), "32 bits"), (Image.new("LAB", (4, 4)), "kind LAB")],
    ids=["F", "I", "LAB"],
)
def test_numbers_without_a_known_white_are_refused(tmp_path, picture, reason):
    assert reason in refusal(written(tmp_path / "x.tif", picture))


KINDS = ["png", "jpg", "webp", "gif", "bmp", "tif", "ppm", AVIF]


def noisy_file(suffix):
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    return file.getvalue()


@pytest.mark.parametrize("suffix", KINDS)
def test_a_file_that_ends_too_early_is_refused(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    whole = noisy_file(suffix)
    path.write_bytes(whole)
    assert read_picture(path)[0].size == (24, 24)
    for share in (0.02, 0.1, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: round(share * len(whole))])
        assert refusal(path).startswith(("FILE is cut off or damaged: ", "FILE is not a picture that is read here"))


@pytest.mark.parametrize("suffix", KINDS)
def test_damage_ends_in_a_picture_or_a_sentence(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    whole = noisy_file(suffix)
    draw = random.Random(2)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(min(len(data), 300))] = draw.choice([0, 1, 127, 255, draw.randrange(256)])
        path.write_bytes(data)
        with suppress(PictureError):
            assert read_picture(path)[0].mode == "RGB"
