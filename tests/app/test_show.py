"""`sd show`: the settings in pictures, as text and as JSON."""

import json

import pytest
from conftest import refused
from PIL import Image
from PIL.PngImagePlugin import PngInfo


@pytest.fixture
def picture(tmp_path):
    def write(name, **texts):
        info = PngInfo()
        for key, text in texts.items():
            info.add_text(key, text)
        Image.new("RGB", (8, 8)).save(tmp_path / name, pnginfo=info)
        return name

    return write


TEXT = "a cat,\n\x1b[31mred\nNegative prompt: dog\nSteps: 2, Sampler: Euler, CFG scale: 4, Seed: 0, Size: 64x64, "
TEXT += "VAE: x.pt, Model: v1-5, Model hash: 6ce0161689, RNG: CPU, Version: v1.10.1"


def test_settings_are_shown_as_text(run, picture):
    code, out, err = run("show", picture("a.png", parameters=TEXT))
    assert (code, err) == (0, "")
    assert out == [
        "program:             AUTOMATIC1111's web UI",
        "prompt:              a cat, \\x1b[31mred",
        "negative prompt:     dog",
        "steps:               2",
        "sampler:             euler",
        "schedule:            normal",
        "guidance scale:      4",
        "seed:                0",
        "width:               64",
        "height:              64",
        "rng:                 cpu",
        "model:               v1-5",
        "model's sha256:      6ce0161689",
        "not usable here:     VAE: x.pt",
    ]


def test_settings_are_shown_as_json_with_all_texts_on_request(run, picture):
    code, (line,), _ = run("show", "--json", "--raw", picture("a.png", parameters=TEXT))
    data = json.loads(line)
    assert code == 0
    assert (data["path"], data["program"], data["negative_prompt"]) == ("a.png", "AUTOMATIC1111's web UI", "dog")
    assert (data["settings"]["seed"], data["model"]["sha256"], data["unused"]) == (0, "6ce0161689", ["VAE: x.pt"])
    assert data["texts"] == {"parameters": TEXT}
    assert run("show", "--raw", "a.png")[1][-5:-2] == ["[parameters]", "a cat,", "\\x1b[31mred"]


def test_a_picture_of_ours_says_all_that_it_was_made_with(run, tiny_ckpt):
    _, (path,), _ = run(
        "txt2img", "a (red:1.2) cat", "-m", tiny_ckpt, "-W", 64, "-H", 64, "--steps", 1, "-s", 5, "-g", 1
    )
    names = [line.split(":")[0] for line in run("show", path)[1]]
    assert names[:8] == ["program", "prompt", "steps", "sampler", "schedule", "guidance scale", "seed", "width"]
    assert names[8:] == ["height", "model", "model's sha256"]  # nothing of settings that have their usual values
    code, (line,), _ = run("show", path, "--json")
    data = json.loads(line)
    assert (code, data["program"], data["prompt"], data["unused"]) == (0, "sd-zoo", "a (red:1.2) cat", [])
    assert (data["settings"]["seed"], data["model"]["name"], len(data["model"]["sha256"])) == (5, "tiny", 64)


def test_several_pictures_and_those_without_settings(run, picture, tmp_path):
    names = [picture("a.png", parameters=TEXT), picture("none.png"), picture("b.png", Comment="holiday in Rome")]
    code, out, err = run("show", *names)
    assert (code, out[0], len(out)) == (1, "a.png:", 15)
    assert "sd: none.png has no settings that can be read. Pictures lose them when" in err
    assert "sd: b.png has no settings that can be read: its text 'holiday in Rome' has no line such as" in err
    (tmp_path / "x.txt").write_text("x")
    code, out, err = run("show", "x.txt", "absent.png", "a.png", "none.png", "--json")
    assert (code, [json.loads(line)["path"] for line in out]) == (2, ["a.png", "none.png"])
    assert "x.txt is not a picture" in err
    assert "absent.png does not exist" in err
    refused(run("show"), "PICTURE must be given")


def test_a_prompt_that_cannot_be_made_is_shown(run, picture):
    code, out, _ = run("show", picture("a.png", parameters="a (cat:99)\nSteps: 2, Sampler: Euler, Seed: 9"))
    assert (code, out[1]) == (0, "prompt:              a (cat:99)")
