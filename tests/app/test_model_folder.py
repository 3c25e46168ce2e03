"""Models are found by name in the user's folders, and the model of a picture by its hash."""

import hashlib
import os
import re
from pathlib import Path

import pytest
from conftest import refused
from PIL import Image
from safetensors.torch import save_file

from sd.app.cli import main
from sd.app.errors import UsageError
from sd.app.jobs.model_folder import difference, find, find_again, folders, models_in
from sd.files import embedded_model

SMALL = ["-W", "64", "-H", "64", "--steps", "1", "-s", "1"]


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A models folder, and another place to work in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("SD_MODELS", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("Linux", {}, "HOME/.local/share/sd-zoo/models"),
        ("Linux", {"XDG_DATA_HOME": "/data"}, "/data/sd-zoo/models"),
        ("Linux", {"XDG_DATA_HOME": "relative"}, "HOME/.local/share/sd-zoo/models"),
        ("Darwin", {}, "HOME/Library/Application Support/sd-zoo/models"),
        ("Windows", {"LOCALAPPDATA": "/local"}, "/local/sd-zoo/models"),
        ("Linux", {"SD_MODELS": f"/a{os.pathsep}{os.pathsep}~/b"}, "/a HOME/b"),
    ],
)
def test_the_folder_is_where_each_system_keeps_such_things(monkeypatch, tmp_path, system, variables, expected):
    for name in ("XDG_DATA_HOME", "LOCALAPPDATA", "SD_MODELS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sd.app.jobs.model_folder.platform.system", lambda: system)
    assert " ".join(map(str, folders())) == expected.replace("HOME", str(tmp_path))


def test_without_a_home_there_is_no_folder(monkeypatch):
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path("relative"))
    assert folders() == folders("vae") == []


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("v1-5-pruned.safetensors", "v1-5-pruned.safetensors"),
        ("V1-5-Pruned", "v1-5-pruned.safetensors"),
        ("v1-5", "v1-5-pruned.safetensors"),
        ("anime", "sub/Anime.v2.ckpt"),
        ("sub/anime.v2", "sub/Anime.v2.ckpt"),
        ("sub/Anime.v2.ckpt", "sub/Anime.v2.ckpt"),
        ("anime.v2", "sub/Anime.v2.ckpt"),
        ("dreams", "dreams"),  # a diffusers folder
        ("models--org--x", "models--org--x"),  # of the hub's cache
        ("unet", None),  # part of a model
        ("detail", None),  # a LoRA
        ("notes", None),
        ("linked", "linked.ckpt"),
    ],
)
def test_a_model_is_found_by_name(home, given, found):
    put(home, "v1-5-pruned.safetensors", "sub/Anime.v2.ckpt", "notes.txt", "loras/detail.safetensors", ".hidden.ckpt")
    put(home, "dreams/model_index.json", "dreams/unet/x.safetensors", "models--org--x/snapshots/1/model_index.json")
    put(home, "models--org--x/refs/main")
    (home / "linked.ckpt").symlink_to(home / "notes.txt")
    (home / "sub" / "round").symlink_to(home)
    if found:
        assert find(Path(given)) == home / found
    else:
        with pytest.raises(UsageError, match="does not exist, and no file of that name is in"):
            find(Path(given))


def test_an_exact_name_wins_over_a_part_of_one(home):
    put(home, "base.ckpt", "base-fine.ckpt")
    assert find(Path("base")).name == "base.ckpt"


def test_an_existing_path_always_wins(home):
    put(home, "x.ckpt", "y.ckpt")
    put(Path(), "x.ckpt")
    Path("y").symlink_to("nowhere")
    assert find(Path("x.ckpt")) == Path("x.ckpt")
    assert find(Path("x")) == home / "x.ckpt"
    assert find(Path("y")) == Path("y")


def test_the_first_of_several_folders_wins(home, tmp_path, monkeypatch):
    monkeypatch.setenv("SD_MODELS", os.pathsep.join([str(home), str(tmp_path / "more"), str(tmp_path / "missing")]))
    put(home, "a.ckpt")
    put(tmp_path / "more", "a.ckpt", "b.ckpt")
    assert (find(Path("a")), find(Path("b"))) == (home / "a.ckpt", tmp_path / "more" / "b.ckpt")


@pytest.mark.parametrize("place", ["vae", "../vae"])
def test_other_kinds_are_in_the_folder_or_beside_it(home, place):
    put(home / place, "ft-mse.safetensors")
    assert find(Path("ft-mse"), "vae").samefile(home / place / "ft-mse.safetensors")
    with pytest.raises(UsageError):
        find(Path("ft-mse"), "loras")


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("dream", ["dream could be dream-a.ckpt or dream-b.ckpt. Give more of the name."]),
        ("same", ["same could be same.ckpt or same.safetensors"]),
        ("many", ["many-0.ckpt or many-1.ckpt", "many-4.ckpt or 3 others"]),
        ("draem-a", ["does not exist, and no file of that name is in", "Did you mean dream-a.ckpt"]),
        ("v1-5-pruned-emaonly", ["is not here. Download it with: sd models get v1-5-pruned-emaonly.safetensors"]),
        ("no/sd-v1-4.ckpt", ["is not here. Download it with: sd models get sd-v1-4.ckpt"]),
        ("v1-5", ["v1-5 is not here. Published ones of that name: v1-5-", "sd models get NAME"]),
        ("zzz/qqq.ckpt", ["does not exist", "Check the path."]),
    ],
)
@pytest.mark.parametrize("command", [("txt2img", "a"), ("arch",), ("bench",)])
def test_a_name_that_is_none_or_several_gets_a_sentence(run, home, command, given, parts):
    put(home, "dream-a.ckpt", "dream-b.ckpt", "same.ckpt", "same.safetensors", *(f"many-{i}.ckpt" for i in range(8)))
    refused(run(*command, "-m", given), *parts)


def test_a_picture_is_made_with_a_model_by_its_name(run, home, tiny_ckpt):
    (home / "tiny-fine.ckpt").symlink_to(tiny_ckpt)
    code, _, err = run("txt2img", "a", "-m", "tiny", *SMALL)
    assert code == 0
    assert "tiny-fine.ckpt: sd-v1" in err


def test_models_in_a_folder_tell_what_else_is_there(home):
    put(home, "b.CKPT", "a.safetensors", "readme.md", "config.json")
    (home / "config.json").unlink()
    others = []
    assert [path.name for path in models_in(home, others.append)] == ["a.safetensors", "b.CKPT"]
    assert [path.name for path in others] == ["readme.md"]
    assert list(models_in(home / "missing", others.append)) == []
    assert others[-1] == home / "missing"


# The model that a picture was made with


@pytest.fixture
def library(home):
    put(home, "one.ckpt", "two.ckpt", "three.ckpt")
    large = home / "large.ckpt"
    large.write_bytes(bytes(1 << 20) + b"old")
    return home


def sha256(text):
    return hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    ("made", "found", "read"),
    [
        ({"sha256": sha256(b"two.ckpt")}, "two.ckpt", None),
        ({"sha256": sha256(b"two.ckpt")[:10], "name": "two"}, "two.ckpt", ["two.ckpt"]),
        ({"sha256": sha256(b"two.ckpt")[:10].upper(), "name": "renamed"}, "two.ckpt", None),
        ({"hash": sha256(b"old")[:8], "name": "renamed"}, "large.ckpt", []),
        ({"hash": "e3b0c442"}, None, []),  # of nothing: every small file had it
        ({"sha256": "0" * 10, "name": "sub\\THREE.ckpt"}, "three.ckpt", None),
        ({"name": "two.ckpt"}, "two.ckpt", []),
        ({"name": "four", "sha256": "f" * 64}, None, None),
        ({"name": ["x"], "sha256": 7, "hash": None}, None, []),
        ({}, None, []),
    ],
)
def test_the_model_of_a_picture_is_found_by_hash_then_by_name(library, made, found, read):
    told = []
    again = find_again(made, told.append)
    assert again == (found and library / found)
    if read is not None:
        names = [re.match(r"reading (\S+)", line)[1] for line in told]
        assert [name for name in names if name != embedded_model().name] == read
    if found and "0" * 10 not in made.values():
        assert difference(made, again, lambda: sha256(again.read_bytes())) is None


def test_a_hash_is_computed_once(library, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = []
    for _ in range(2):
        find_again({"sha256": "f" * 64}, told.append)
    assert len(told) == 5  # four and the embedded one


def test_no_more_is_read_than_a_user_waits_for(library, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sd.app.jobs.model_folder.MOST_READ", 15)
    told = []
    assert find_again({"name": "three", "sha256": "f" * 64}, told.append) == library / "three.ckpt"
    assert [line.partition(" (")[0] for line in told[:1]] == ["reading three.ckpt"]
    assert told[-1] == "no more files are read; -m NAME chooses one, and sd inspect --hash FILE reads one."
    assert len(told) == 3  # three.ckpt, one more, and that


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"name": "other", "sha256": "abcdef0123" * 6}, "made with other (abcdef0123), now using two.ckpt: expect"),
        ({"name": "other", "hash": "abcdef01"}, "made with other (abcdef01), now using two.ckpt"),
        ({"name": "other"}, "made with other, now using"),
        ({"sha256": "abcdef0123"}, "made with another model (abcdef0123), now"),
        ({"name": "\x1b[2J", "hash": "?"}, r"made with \x1b[2J (?), now"),
        ({"name": "TWO"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_another_model_is_told(library, made, told):
    said = difference(made, library / "two.ckpt", lambda: sha256(b"two.ckpt"))
    assert (said is None) if told is None else told in said


@pytest.mark.slow
def test_like_uses_the_model_of_the_picture_or_says_that_it_is_another(run, home, plain, tmp_path):
    save_file(plain, home / "mine.safetensors")
    assert run("txt2img", "a", "-m", "mine", *SMALL, "-o", "first.png")[0] == 0
    code, _, err = run("txt2img", "--like", "first.png", "-o", "again.png")
    assert (code, "first.png was made with mine: using " in err) == (0, True)
    assert Image.open("again.png").tobytes() == Image.open("first.png").tobytes()
    (home / "mine.safetensors").rename(home / "renamed.safetensors")
    code, _, err = run("txt2img", "--like", "first.png", "-o", "renamed.png")
    assert Image.open("renamed.png").tobytes() == Image.open("first.png").tobytes()
    code, _, err = run("txt2img", "--like", "first.png", "-m", embedded_model(), "-o", "other.png")
    assert "first.png was made with mine (" in err
    assert f"now using {embedded_model().name}: expect another picture" in err
    (home / "renamed.safetensors").unlink()
    code, _, err = run("txt2img", "--like", "first.png", "-o", "third.png")
    assert f"now using {embedded_model().name}: expect another picture" in err


def test_a_name_is_enough_to_inspect_and_to_convert(home, tiny_ckpt, capsys):
    os.link(tiny_ckpt, home / "fine-tune.ckpt")
    assert main(["inspect", "fine", "--scan"]) == 0
    assert main(["convert", "fine-tune", "out.safetensors", "--quiet"]) == 0
    assert "fine-tune.ckpt is safe" in capsys.readouterr().out
    assert Path("out.safetensors").exists()
