"""`sd arch` as a user meets it."""

import json
import zipfile

import make_checkpoint
import pytest
from conftest import TINY

import sd
from convert.errors import CorruptFileError
from sd.config import SD_V1_INPAINTING


@pytest.fixture
def arch(run):
    return lambda *arguments: run("arch", *arguments)


def nodes_of(line):
    todo, found = [*json.loads(line)["networks"]], {}
    while todo:
        node = todo.pop()
        found[node["path"]] = node
        todo += node["children"]
    return found


@pytest.mark.slow
def test_without_a_file_it_is_stable_diffusion_1_at_512_pixels(arch):
    code, lines, err = arch()
    assert (code, err) == (0, "")
    assert lines[0] == "sd-v1, 512x512 pixels, 64x64 latents, one picture"
    assert [line.split()[1] for line in lines if line.startswith("total")] == [
        *("123,060,480", "859,520,964", "83,653,863")
    ]


@pytest.mark.slow
def test_a_file_is_recognised_and_its_weights_are_not_read(arch, tiny_ckpt, tmp_path):
    damaged = bytearray(tiny_ckpt.read_bytes())
    with zipfile.ZipFile(tiny_ckpt) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    damaged[largest.header_offset + largest.file_size // 2] ^= 0xFF
    (tmp_path / "damaged.ckpt").write_bytes(damaged)
    with pytest.raises(CorruptFileError):
        sd.load(tmp_path / "damaged.ckpt")
    code, lines, _ = arch("-m", "damaged.ckpt", "--size", "128x64")
    assert code == 0
    assert lines[0] == "sd-v1, 128x64 pixels, 16x8 latents, one picture"
    (row,) = [line.split() for line in lines if line.startswith("output_blocks.5 ")]
    assert row[4:6] == ["192x2x4", "128x4x8"]  # a tenth as wide as the full-size model


@pytest.mark.slow
def test_other_families_are_shown_with_what_their_files_say(arch, tmp_path):
    state = make_checkpoint.made_up_state_dict(make_checkpoint.tiny(SD_V1_INPAINTING))
    make_checkpoint.save_original(tmp_path / "inpainting.safetensors", state)
    _, lines, _ = arch("-m", "inpainting.safetensors")
    assert lines[0].startswith("sd-v1-inpainting, 512x512 pixels")
    (row,) = [line.split() for line in lines if line.startswith("input_blocks.0 ")]
    assert row[2] == "9x64x64"


@pytest.mark.slow
def test_json_holds_everything_once(arch, tiny_ckpt):
    code, (line,), err = arch("-m", tiny_ckpt, "--json", "--size", "64x64")
    assert (code, err) == (0, "")
    told = json.loads(line)
    assert told["event"] == "architecture"
    assert told["config"] == json.loads(json.dumps(TINY.to_dict()))
    assert (told["width"], told["height"], told["measured_on"]) == (64, 64, "")
    nodes = nodes_of(line)
    weights = [weight for node in nodes.values() for weight in node["parameters"]]
    assert len({weight["name"] for weight in weights}) == len(weights) > 900
    assert nodes["unet.output_blocks.0"]["skips"] == ["unet.input_blocks.11"]
    assert all(node["milliseconds"] is None for node in nodes.values())


@pytest.mark.slow
def test_measured_times_say_what_they_were_measured_on(arch, tiny_ckpt):
    flags = ["-m", tiny_ckpt, "--size", "64x64", "--measure", "--device", "cpu", "--precision", "fp32"]
    code, (line,), err = arch(*flags, "--json")
    assert (code, err) == (0, "")
    assert json.loads(line)["measured_on"] == "cpu, fp32"
    nodes = nodes_of(line)
    assert nodes["unet"]["milliseconds"] > nodes["unet.middle_block"]["milliseconds"] > 0


@pytest.mark.slow
def test_page_is_written_and_its_path_printed(arch, tiny_ckpt, tmp_path):
    code, lines, err = arch("-m", tiny_ckpt, "--size", "64x64", "--html", "x.html", "--source-url", "../..")
    assert (code, lines, err) == (0, ["x.html"], "")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert 'href="../../sd/networks/unet.py#L' in text
    code, (line,), _ = arch("-m", tiny_ckpt, "--size", "64x64", "--html", "x.html", "--force", "--json")
    assert (code, json.loads(line)["page"]) == (0, "x.html")
    assert 'href="../../sd/networks/unet.py#L' not in (tmp_path / "x.html").read_text(encoding="utf-8")
