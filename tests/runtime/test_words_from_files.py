"""Words from files, in a loaded model."""

import json

import pytest
import torch
from adapters import lora, lora_shapes
from conftest import TINY, assemble, fill, settings
from embeddings import LAYOUTS, as_json, made_up, text_card
from hostile import refused
from safetensors.torch import save_file

import sd
from convert.adapters.adapter import open_adapter, read_adapter
from convert.errors import CorruptFileError, UnsupportedFileError, WeightMismatchError
from convert.files.hashing import file_sha256
from sd.config import SD_V1
from sd.pipeline.learning import teach_bundled
from sd.pipeline.runner import Runner
from sd.pipeline.settings import SettingError
from sd.runtime.learned_words import bundled_words
from sd.text.tokenizer import Tokenizer

WIDTH = TINY.text_encoder.width


@pytest.fixture
def model():
    return assemble(TINY, fill(TINY))


def test_a_model_learns_the_words_of_files_and_forgets_them(model, tmp_path):
    plain = model.encode_prompts(["a easy other"])
    easy = LAYOUTS["web ui"](tmp_path, "easy", made_up(2, WIDTH))
    card = text_card(tmp_path / "file.png", as_json(made_up(1, WIDTH), "other"))
    model.learn([easy, str(card)])
    assert [(word.name, len(word.vectors), word.file) for word in model.words] == [
        ("easy", 2, str(easy)),
        ("other", 1, str(card)),
    ]
    assert model.words[0].sha256 == file_sha256(easy)
    taught = model.encode_prompts(["a easy other"])
    assert not torch.equal(taught, plain)
    model.learn([tmp_path])
    assert torch.equal(model.encode_prompts(["a easy other"]), taught)
    model.learn([])
    assert torch.equal(model.encode_prompts(["a easy other"]), plain)


def test_a_loaded_model_makes_pictures_that_note_their_words(tiny_ckpt, tmp_path):
    easy = LAYOUTS["kohya"](tmp_path, "easy", made_up(2, WIDTH))
    model = sd.load(tiny_ckpt)
    model.learn([easy])
    with_it, without = (model.txt2img(prompt, width=64, height=64, steps=1, seed=1)[0].info for prompt in ("easy", "a"))
    digest = file_sha256(easy)
    assert f'TI hashes: "easy: {digest[:12]}"' in with_it["parameters"]
    assert json.loads(with_it["sd"])["embeddings"] == [{"name": "easy", "sha256": digest}]
    assert "TI hashes" not in without["parameters"]
    assert "embeddings" not in json.loads(without["sd"])


def test_of_a_folder_words_for_other_families_stay_out(model, tmp_path):
    LAYOUTS["kohya"](tmp_path, "easy", made_up(2, WIDTH))
    LAYOUTS["kohya"](tmp_path, "for-xl", made_up(2, 1280))
    model.learn([tmp_path])
    assert [word.name for word in model.words] == ["easy"]


def test_files_that_cannot_be_used_are_refused_and_nothing_changes(model, tmp_path):
    other = LAYOUTS["kohya"](tmp_path, "other", made_up(2, 1024))
    both = "is for Stable Diffusion 2 (vectors of 1024 numbers); this model is sd-v1 (64 numbers)"
    refused(other, WeightMismatchError, f"other.safetensors {both}", read=lambda path: model.learn([path]))
    refused(tmp_path / "none.pt", UnsupportedFileError, "none.pt does not exist", read=lambda path: model.learn([path]))
    (tmp_path / "other.safetensors").write_bytes(other.read_bytes()[:-1])
    refused(other, CorruptFileError, "other.safetensors ", read=lambda path: model.learn([path]))
    assert model.words == ()
    assert model.tokenizer == Tokenizer()


def test_the_plain_runner_reads_no_files(model):
    model.runner = Runner()
    with pytest.raises(SettingError, match=r"embeddings need a model from sd\.load"):
        model.learn(["easy.pt"])


def test_one_path_is_no_list(model):
    with pytest.raises(SettingError, match=r"embeddings must be a list of paths; got 'easy\.pt'"):
        model.learn("easy.pt")


def test_words_stay_while_a_picture_is_made(model, tmp_path):
    path = LAYOUTS["kohya"](tmp_path, "easy", made_up(2, WIDTH))
    steps = model.sample([settings(steps=2)])
    next(steps)
    with pytest.raises(RuntimeError, match="words cannot change while a picture is being made"):
        model.learn([path])
    for _ in steps:
        assert model.words == ()
    model.learn([path])
    assert len(model.words) == 1


def adapter_with(words, path):
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{module}.lora_down.weight": torch.ones(4, 320), f"{module}.lora_up.weight": torch.ones(320, 4)}
    save_file(lora | {f"bundle_emb.{name}": vectors for name, vectors in words.items()}, path)
    return path


def test_words_of_adapters_come_and_go_with_them(model, tmp_path):
    model.learn([LAYOUTS["kohya"](tmp_path, "easy", made_up(2, WIDTH))])
    vectors = made_up(3, WIDTH, 1)
    path = adapter_with({"mine.string_to_param.*": vectors}, tmp_path / "lora.safetensors")
    with open_adapter(path) as file:
        words = bundled_words(file, read_adapter(file, SD_V1).words, TINY)
    teach_bundled(model, words)
    assert [word.name for word in model.words] == ["easy", "mine"]
    assert torch.equal(torch.from_numpy(model.words[1].vectors), vectors)
    model.learn([])
    assert [word.name for word in model.words] == ["mine"]
    teach_bundled(model, [])
    assert model.words == ()


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"precision": "bf16"}], ids=str)
def test_words_and_adapters_work_together_and_come_off_to_the_bit(options, tiny_ckpt, tmp_path):
    easy = LAYOUTS["kohya"](tmp_path, "easy", made_up(2, WIDTH))
    words = {"bundle_emb.mine.emb_params": made_up(1, WIDTH, 3)}
    path = lora(tmp_path / "lora.safetensors", lora_shapes(), extra=words)
    model = sd.load(tiny_ckpt, device="cpu", **options)
    contexts = {}
    for step in ("none", "learn", "learn apply", "apply", "apply learn", "apply", "none"):
        model.learn([easy] if "learn" in step else [])
        model.apply([path] if "apply" in step else [])
        now = model.encode_prompts(["a easy cat, mine"])
        assert torch.equal(contexts.setdefault(frozenset(step.split()), now), now)
    assert len({context.sum().item() for context in contexts.values()}) == 4


def test_words_of_an_adapter_for_another_family_are_refused(tmp_path):
    path = adapter_with({"mine.emb_params": made_up(1, 1024)}, tmp_path / "lora.safetensors")

    def read(path):
        with open_adapter(path) as file:
            return bundled_words(file, read_adapter(file, SD_V1).words, SD_V1)

    refused(path, WeightMismatchError, "lora.safetensors brings the word mine, which is for Stable", read=read)
