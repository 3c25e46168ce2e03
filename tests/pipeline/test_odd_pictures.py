"""Sound pictures that are easily refused or misread: kinds of TIFF, extras in PNG, brands. Expectations by hand."""

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image, features

from sd.pipeline.image.png_chunks import slim
from sd.pipeline.image.reading import PictureError, read_picture, read_rgba


def read(tmp_path, data, suffix="png", **options):
    path = tmp_path / f"x.{suffix}"
    if isinstance(data, Image.Image):
        data.save(path, **options)
    else:
        path.write_bytes(data)
    return read_rgba(path)


# TIFF


def tiff(samples, tags, order="<"):
    """One row of three pixels: its samples, and its tags (SHORT) beside size and place."""
    tags = {256: 3, 257: 1, 259: 1, 273: 8, 277: 1, 278: 1, 279: len(samples), **tags}
    samples += bytes(len(samples) % 2)
    entries, behind = b"", b""
    for tag in sorted(tags):
        values = tags[tag] if isinstance(tags[tag], tuple) else (tags[tag],)
        body = struct.pack(f"{order}{len(values)}H", *values)
        if len(body) > 4:
            place = 8 + len(samples) + 2 + 12 * len(tags) + 4 + len(behind)
            behind, body = behind + body, struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + body.ljust(4, b"\0")
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(samples))
    return header + samples + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + behind


DEEP = struct.pack("<3H", 0, 257 * 77, 65535)
ALPHA = bytes([9, 0, 0, 255, 50, 0, 0, 100, 0, 0, 0, 0])
CMYK = bytes([0, 0, 0, 0, 0, 0, 0, 255, 255, 0, 0, 0])
TIFFS = {  # TIFF 6.0; tag 258: bits; 262: what 0 is (0 white, 1 black) or the colours; 338: what the last channel is
    "1 bit": (b"\x40", {258: 1, 262: 1}, [0, 255, 0]),
    "1 bit, 0 is white": (b"\x40", {258: 1, 262: 0}, [255, 0, 255]),
    "2 bits": (b"\x6c", {258: 2, 262: 1}, [85, 170, 255]),
    "4 bits, 0 is white": (b"\x0f\x50", {258: 4, 262: 0}, [255, 0, 170]),
    "8 bits": (b"\x00\x0f\xf0", {258: 8, 262: 1}, [0, 15, 240]),
    "8 bits, 0 is white": (b"\x00\x0f\xf0", {258: 8, 262: 0}, [255, 240, 15]),
    "12 bits": (b"\x00\x0f\xff\x80\x00", {258: 12, 262: 1}, [0, 255, 128]),
    "16 bits": (DEEP, {258: 16, 262: 1}, [0, 77, 255]),
    "16 bits, 0 is white": (DEEP, {258: 16, 262: 0}, [255, 178, 0]),
    "grey, alpha": (bytes([0, 255, 50, 100, 240, 255]), {258: (8, 8), 262: 1, 277: 2, 338: 2}, [0, 50, 240]),
    "RGB times alpha": (ALPHA, {258: (8, 8, 8, 8), 262: 2, 277: 4, 338: 1}, [9, 127, 0]),
    "RGB and no alpha": (ALPHA, {258: (8, 8, 8, 8), 262: 2, 277: 4, 338: 0}, [9, 50, 0]),
    "CMYK": (CMYK, {258: (8, 8, 8, 8), 262: 5, 277: 4}, [255, 0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIFFS)
def test_each_kind_of_tiff_is_read_as_what_it_is(tmp_path, kind):
    samples, tags, reds = TIFFS[kind]
    assert np.asarray(read(tmp_path, tiff(samples, tags), "tif"))[0, :, 0].tolist() == reds


def test_big_endian_greys_of_16_bits_are_read(tmp_path):
    data = tiff(struct.pack(">3H", 257 * 3, 257 * 250, 0), {258: 16, 262: 1}, order=">")
    assert np.asarray(read(tmp_path, data, "tif"))[0, :, 0].tolist() == [3, 250, 0]


@pytest.mark.parametrize(
    ("samples", "tags", "reds"),
    [
        (bytes([0, 255, 50, 100, 240, 255]), {258: (8, 8), 262: 1, 277: 2, 338: 1}, [0, 127, 240]),  # times alpha
        (
            bytes([0, 128, 128, 255, 128, 128, 76, 85, 255]),
            {258: (8, 8, 8), 262: 6, 277: 3, 530: (1, 1)},
            [0, 255, 254],
        ),
    ],
)
def test_what_older_pillows_do_not_know_is_read_right_or_refused(tmp_path, samples, tags, reds):
    try:
        assert np.asarray(read(tmp_path, tiff(samples, tags), "tif"))[0, :, 0].tolist() == reds
    except PictureError as error:
        assert int(PIL.__version__.split(".")[0]) < 13, error  # noqa: PT017


@pytest.mark.parametrize("compression", ["jpeg", "tiff_lzw"])
def test_compressed_ycbcr_is_read(tmp_path, compression):
    picture = read(tmp_path, Image.new("YCbCr", (16, 16), (76, 85, 255)), "tif", compression=compression)
    assert np.abs(np.subtract(picture.getpixel((8, 8)), (254, 0, 0))).max() <= 2


@pytest.mark.parametrize(
    ("samples", "tags", "reason"),
    [
        (b"\x00\x0f\xf0", {258: 8, 262: 1, 339: 2}, "has levels from -128 to 127."),
        (DEEP, {258: 16, 262: 1, 339: 2}, "has 32 bits a pixel"),
        (struct.pack("<3f", 0, 0.5, 1), {258: 32, 262: 0, 339: 3}, "has 32 bits a pixel"),
        (bytes(18), {258: (8, 8, 8), 262: 6, 277: 3, 530: (2, 1)}, "has colours as YCbCr, not compressed"),
    ],
)
def test_tiffs_that_would_be_read_as_something_else_are_refused(tmp_path, samples, tags, reason):
    with pytest.raises(PictureError, match=reason):
        read(tmp_path, tiff(samples, tags), "tif")


@pytest.mark.parametrize(("kind", "is_read"), [(1, True), (2, False)])  # tag 254: a smaller version, another page
def test_a_tiff_with_a_preview_behind_it_is_one_picture(tmp_path, kind, is_read):
    small = Image.new("RGB", (8, 8), "blue")
    small.encoderinfo = {"tiffinfo": {254: kind}}
    options = {"save_all": True, "append_images": [small]}
    if is_read:
        picture = read(tmp_path, Image.new("RGB", (16, 16), "red"), "tif", **options)
        assert (picture.size, picture.getpixel((0, 0))) == ((16, 16), (255, 0, 0))
    else:
        with pytest.raises(PictureError, match="more than one frame or page"):
            read(tmp_path, Image.new("RGB", (16, 16), "red"), "tif", **options)


# PNG


def png(row, depth, kind, *chunks):
    """One row of two pixels, with more chunks before them."""
    header = (b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in (header, *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data


@pytest.mark.parametrize(
    ("row", "depth", "kind", "clear"),
    [
        (b"\x40", 1, 0, (0,)),
        (b"\x60", 2, 0, (1,)),
        (b"\x3f", 4, 0, (3,)),
        (b"\x2c\x10", 8, 0, (0x2C,)),
        (struct.pack(">HH", 300, 40000), 16, 0, (300,)),
        (struct.pack(">6H", 300, 40000, 7, 3000, 40000, 7), 16, 2, (300, 40000, 7)),
    ],
)
def test_the_transparent_colour_of_a_png_counts_in_the_bits_of_the_file(tmp_path, row, depth, kind, clear):
    chunk = (b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    assert list(np.asarray(read(tmp_path, png(row, depth, kind, chunk)))[0, :, 3]) == [0, 255]


LONG = zlib.compress(b"A" * 3_000_000)


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"parameters\0\0" + LONG),
        (b"iTXt", b"parameters\0\1\0\0\0" + LONG),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(20_000_000), 1)),
        (b"zTXt", b"a\0\1" + LONG),  # a compression that does not exist
        (b"iCCP", b"a\0\1" + LONG),
        (b"zTXt", b"Raw profile type exif\0\0junk"),
        *((name, b"a") for name in (b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"acTL", b"tEXt", b"bKGD", b"iCCP")),
    ],
)
def test_no_long_or_damaged_extra_hides_a_sound_png(tmp_path, chunk):
    whole = png(bytes([1, 2, 3, 4, 5, 6]), 8, 2, chunk)
    end = whole[:-12] + whole[33 : 33 + 12 + len(chunk[1])] + whole[-12:]  # the same once more, after the pixels
    for data in (whole, end):
        picture = read(tmp_path, data)
        assert (picture.mode, np.asarray(picture).ravel().tolist()) == ("RGB", [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif", "png", "gif"])
def test_long_texts_and_profiles_do_not_hide_a_picture_of_any_format(tmp_path, suffix):
    exif = Image.Exif()
    exif[270] = "A" * 60_000
    longest = 3_000_000 if suffix in ("webp", "tif") else 60_000
    options = {"exif": exif, "icc_profile": bytes(1_500_000), "comment": b"A" * 60_000, "xmp": bytes(longest)}
    picture = read(tmp_path, Image.new("RGB", (16, 8), "red"), suffix, **options)
    assert picture.getpixel((8, 4))[0] >= 253


def test_bits_beyond_the_pixels_of_a_png_are_not_kept(tmp_path):
    data = png(bytes(6), 8, 2)
    stuffed = data[:-12] + (struct.pack(">I", 2**21) + b"IDAT" + bytes(2**21 + 4)) * 2 + data[-12:]
    assert read(tmp_path, stuffed).size == (2, 1)
    assert len(slim(io.BytesIO(stuffed)).file.read()) < 2**21


def test_a_palette_that_is_missing_is_told(tmp_path):
    with pytest.raises(PictureError, match="is cut off or damaged: it has no palette"):
        read(tmp_path, png(b"\0\0", 8, 3))


def test_the_size_that_counts_is_limited(tmp_path):
    """A PNG may hold two headers: a small one, and one that the pixels are read by."""
    second = (b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0))
    with pytest.raises(PictureError, match="has 9000x9000 pixels; at most 64 million"):
        read(tmp_path, png(bytes(6), 8, 2, second))


# brands of ISO files

HEIC = "is a HEIC picture, which is not read here. Save it as PNG or JPEG."


@pytest.mark.parametrize(
    ("brands", "is_heic"),
    [
        (b"heic", True),
        (b"heix", True),
        (b"mif1 mif1 heic", True),
        (b"msf1 msf1 hevc iso8", True),
        (b"mif1 mif1 avif miaf", False),
        (b"msf1 avis msf1", False),
        (b"avif heic avif", False),
        (b"mif1 miaf", False),
        (b"mp42 isom", False),
    ],
)
def test_a_heic_photograph_is_named_by_its_brands(tmp_path, brands, is_heic):
    major, *others = brands.split()
    box = b"ftyp" + major + bytes(4) + b"".join(others)
    with pytest.raises(PictureError) as caught:
        read(tmp_path, struct.pack(">I", len(box) + 4) + box + b"\0\0\0\x08heic" + bytes(12))
    assert (HEIC in str(caught.value)) is is_heic


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_avif_in_a_general_container_is_read(tmp_path):
    path = tmp_path / "x.avif"
    Image.new("RGB", (16, 16), "red").save(path)
    data = path.read_bytes()
    assert data[8:12] == b"avif"
    path.write_bytes(data[:8] + b"mif1" + data[12:])
    assert read_picture(path)[0].size == (16, 16)
