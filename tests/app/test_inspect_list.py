"""`sd inspect` of several files and of folders: a line each, whatever the files are."""

import json
import os
from pathlib import Path

import hostile
import pytest
import torch
from safetensors.torch import save_file

from convert.actions.convert import convert


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_state, tiny_ckpt):
    """A folder of models of all kinds, another file, and what is broken."""
    models = tmp_path_factory.mktemp("things") / "models"
    (models / "sub").mkdir(parents=True)
    (models / "tiny.ckpt").hardlink_to(tiny_ckpt)
    convert(tiny_ckpt, models / "folder", layout="diffusers")
    convert(tiny_ckpt, models / "half.safetensors", precision="fp16")
    vae = {name: value for name, value in tiny_state.items() if name.startswith("first_stage_model.")}
    save_file(vae, models / "sub" / "vae.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(8, 64)}, models / "sub" / "lora.safetensors")
    torch.save({"x": hostile.touch(models.parent / "marker")}, models / "evil.ckpt")
    (models / "cut.ckpt").write_bytes(tiny_ckpt.read_bytes()[:5000])
    (models / "empty.pt").write_bytes(b"")
    (models / "gone.ckpt").symlink_to("nowhere")
    (models / "notes.txt").write_text("")
    return models


@pytest.fixture
def things(made, monkeypatch, call):  # `call` changes the folder, too
    monkeypatch.chdir(made.parent)
    return made


def cells(out):
    """The table as a dictionary: file -> kind, family, precision, size, use."""
    header, *lines = out.splitlines()
    starts = [header.index(word) for word in ("file", "kind", "family", "pixels", "precision")]
    found = {}
    for line in lines:
        name, kind, family, pixels, rest = (
            line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)
        )  # fmt: skip
        found[name] = (kind, family, rest.split("  ")[0], rest.rpartition("  ")[2])
        assert pixels == ("512" if family == "sd-v1" else "-")
    return found


@pytest.mark.slow
def test_every_model_of_a_folder_has_a_line(call, things):
    code, out, err = call("inspect", "models")
    found = cells(out)
    assert (code, list(found)) == (2, [
        "cut.ckpt", "empty.pt", "evil.ckpt", "gone.ckpt", "half.safetensors", "tiny.ckpt", "folder",
        "sub/lora.safetensors", "sub/vae.safetensors",
    ])  # fmt: skip
    model = ("Stable Diffusion 1", "sd-v1", "float32", "txt2img, img2img, inpaint")
    assert found["tiny.ckpt"] == found["folder"] == model
    assert found["half.safetensors"][2] == "float16"
    assert found["sub/vae.safetensors"][3] == "--vae, sd convert --only vae"
    assert found["sub/lora.safetensors"][3].startswith("no: is an adapter, but its one tensor does not")
    assert found["evil.ckpt"][0] == "DANGEROUS"
    assert ".system" in found["evil.ckpt"][3]
    assert found["cut.ckpt"][0] == found["empty.pt"][0] == found["gone.ckpt"][0] == "unreadable"
    assert "is empty" in found["empty.pt"][3]
    assert "models: 1 other file passed over: notes.txt" in err
    assert "3 of 9 files could not be read." in err
    assert not (things.parent / "marker").exists()


@pytest.mark.slow
def test_several_files_have_a_line_each_in_their_order(call, things):
    names = ["models/sub/lora.safetensors", "models/tiny.ckpt", "models/folder"]
    code, out, err = call("inspect", *names)
    assert (code, list(cells(out)), err) == (0, names, "")
    assert list(cells(call("inspect", "models/tiny.ckpt", "models/sub")[1])) == [
        "models/tiny.ckpt", "models/sub/lora.safetensors", "models/sub/vae.safetensors",
    ]  # fmt: skip


def test_one_file_and_one_diffusers_folder_have_their_page(call, things):
    for name in ("models/tiny.ckpt", "models/folder"):
        code, out, _ = call("inspect", name)
        assert (code, out.splitlines()[0]) == (0, Path(name).name)
        assert "networks" in out


def test_a_folder_without_models_says_what_it_is_not(call, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("")
    code, out, err = call("inspect", "docs")
    assert (code, out) == (2, "")
    assert "docs" in err


def test_json_is_an_object_a_line(call, things):
    code, out, _ = call("inspect", "--json", "models")
    rows = {Path(row["path"]).name: row for row in map(json.loads, out.splitlines())}
    assert (code, len(rows)) == (2, 9)
    assert rows["tiny.ckpt"]["family"] == "sd-v1"
    assert "is empty" in rows["empty.pt"]["error"]
    assert not rows["evil.ckpt"]["safe"]


def test_scan_of_several_is_an_alarm_if_any_is(call, things):
    code, out, _ = call("inspect", "--scan", "models")
    assert code == 1
    assert ".system" in out
    assert "models/empty.pt could not be scanned: it is empty" in out
    assert "models/evil.ckpt is DANGEROUS: it names code that does not belong in a checkpoint" in out
    assert "models/tiny.ckpt is safe" in out
    assert call("inspect", "--scan", "models/tiny.ckpt", "models/cut.ckpt")[0] == 2  # not called safe
    code, out, _ = call("inspect", "--scan", "--json", "models/tiny.ckpt", "models/sub", "models/cut.ckpt")
    assert (code, [json.loads(line)["safe"] for line in out.splitlines()]) == (2, [True, True, True, None])
    assert call("inspect", "--scan", "models/tiny.ckpt", "models/sub")[0] == 0


@pytest.mark.parametrize("flag", ["--keys", "--hash", "--deep", "--tensors-hash"])
def test_flags_that_ask_for_more_give_a_page_each(call, things, flag):
    code, out, _ = call("inspect", flag, "models/sub", "models/empty.pt")
    assert code == 2
    titles = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert [title for title in titles if title.endswith(".safetensors")] == ["lora.safetensors", "vae.safetensors"]
    assert "models/empty.pt is empty" in out


def test_a_folder_that_cannot_be_read_is_a_line(call, things, monkeypatch):
    scan = os.scandir

    def forbidden(path):
        if str(path).endswith("models/sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", forbidden)
    monkeypatch.setattr("os.listdir", lambda path: [entry.name for entry in forbidden(path)])
    code, out, _ = call("inspect", "models/sub", "models/tiny.ckpt")
    assert (code, cells(out)["models/sub"][0], cells(out)["models/tiny.ckpt"][1]) == (2, "unreadable", "sd-v1")


def test_a_pipe_among_them_is_not_waited_for(call, tmp_path):
    os.mkfifo(tmp_path / "x.ckpt")
    (tmp_path / "y.ckpt").write_bytes(b"")
    code, out, _ = call("inspect", "x.ckpt", "y.ckpt")
    assert code == 2
    assert "pipe" in out
