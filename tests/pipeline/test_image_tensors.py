"""Pictures and their files."""

import os

import pytest
import torch
from PIL import Image

from sd.files import written_whole
from sd.pipeline.image.tensors import contact_sheet, save_png, to_images


def test_minus_one_is_black_one_is_white_and_more_is_clipped():
    image = torch.tensor([-1.0, 1.0, 0.0, -3.0, 3.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    (picture,) = to_images(image)
    assert [picture.getpixel((x, 0))[0] for x in range(5)] == [0, 255, 128, 0, 255]


def test_rows_and_columns_and_colours_keep_their_places():
    image = torch.full((1, 3, 2, 4), -1.0)
    image[0, 1, 0, 3] = 1  # green, first row, last column
    (picture,) = to_images(image)
    assert picture.size == (4, 2)
    assert picture.getpixel((3, 0)) == (0, 255, 0)


def test_png_carries_its_texts_in_any_script(tmp_path):
    path = tmp_path / "x.png"
    save_png(Image.new("RGB", (8, 8)), path, {"parameters": "馬, Pferd 🐎\nSteps: 1", "sd": '{"prompt": "馬"}'})
    with Image.open(path) as picture:
        assert picture.text["parameters"] == "馬, Pferd 🐎\nSteps: 1"
        assert picture.text["sd"] == '{"prompt": "馬"}'


def test_a_file_is_not_overwritten_unless_forced(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"x\.png exists already. Give another name, or --force"):
        save_png(Image.new("RGB", (8, 8)), path, {})
    assert path.read_bytes() == b"precious"
    save_png(Image.new("RGB", (8, 8)), path, {}, force=True)
    assert Image.open(path).size == (8, 8)
    assert os.listdir(tmp_path) == ["x.png"]


def test_an_error_while_writing_leaves_no_file(tmp_path):
    def interrupted():
        with written_whole(tmp_path / "x.bin") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "x.bin"

    def overtaken():
        with written_whole(path) as file:
            file.write(b"ours")
            path.write_bytes(b"theirs")

    with pytest.raises(FileExistsError, match="was just written by another process"):
        overtaken()
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_contact_sheet_is_about_as_wide_as_high():
    reds = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(5)]
    sheet = contact_sheet(reds)
    assert sheet.size == (24, 16)
    assert [sheet.getpixel((8 * (i % 3), 8 * (i // 3)))[0] for i in range(5)] == [0, 40, 80, 120, 160]
    assert contact_sheet(reds, 10**12).size == (40, 8)


@pytest.mark.parametrize("side", [64, 128, 512, 1024])
def test_labels_stand_under_the_pictures_and_fit(side):
    greys = [Image.new("RGB", (side, side), (99, 99, 99)) for _ in range(3)]
    labels = ["seed 7", "a lighthouse at dusk, " * 30, "x" * 500 + "\nبرج 猫"]
    sheet = contact_sheet(greys, 2, labels)
    row = sheet.height // 2
    assert (sheet.width, sheet.height % 2) == (2 * side, 0)
    assert 10 < row - side < 70
    for i in range(3):
        left, top = i % 2 * side, i // 2 * row
        assert sheet.crop((left, top, left + side, top + side)).getextrema() == ((99, 99),) * 3
        strip = sheet.crop((left, top + side, left + side, top + row)).convert("L")
        assert strip.getextrema()[1] > 200  # letters
        assert strip.crop((side - 2, 0, side, strip.height)).getextrema() == (0, 0)  # none is cut at the edge
