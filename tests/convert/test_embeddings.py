"""Embeddings of every layout are read, and what cannot be one is refused with one sentence."""

import json
import os
import random
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from embeddings import LAYOUTS, as_json, hidden, hidden_card, made_up, of_web_ui, picture, saved, text_card
from hostile import HOOKS, checkpoint, dict_of, pickled, refused, tensor
from PIL import Image
from safetensors.torch import save_file

from convert.adapters.adapter import open_adapter, read_adapter
from convert.adapters.embedding import bundled, embedding_files, read_embedding, words_in, wrong_family
from convert.errors import CheckpointError, CorruptFileError, UnsafeFileError, UnsupportedFileError, WeightMismatchError
from sd.config import SD_V1

V2 = replace(SD_V1, text_encoder=replace(SD_V1.text_encoder, width=1024))


def values(embedding):
    (array,) = embedding.vectors
    return torch.from_numpy(array)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_vectors(layout, tmp_path):
    vectors = made_up().half().float()
    embedding = read_embedding(LAYOUTS[layout](tmp_path, "easy", vectors))
    assert torch.equal(values(embedding), vectors)
    assert (embedding.name, embedding.count, embedding.widths) == ("easy", 3, (64,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_precision_is_read(dtype, tmp_path):
    vectors = made_up().to(dtype)
    save_file({"emb_params": vectors}, tmp_path / "easy.safetensors")
    assert torch.equal(values(read_embedding(tmp_path / "easy.safetensors")), vectors.float())


def test_one_vector_may_have_one_axis(tmp_path):
    vector = made_up()[0]
    assert torch.equal(values(read_embedding(LAYOUTS["diffusers"](tmp_path, "easy", vector))), vector[None])


def test_an_embedding_says_how_it_was_trained(tmp_path):
    embedding = read_embedding(LAYOUTS["web ui"](tmp_path, "easy", made_up()))
    assert embedding.inside == "inside"
    assert embedding.facts == {"step": 500, "sd_checkpoint": "81761151", "sd_checkpoint_name": "base"}


@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_a_word_of_xl_has_vectors_for_both_text_encoders(keys, tmp_path):
    small, large = made_up(2, 768), made_up(2, 1280)
    save_file(dict(zip(keys, (small, large), strict=True)), tmp_path / "easy.safetensors")
    embedding = read_embedding(tmp_path / "easy.safetensors")
    assert embedding.widths == (768, 1280)
    assert torch.equal(torch.from_numpy(embedding.vectors[1]), large)


@pytest.mark.parametrize(
    ("widths", "config", "said"),
    [
        ((1024,), SD_V1, "is for Stable Diffusion 2 (vectors of 1024 numbers); this model is Stable Diffusion 1 (768"),
        ((768,), V2, "is for Stable Diffusion 1 (vectors of 768 numbers); this model is Stable Diffusion 2 (1024"),
        ((768, 1280), SD_V1, "is for Stable Diffusion XL (vectors of 768 and 1280 numbers); this model is"),
        ((1280,), SD_V1, "is for Stable Diffusion XL refiner"),
        ((320,), SD_V1, "is for an unknown text encoder (vectors of 320 numbers); this model is Stable Diffusion 1"),
        ((768,), SD_V1, None),
        ((1024,), V2, None),
    ],
)
def test_another_family_is_told_with_both(widths, config, said, tmp_path):
    keys = ("clip_l", "clip_g") if len(widths) == 2 else ("emb_params",)
    save_file({key: made_up(1, width) for key, width in zip(keys, widths, strict=True)}, tmp_path / "easy.safetensors")
    problem = wrong_family(read_embedding(tmp_path / "easy.safetensors"), config)
    assert problem is None if said is None else said in problem


def test_words_bundled_with_a_lora_are_read(tmp_path):
    vectors = made_up(2, 768)
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{module}.lora_down.weight": torch.ones(4, 320), f"{module}.lora_up.weight": torch.ones(320, 4)}
    words = {"bundle_emb.mine.string_to_param.*": vectors, "bundle_emb.other.emb_params": vectors[:1].clone()}
    save_file(lora | words, tmp_path / "lora.safetensors")
    with open_adapter(tmp_path / "lora.safetensors") as file:
        found = {each.name: values(each) for each in bundled(file, read_adapter(file, SD_V1).words)}
    assert torch.equal(found["mine"], vectors)
    assert torch.equal(found["other"], vectors[:1])


# Pictures


def test_a_card_with_a_text_is_read(tmp_path):
    vectors = made_up()
    embedding = read_embedding(text_card(tmp_path / "file.png", as_json(vectors)))
    assert torch.equal(values(embedding), vectors)
    assert (embedding.name, embedding.facts["step"]) == ("card", 500)


@pytest.mark.parametrize(("suffix", "options"), [(".png", {}), (".webp", {"lossless": True})])
@pytest.mark.parametrize("border", [0, 5])
def test_a_card_with_vectors_in_its_colours_is_read(suffix, options, border, tmp_path):
    vectors = made_up()
    path = hidden(tmp_path / f"file{suffix}", vectors, border=border, **options)
    embedding = read_embedding(path)
    assert torch.equal(values(embedding), vectors)
    assert embedding.name == "card"


def test_the_generator_begins_as_published():
    from convert.adapters.image_card import combined

    assert list(combined(np.zeros((5, 1, 1), np.uint8)).ravel()[:4]) == [253 & 15, 242 & 15, 127 & 15, 44 & 15]


@pytest.mark.parametrize(
    ("name", "expected"), [("inner", "inner"), (None, "file"), ("  ", "file"), (7, "file")], ids=str
)
def test_a_card_is_called_by_the_name_inside_else_by_its_file(name, expected, tmp_path):
    assert read_embedding(text_card(tmp_path / "file.png", as_json(made_up(), name))).name == expected


def plain_colour(path):
    Image.new("RGB", (64, 64), (32, 64, 128)).save(path)


PREVIEWS = {
    "noise": lambda path: picture().save(path),
    "black": lambda path: Image.new("RGB", (64, 64)).save(path),
    "plain": plain_colour,
    "not zlib": lambda path: hidden_card(path, b"no stream of zlib" * 20),
    "cut": lambda path: hidden_card(path, zlib.compress(bytes(range(256)) * 30)[:-40] + bytes(4)),
    "other text": lambda path: text_card(path, b"{}", key="parameters"),
    "large": lambda path: Image.new("L", (4097, 4096), 16).save(path),
}


@pytest.mark.parametrize("kind", PREVIEWS)
def test_a_picture_without_an_embedding_is_a_preview(kind, tmp_path):
    PREVIEWS[kind](tmp_path / "easy.png")
    assert list(words_in(tmp_path)) == []
    refused(
        tmp_path / "easy.png", UnsupportedFileError, "easy.png is a picture without an embedding", read=read_embedding
    )


def card(entries):
    return json.dumps(entries).encode()


def table(rows):
    return card({"string_to_param": {"*": {"TORCHTENSOR": rows}}})


HOSTILE_JSON = {
    "no json": (b"\xff\xfe{", CorruptFileError, "not JSON"),
    "deep": (b"[" * 200_000, UnsafeFileError, "nested too deeply"),
    "deep tensor": (table([[[1.0]]]), WeightMismatchError, "not a table of numbers"),
    "many digits": (b'{"string_to_param":{"*":{"TORCHTENSOR":[' + b"9" * 5000 + b"]}}}", CorruptFileError, "not JSON"),
    "beyond floats": (table([[10**400]]), WeightMismatchError, "NaN or infinite"),
    "beyond float32": (table([[1e300]]), WeightMismatchError, "NaN or infinite"),
    "nan": (table([[float("nan")]]), WeightMismatchError, "NaN or infinite"),
    "strings": (table([["1.0"]]), WeightMismatchError, "not a table of numbers"),
    "one long string": (table([["x" * 10**6, *["y"] * 1000]]), WeightMismatchError, "not a table of numbers"),
    "booleans": (table([[True]]), WeightMismatchError, "not a table of numbers"),
    "ragged": (table([[1.0, 2.0], [1.0]]), WeightMismatchError, "different lengths"),
    "mixed": (table([[1.0], 2.0]), WeightMismatchError, "not a table of numbers"),
    "a number": (table(1.0), WeightMismatchError, "not a table of numbers"),
    "empty table": (table([]), WeightMismatchError, "is empty"),
    "empty rows": (table([[], []]), WeightMismatchError, "is empty"),
    "many rows": (table([[1.0]] * 76), WeightMismatchError, "has 76 vectors"),
    "wide": (table([[1.0] * 8193]), WeightMismatchError, "8193 numbers"),
    "a list": (b"[]", UnsupportedFileError, "without an embedding"),
    "no tensor": (card({"string_to_param": {"*": 1}}), UnsupportedFileError, "no embedding"),
    "no table": (card({"string_to_param": 1}), UnsupportedFileError, "no embedding"),
    "two words": (
        card({"string_to_param": {"a": {"TORCHTENSOR": [1.0]}, "b": {"TORCHTENSOR": [1.0]}}}),
        UnsupportedFileError,
        "2 tensors",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
@pytest.mark.parametrize("place", ["text", "colours"])
def test_hostile_cards_get_one_sentence(name, place, tmp_path):
    data, kind, said = HOSTILE_JSON[name]
    path = tmp_path / "easy.png"
    if place == "text":
        text_card(path, data)
    else:
        hidden_card(path, zlib.compress(data, 9))
    refused(path, kind, "easy.png ", said, read=read_embedding)


def test_what_inflates_without_end_is_refused(tmp_path):
    hidden_card(tmp_path / "easy.png", zlib.compress(bytes(20 << 20), 9))
    refused(tmp_path / "easy.png", UnsafeFileError, "exceeds the limit for bytes of its embedding", read=read_embedding)


def test_a_text_that_is_not_base64_and_a_cut_picture_are_damage(tmp_path):
    path = text_card(tmp_path / "easy.png", b"x")
    path.write_bytes(path.read_bytes().replace(b"eA==", b"eA=\xff"))
    refused(path, CorruptFileError, "cannot be read", read=read_embedding)
    whole = hidden(tmp_path / "easy.png", made_up()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, CorruptFileError, "easy.png is a picture that cannot be read", read=read_embedding)


def test_changed_cards_are_read_or_refused_with_one_sentence(tmp_path):
    pick, path = random.Random(0), tmp_path / "easy.png"
    seeds = [hidden(path, made_up(1, 8)).read_bytes(), text_card(path, as_json(made_up(1, 8))).read_bytes()]
    outcomes, messages = set(), []
    for _ in range(60):
        data = bytearray(pick.choice(seeds))
        for _ in range(pick.choice((1, 1, 8))):
            data[pick.randrange(len(data))] = pick.randrange(256)
        path.write_bytes(data)
        try:
            outcomes.add(read_embedding(path).count)
        except CheckpointError as error:
            outcomes.add(type(error))
            messages.append(str(error))
    assert {1, CorruptFileError} <= outcomes
    assert all(message.startswith("easy.png ") for message in messages)
    assert all(message.replace("\n", "").isprintable() for message in messages)


# What is no embedding


def nan_at(vectors, value):
    vectors[1, 2] = value
    return vectors


REFUSED = {
    "nan": (lambda: {"emb_params": nan_at(made_up(), float("nan"))}, WeightMismatchError, "NaN or infinite"),
    "infinite": (lambda: {"emb_params": nan_at(made_up(), float("inf"))}, WeightMismatchError, "NaN or infinite"),
    "empty": (lambda: {"emb_params": torch.zeros(0, 64)}, WeightMismatchError, "is empty"),
    "no width": (lambda: {"emb_params": torch.zeros(2, 0)}, WeightMismatchError, "is empty"),
    "three axes": (lambda: {"emb_params": made_up()[None]}, WeightMismatchError, "shape [1, 3, 64]"),
    "no axis": (lambda: {"emb_params": torch.tensor(1.0)}, WeightMismatchError, "shape []"),
    "many": (
        lambda: {"emb_params": made_up(76)},
        WeightMismatchError,
        "76 vectors; a chunk of a prompt has room",
    ),
    "wide": (lambda: {"emb_params": made_up(1, 9000)}, WeightMismatchError, "vectors of 9000 numbers"),
    "integers": (lambda: {"emb_params": torch.ones(1, 64, dtype=torch.int64)}, WeightMismatchError, "int64 numbers"),
    "two words": (lambda: {"<a>": made_up(), "<b>": made_up()}, UnsupportedFileError, "2 tensors"),
    "other count": (
        lambda: {"clip_l": made_up(2, 768), "clip_g": made_up(3, 1280)},
        WeightMismatchError,
        "2 and 3 vectors",
    ),
    "lora": (
        lambda: {"lora_unet_a.lora_up.weight": made_up(), "lora_unet_a.lora_down.weight": made_up()},
        UnsupportedFileError,
        "holds a LoRA, not an embedding",
    ),
    "checkpoint": (
        lambda: {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, 4, 3, 3), "x": torch.ones(1)},
        UnsupportedFileError,
        "not an embedding",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_no_embedding_gets_one_sentence(name, suffix, tmp_path):
    make, kind, said = REFUSED[name]
    path = saved(lambda content: (suffix, content, {}))(tmp_path, "easy", make())
    refused(path, kind, f"easy{suffix} ", said, read=read_embedding)


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        ([{"a": torch.ones(1, 64)}, {"b": torch.ones(1, 32)}], WeightMismatchError, "different widths"),
        ([{"a": 1}], UnsupportedFileError, "holds no embedding"),
        ([], UnsupportedFileError, "holds no embedding"),
        ({}, UnsupportedFileError, "holds no embedding"),
        ("text", UnsupportedFileError, "holds no embedding"),
        ({"hash": "x", "optimizer_state_dict": {}}, UnsupportedFileError, "optimiser's state"),
        ({"string_to_param": {}}, UnsupportedFileError, "holds no embedding"),
        ({"string_to_param": {"*": 1}}, UnsupportedFileError, "holds no embedding"),
        ({"string_to_param": {"*": torch.ones(64), "+": torch.ones(64)}}, UnsupportedFileError, "2 tensors"),
    ],
)
def test_odd_pickles_get_one_sentence(content, kind, said, tmp_path):
    torch.save(content, tmp_path / "easy.pt")
    refused(tmp_path / "easy.pt", kind, "easy.pt ", said, read=read_embedding)


def test_nothing_in_a_pickle_is_executed(tmp_path):
    path = tmp_path / "easy.pt"
    path.write_bytes(checkpoint(pickled(dict_of(string_to_param=b"cos\nsystem\nX\4\0\0\0true\x85R"))))
    refused(path, UnsafeFileError, "easy.pt ", "system", read=read_embedding)
    huge = tensor(size=(75, 1 << 40), stride=(0, 0), hooks=HOOKS)  # as many numbers as one says
    path.write_bytes(checkpoint(pickled(dict_of(string_to_param=huge))))
    with pytest.raises(CheckpointError):
        read_embedding(path)


# Folders


def test_a_folder_lists_its_words(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "back").symlink_to(tmp_path)
    (tmp_path / ".hidden").mkdir()
    LAYOUTS["web ui"](tmp_path, "Easy", made_up())
    LAYOUTS["kohya"](tmp_path / "inner", "other", made_up())
    LAYOUTS["kohya"](tmp_path / ".hidden", "unseen", made_up())
    LAYOUTS["diffusers"](tmp_path / "inner", "learned_embeds", made_up())
    text_card(tmp_path / "file.png", as_json(made_up()))
    text_card(tmp_path / "file.preview.png", as_json(made_up(), "preview"))
    text_card(tmp_path / "easy.png", as_json(made_up(), "beside"))
    torch.save({"hash": "x", "optimizer_state_dict": {}}, tmp_path / "Easy.pt.optim")
    (tmp_path / "notes.txt").write_text("no embedding")
    (tmp_path / "learned_embeds-2.bin").write_bytes(b"damaged")
    found = {name: path.relative_to(tmp_path).as_posix() for name, path in words_in(tmp_path)}
    assert found == {
        "Easy": "Easy.pt",
        "card": "file.png",
        "learned_embeds-2": "learned_embeds-2.bin",
        "<cat-toy>": "inner/learned_embeds.bin",
        "other": "inner/other.safetensors",
    }


def test_a_file_saved_by_diffusers_is_called_by_the_word_inside(tmp_path):
    assert read_embedding(LAYOUTS["diffusers"](tmp_path, "learned_embeds", made_up())).name == "<cat-toy>"
    assert read_embedding(LAYOUTS["diffusers"](tmp_path, "renamed", made_up())).name == "renamed"


def test_a_folder_that_is_not_there_has_no_files(tmp_path):
    assert list(embedding_files(tmp_path / "nothing")) == []


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "easy.png")
    refused(tmp_path / "easy.png", UnsupportedFileError, "easy.png is a pipe or a device", read=read_embedding)
    assert list(words_in(tmp_path)) == []


def test_the_web_uis_own_name_does_not_count(tmp_path):
    torch.save(of_web_ui(made_up(), "another"), tmp_path / "easy.pt")
    assert read_embedding(tmp_path / "easy.pt").name == "easy"
