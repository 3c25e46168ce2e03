"""Embeddings in commands: found by the words of prompts, noted in pictures, found again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import lora, lora_shapes
from conftest import TINY, refused, settings, settings_of
from embeddings import LAYOUTS, as_json, made_up, text_card
from PIL import Image
from safetensors.torch import save_file

from convert.files.hashing import file_sha256
from sd.app.errors import UsageError
from sd.app.jobs.embeddings import find_words
from sd.app.jobs.request import Events, ModelRequest
from sd.pipeline.image.stored_settings.web_ui import settings_in

WIDTH = TINY.text_encoder.width
SIZE = ("-W", 64, "-H", 64, "--steps", 1, "-s", 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder of embeddings."""
    place = tmp_path / "data" / "embeddings"
    place.mkdir(parents=True)
    (tmp_path / "data" / "models").mkdir()
    monkeypatch.setenv("SD_MODELS", str(tmp_path / "data" / "models"))
    return place


@pytest.fixture
def draw(run, tiny_ckpt, tmp_path):
    """Make one picture: its path, and what was said."""

    def draw(prompt, *arguments, name="out.png"):
        code, (path,), said = run("txt2img", prompt, "-m", tiny_ckpt, *SIZE, "-o", name, *arguments)
        assert code == 0, said
        return tmp_path / path, said

    return draw


class Said(Events):
    """What was said while words were found."""

    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


def find(*prompts, embeddings=(), like=None, bundled=(), **options):
    """The names of the words that these prompts use with the narrow model, and what was said."""
    request = ModelRequest(file=Path("tiny.ckpt"), embeddings=tuple(embeddings), like="like.png", made_with=like or {})
    said = Said()
    learned = find_words(request, [settings(prompt=prompt, **options) for prompt in prompts], TINY, said, bundled)
    return [word.name for word in learned.words], said


def pixels(path):
    with Image.open(path) as picture:
        return picture.tobytes()


def note_of(path, name=None):
    return {"embeddings": [{"name": name or path.stem, "sha256": file_sha256(path)}]}


@pytest.mark.parametrize(
    "prompt", ["a easy", "a (EASY:1.2), b", "embedding:easy", "a [b:easy:0.5]", "b BREAK easy", "[a|easy]"]
)
def test_a_word_of_the_users_folder_is_used_without_a_flag(prompt, folder):
    assert find(prompt.replace("embedding:", ""))[0] == []
    path = LAYOUTS["web ui"](folder, "easy", made_up(2, WIDTH))
    names, said = find(prompt)
    assert names == ["easy"]
    assert said.notes == [f"embedding easy: 2 vectors, from {path}"]
    assert said.warnings == []


def test_negative_prompts_second_passes_and_plain_prompts_use_words(folder):
    LAYOUTS["kohya"](folder, "easy", made_up(2, WIDTH))
    assert find("a", negative_prompt="easy")[0] == ["easy"]
    assert find("a", negative_prompt="easy", guidance_scale=1)[0] == []
    assert find("[a:easy:1.5]", hires="2")[0] == ["easy"]
    assert find("[a:easy:1.5]")[0] == []
    assert find("(easy)", plain_prompts=True)[0] == ["easy"]
    assert find("(embedding:easy)", plain_prompts=True)[0] == ["easy"]


def test_only_files_that_a_prompt_uses_are_read(folder):
    (folder / "damaged.pt").write_bytes(b"PK\3\4 damaged")
    LAYOUTS["kohya"](folder, "for-xl", made_up(1, 1280))
    names, said = find("a cat")
    assert (names, said.notes, said.warnings) == ([], [], [])
    with pytest.raises(UsageError, match=r"^the prompt's word damaged is an embedding in \S+: damaged\.pt "):
        find("a damaged cat")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_files_and_folders_may_be_given(kind, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    places = [LAYOUTS["kohya"](tmp_path / name, f"zz{name}", made_up(2, WIDTH)) for name in ("one", "two")]
    assert find("zztwo zzone", embeddings=[place.parent if kind == "folder" else place for place in places])[0] == [
        "zztwo",
        "zzone",
    ]


def test_a_card_is_used_by_the_name_inside(folder):
    text_card(folder / "file.png", as_json(made_up(1, WIDTH), "inner"))
    assert find("a inner file")[0] == ["inner"]


def test_a_file_that_no_prompt_uses_is_told(tmp_path):
    path = LAYOUTS["kohya"](tmp_path, "easy", made_up(2, WIDTH))
    names, said = find("a", embeddings=[path])
    assert (names, said.warnings) == ([], [f"no prompt uses the word easy of --embeddings {path}."])


def test_a_missing_name_is_told_with_the_nearest(folder, tmp_path):
    LAYOUTS["kohya"](folder, "easynegative", made_up(2, WIDTH))
    (near, far) = find("a embedding:easynegativ, b (embedding:qqq:1.2)")[1].warnings
    assert near.startswith(f"embedding:easynegativ does not exist: no embedding of that name is in {tmp_path}")
    assert near.endswith("It is read as ordinary words. Did you mean easynegative?")
    assert far.startswith("embedding:qqq does not exist")
    assert far.endswith("or given with --embeddings. It is read as ordinary words.")


def test_without_any_embedding_a_missing_name_is_told():
    (warning,) = find("embedding:easy")[1].warnings
    assert warning.startswith("embedding:easy does not exist")


def test_of_two_files_with_one_name_the_first_is_used_and_both_are_named(folder, tmp_path):
    mine = LAYOUTS["kohya"](tmp_path, "easy", made_up(2, WIDTH))
    theirs = LAYOUTS["web ui"](folder, "EASY", made_up(1, WIDTH))
    names, said = find("easy", embeddings=[mine])
    assert names == ["easy"]
    assert said.warnings == [f"two embeddings are called easy: {mine}, which is used, and {theirs}, which is not."]
    shutil.copy(mine, theirs)
    assert find("easy", embeddings=[mine])[1].warnings == []  # they are equal


def test_words_of_adapters_are_not_missing_and_come_after_files(folder, tmp_path):
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"lora")
    names, said = find("mine, embedding:mine", bundled=[("mine", lora)])
    assert (names, said.notes, said.warnings) == ([], [], [])
    path = LAYOUTS["kohya"](folder, "mine", made_up(2, WIDTH))
    names, said = find("mine", bundled=[("mine", lora)])
    assert names == ["mine"]
    assert said.warnings == [f"two embeddings are called mine: {path}, which is used, and {lora}, which is not."]


def test_a_word_of_a_folder_for_another_family_is_passed_over(folder):
    LAYOUTS["kohya"](folder, "easy", made_up(2, 1024))
    names, said = find("easy")
    (warning,) = said.warnings
    assert names == []
    assert "is for Stable Diffusion 2 (vectors of 1024 numbers); this model is sd-v1 (64 numbers)" in warning
    assert warning.endswith("Its name is read as ordinary words.")
    (folder / "v1").mkdir()
    LAYOUTS["kohya"](folder / "v1", "easy", made_up(1, WIDTH))
    names, said = find("easy")
    assert (names, said.warnings) == (["easy"], [])


# Refused before any weights are read


def nothing(place):
    return place / "none.pt"


def empty_folder(place):
    (place / "empty").mkdir()
    return place / "empty"


REFUSED = {
    "nothing": (nothing, "none.pt does not exist"),
    "empty folder": (empty_folder, "empty holds no embeddings"),
    "other family": (lambda place: LAYOUTS["kohya"](place, "easy", made_up(2, 1024)), "is for Stable Diffusion 2"),
    "nan": (lambda place: LAYOUTS["kohya"](place, "easy", torch.full((1, WIDTH), torch.nan)), "NaN or infinite"),
    "many": (lambda place: LAYOUTS["kohya"](place, "easy", made_up(76, WIDTH)), "has 76 vectors"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("prompt", ["easy", "a"])
def test_what_cannot_be_used_is_refused(name, prompt, run, tiny_ckpt, tmp_path):
    make, said = REFUSED[name]
    refused(run("txt2img", prompt, "-m", tiny_ckpt, *SIZE, "--embeddings", make(tmp_path)), said)
    assert not (tmp_path / "outputs").exists()


# Pictures


def test_like_uses_the_file_with_the_hash_whatever_it_is_called(folder):
    path = LAYOUTS["kohya"](folder, "easy", made_up(2, WIDTH))
    noted = note_of(path)
    renamed = path.rename(folder / "renamed.safetensors")
    assert find("a easy", like=noted)[1].notes == [f"embedding easy: 2 vectors, from {renamed}"]
    other = LAYOUTS["kohya"](folder, "easy", made_up(1, WIDTH, 5))
    assert find("a easy", like=noted)[1].notes == [f"embedding easy: 2 vectors, from {renamed}"]
    assert find("a easy", like=note_of(other))[1].notes == [f"embedding easy: 1 vector, from {other}"]


def test_like_says_what_is_gone_or_has_changed(folder):
    path = LAYOUTS["kohya"](folder, "easy", made_up(2, WIDTH))
    noted = note_of(path)
    assert find("easy", like=noted)[1].warnings == []
    LAYOUTS["kohya"](folder, "easy", made_up(2, WIDTH, 7))
    (warning,) = find("easy", like=noted)[1].warnings
    assert warning.startswith("like.png was made with another embedding easy (")
    assert warning.endswith("expect another picture")
    path.unlink()
    (warning,) = find("easy", like=noted)[1].warnings
    assert warning.startswith("like.png was made with the embedding easy, which is not in your folders of embeddings")
    assert find("a b", like=noted)[1].warnings == []


@pytest.mark.parametrize(
    "noted", [None, {}, "x", [1], [{}], [{"name": 1}], [{"name": " "}], [{"name": "easy", "sha256": 1}]], ids=str
)
def test_odd_notes_in_a_picture_are_passed_over(noted, folder):
    LAYOUTS["kohya"](folder, "easy", made_up(2, WIDTH))
    names, said = find("easy", like={"embeddings": noted})
    assert (names, said.warnings) == (["easy"], [])


@pytest.mark.slow
def test_a_picture_notes_its_words_and_like_makes_it_again(folder, draw, run):
    path = LAYOUTS["kohya"](folder, "easy", made_up(2, WIDTH))
    digest = file_sha256(path)
    first, said = draw("a easy", "--embeddings", "easy", name="first.png")
    assert f"sd: embedding easy: 2 vectors, from {path}" in said
    assert settings_of(first)["embeddings"] == [{"name": "easy", "sha256": digest}]
    with Image.open(first) as picture:
        assert f'TI hashes: "easy: {digest[:12]}"' in picture.text["parameters"]
    assert f"embeddings:          easy ({digest[:12]})" in run("show", first)[1]
    assert json.loads(run("show", first, "--json")[1][0])["embeddings"] == [{"name": "easy", "sha256": digest}]
    path.rename(folder / "renamed.safetensors")
    again, said = draw("a easy", "--like", first, name="again.png")
    assert "could not use" not in said
    assert pixels(again) == pixels(first)
    other, _ = draw("a easy", name="other.png")
    assert pixels(other) != pixels(first)
    assert "embeddings" not in settings_of(other)


def test_what_the_web_ui_notes_is_read():
    line = "Steps: 1, Sampler: Euler, Size: 64x64"
    found = settings_in(f'a easy\n{line}, TI hashes: "easy: C74B4E810B03, a, b: 1a2b3c4d5e6f", Version: v1.10.1')
    assert found.unused == []
    noted = found.made_with["embeddings"]
    assert noted[0] == {"name": "easy", "sha256": "c74b4e810b03"}
    assert noted[-1]["sha256"] == "1a2b3c4d5e6f"
    assert "embeddings" not in settings_in(f"a\n{line}, TI hashes: ").made_with
    found = settings_in(f'a\n{line}, Hashes: {{"embed:easy": "C74B4E810B", "lora:x": "1", "model": "6ce0161689"}}')
    assert found.made_with["embeddings"] == [{"name": "easy", "sha256": "c74b4e810b"}]
    for odd in ("[1]", "1", '{"embed:easy": [1]}', "[" * 50_000):
        settings_in(f"a\n{line}, Hashes: {odd}")


@pytest.mark.slow
def test_a_resumed_run_makes_pictures_again_whose_words_have_changed(folder, run, tiny_ckpt, tmp_path):
    (tmp_path / "prompts.txt").write_text("a easy\na cat\n")
    command = ("txt2img", "--from-file", "prompts.txt", "-m", tiny_ckpt, *SIZE)
    LAYOUTS["kohya"](folder, "easy", made_up(2, WIDTH))
    _, paths, _ = run(*command)
    assert [[word["name"] for word in settings_of(path).get("embeddings", [])] for path in paths] == [["easy"], []]
    assert run(*command)[1] == []
    LAYOUTS["kohya"](folder, "easy", made_up(2, WIDTH, 3))
    assert len(run(*command)[1]) == 1


@pytest.mark.slow
def test_a_word_that_comes_with_an_adapter_is_used_while_it_is_applied(draw, tmp_path):
    path = lora(tmp_path / "lora.safetensors", lora_shapes(), extra={"bundle_emb.zzword.emb_params": made_up(2, WIDTH)})
    with_it, said = draw("a zzword, embedding:zzword", "--lora", path, name="with.png")
    assert "does not exist" not in said
    spelled, _ = draw("a zzother, zzother", "--lora", path, name="other.png")
    assert pixels(with_it) != pixels(spelled)
    assert "embeddings" not in settings_of(with_it)
    assert "two embeddings" not in said


def test_lines_of_a_file_share_their_embeddings(run, tiny_ckpt, tmp_path):
    (tmp_path / "prompts.txt").write_text('--prompt "a" --embeddings x.pt\n')
    refused(run("txt2img", "--from-file", "prompts.txt", "-m", tiny_ckpt), "Give --embeddings to the command.")


# Other commands


def test_tokens_shows_words_with_their_places(folder, run):
    LAYOUTS["web ui"](folder, "easy", made_up(3, WIDTH))
    assert run("tokens", "a (easy:1.2) cat")[:2] == (
        0,
        [
            "chunk 1 of 1: 5 tokens of 75",
            "  a    easy       cat",
            "  320  3 vectors  2368",
            "       x1.2",
        ],
    )
    code, (line,), _ = run("tokens", "a easy", "--json")
    tokens = json.loads(line)["texts"][0]["chunks"][0]["tokens"]
    assert code == 0
    assert tokens[0] == {"id": 320, "text": "a ", "weight": 1.0}
    places = [(each["embedding"], each["vector"], each["vectors"]) for each in tokens[1:]]
    assert places == [("easy", 1, 3), ("easy", 2, 3), ("easy", 3, 3)]


def test_tokens_takes_words_of_any_family_and_says_what_is_missing(run, tmp_path):
    path = LAYOUTS["kohya"](tmp_path, "easy", made_up(75, 1280))
    assert run("tokens", "a easy", "--embeddings", path)[1][5] == "  75 vectors"
    assert "embedding:hard does not exist" in run("tokens", "embedding:hard")[2]
    refused(run("tokens", "a", "--embeddings", tmp_path / "none.pt"), "none.pt does not exist")


def test_inspect_says_how_a_word_is_used(run, tmp_path):
    path = LAYOUTS["original"](tmp_path, "easy", made_up(3, 768))
    code, lines, _ = run("inspect", path)
    digest = file_sha256(path)
    told = {line[2:13].strip(): line[15:] for line in lines[1:]}
    assert code == 0
    assert told["holds"] == "textual inversion"
    assert told["usable"] == "with a Stable Diffusion 1 model: easy in a prompt, --embeddings easy.pt"
    assert told["word"] == "easy: 3 vectors of 768 numbers"
    assert told["trained"] == "500 steps on base"
    assert told["in pictures"] == f"TI hashes: easy: {digest[:12]}"


def test_inspect_reads_cards_and_says_what_is_wrong_with_others(run, tmp_path):
    text_card(tmp_path / "card.png", as_json(made_up(2, 768), "inner"))
    assert "  word         inner: 2 vectors of 768 numbers" in run("inspect", tmp_path / "card.png")[1]
    odd = LAYOUTS["kohya"](tmp_path, "odd", made_up(1, 40))
    assert "  usable       no: vectors of 40 numbers fit no known text encoder" in run("inspect", odd)[1]
    bad = LAYOUTS["kohya"](tmp_path, "bad", torch.full((1, 768), torch.nan))
    said = "  usable       no: the file holds numbers that are NaN"
    assert any(line.startswith(said) for line in run("inspect", bad)[1])
    save_file({"clip_l": made_up(2, 768), "clip_g": made_up(2, 1280)}, tmp_path / "xl.safetensors")
    code, lines, _ = run("inspect", tmp_path / "card.png", tmp_path / "xl.safetensors")
    assert code == 0
    assert "sdxl" in lines[2]
    assert '"widths": [768, 1280]' in run("inspect", tmp_path / "xl.safetensors", "--json")[1][0]


def test_explain_shows_words_and_the_embedded_model_knows_them(run, tmp_path):
    path = LAYOUTS["kohya"](tmp_path, "my-zz", made_up(1, WIDTH))
    command = ("explain", "a red circle, my-zz, embedding:my-zz", "--embeddings", path, *SIZE, "--no-attention")
    code, (page,), said = run(*command, "-o", "page.html")
    assert code == 0
    assert "my-zz" in (tmp_path / page).read_text()
    assert "does not know" not in said
