"""Training on latents that were encoded once, and on pictures from a folder."""

import json
import shutil

import pytest
import torch
import training_example
from conftest import fill
from PIL import Image

from sd.training.folder import PictureFolder
from sd.training.latents import EncodedAsTheyCome, EncodedOnce, encode_all
from sd.training.shapes.drawing import ShapesDataset

EVERYTHING = slice(None)


@pytest.fixture(scope="module")
def vae():
    return fill(training_example.CONFIG)["vae"]


@pytest.fixture
def encoded(vae, tmp_path):
    path = tmp_path / "latents.safetensors"
    done = []
    encode_all(vae, training_example.RandomPictures(), 12, path, batch_size=4, on_batch=done.append)
    assert done == [4, 4, 4]
    return EncodedOnce(path, lambda number, time: f"{number} for the {time}th time", seed=0)


def test_latents_encoded_once_equal_those_encoded_live(vae, encoded):
    live = EncodedAsTheyCome(vae, training_example.RandomPictures())
    for step in range(3):
        assert torch.equal(encoded.moments["mean"][4 * step : 4 * step + 4], live.batch(step, 4, EVERYTHING).mean)
        assert torch.equal(encoded.moments["logvar"][4 * step : 4 * step + 4], live.batch(step, 4, EVERYTHING).logvar)


def test_every_round_shows_each_picture_once_in_another_order(encoded):
    orders = []
    for time in range(2):
        batches = [encoded.batch(3 * time + step, 4, EVERYTHING) for step in range(3)]
        captions = [caption for batch in batches for caption in batch.captions]
        numbers = [int(caption.split()[0]) for caption in captions]
        assert sorted(numbers) == list(range(12))
        assert all(caption.endswith(f"{time}th time") for caption in captions)
        assert torch.equal(torch.cat([batch.mean for batch in batches]), encoded.moments["mean"][numbers])
        orders.append(numbers)
    assert orders[0] != orders[1]


def test_a_batch_of_encoded_pictures_depends_on_its_step_alone(encoded):
    later = encoded.batch(4, 4, EVERYTHING)
    encoded.batch(0, 4, EVERYTHING)
    assert encoded.batch(4, 4, EVERYTHING).captions == later.captions
    halves = [encoded.batch(4, 4, share) for share in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat([half.mean for half in halves]), later.mean)


def test_drawn_pictures_get_other_words_in_later_rounds():
    shapes = ShapesDataset(0, 32)
    assert [shapes.recaption(number, 0) for number in range(50)] == [shapes.describe(number)[1] for number in range(50)]
    words = {shapes.recaption(3, time) for time in range(30)}
    assert len(words) > 10
    assert shapes.recaption(3, 7) == shapes.recaption(3, 7)


def fill_folder(folder, names=("a.png", "b.jpg", "c.png")):
    folder.mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (40 + 8 * i, 32), (80 * i, 0, 255)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    return folder


def test_pictures_of_a_folder_come_with_their_captions_once_a_round(tmp_path):
    pictures = PictureFolder(fill_folder(tmp_path / "photos"), 16)
    images, captions = pictures.batch(0, 3, EVERYTHING)
    assert images.shape == (3, 3, 16, 16)
    assert sorted(captions) == ["caption of a.png", "caption of b.jpg", "caption of c.png"]
    for image, caption in zip(images, captions, strict=True):
        red = 80 * "abc".index(caption[-5]) / 127.5 - 1
        assert image[0].mean().item() == pytest.approx(red, abs=0.02)
    later = pictures.batch(7, 3, EVERYTHING)
    assert sorted(later[1]) == sorted(captions)
    assert torch.equal(pictures.batch(7, 3, slice(1, 3))[0], later[0][1:])


def test_a_picture_is_cut_from_its_middle(tmp_path):
    folder = fill_folder(tmp_path / "photos", ("a.png",))
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("blue", (32, 0, 64, 32))
    wide.save(folder / "a.png")
    image = PictureFolder(folder, 32).batch(0, 1, EVERYTHING)[0][0]
    assert image[:, 4:-4, 4:-4].amin(dim=(1, 2)).tolist() == [-1, -1, 1]


def test_captions_may_stand_in_one_file(tmp_path):
    folder = fill_folder(tmp_path / "photos", ("a.png", "b.png"))
    lines = [json.dumps({"file_name": "b.png", "text": "the second"})]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert PictureFolder(folder, 16).batch(0, 2, EVERYTHING)[1] == ["the second"] * 2


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "a.txt").unlink(), r"1 of 3 pictures in .* have no caption, 'a.png'"),
        (lambda folder: (folder / "a.png").write_bytes(b"no picture"), r"a.png cannot be read as a picture"),
        (lambda folder: [path.unlink() for path in list(folder.iterdir())], r"holds no pictures"),
        (lambda folder: (folder / "metadata.jsonl").write_text("{"), r"metadata.jsonl, line 1: expected"),
        (
            lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "z.png", "text": ""}'),
            r"names 1 files that do not exist, 'z.png'",
        ),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused(tmp_path, spoil, sentence):
    folder = fill_folder(tmp_path / "photos")
    spoil(folder)
    with pytest.raises(ValueError, match=sentence):
        PictureFolder(folder, 16)


def test_latents_of_other_pictures_are_refused(vae, tmp_path):
    path = tmp_path / "latents.safetensors"
    pictures = ShapesDataset(0, 32, kind="single", shapes=("star", "cross"))
    encode_all(vae, pictures, 2, path, batch_size=2, on_batch=lambda count: None, made_of=pictures.name)
    assert len(EncodedOnce(path, pictures.recaption, 0, pictures.name).moments["mean"]) == 2
    other = ShapesDataset(0, 32, kind="single", shapes=("star", "ring"))
    with pytest.raises(ValueError, match=r"holds other pictures \(.* star cross\) than requested \(.* star ring\)"):
        EncodedOnce(path, other.recaption, 0, other.name)
