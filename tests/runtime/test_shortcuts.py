"""Reusing features and merging tokens as settings of a picture: on the command line and in files."""

import json

import pytest
from conftest import refused, settings, settings_of
from PIL import Image

from sd.pipeline.settings import Settings

SHORTCUTS = [
    ("reuse_features", 1, 2, ", Reuse features: 2, "),
    ("merge_tokens", 0, 0.5, ", Token merging ratio: 0.5, "),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "off", "value", "text"), SHORTCUTS)
def test_a_shortcut_is_stored_read_back_and_may_stand_in_a_line(run, tiny_ckpt, tmp_path, name, off, value, text):
    flag = name.replace("_", "-")
    common = ["-m", tiny_ckpt, "-W", 64, "-H", 64, "--steps", 2, "--seed", 5]
    _, (first,), _ = run("txt2img", "a cat", *common, f"--{flag}", value)
    assert settings_of(first)[name] == value
    assert text in Image.open(first).text["parameters"]
    _, (again,), err = run("txt2img", "--like", first, "-m", tiny_ckpt)
    assert "could not use" not in err
    assert Image.open(again).tobytes() == Image.open(first).tobytes()
    lines = [json.dumps({"prompt": "a cat", "seed": 6, **more}) for more in ({flag: value}, {})]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    _, (with_it, without), _ = run("txt2img", "--from-file", "lines.txt", *common)
    assert [settings_of(path)[name] for path in (with_it, without)] == [value, off]
    assert Image.open(with_it).tobytes() != Image.open(without).tobytes()
    assert text.split(":")[0] not in Image.open(without).text["parameters"]


@pytest.mark.parametrize(("name", "off", "value", "text"), SHORTCUTS)
def test_pictures_from_before_a_shortcut_were_made_without_it(name, off, value, text):
    stored = settings().to_dict()
    del stored[name]
    assert Settings(**stored) == settings(**{name: off})


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--reuse-features=0", "--reuse-features 0 is out of range: 1 (off"),
        ("--merge-tokens=0.76", "--merge-tokens 0.76 is out of range: 0 (off: attention sees all tokens) to 0.75 ("),
        ("--merge-tokens=half", "half"),
    ],
)
def test_values_out_of_range_are_refused_by_their_flag(run, tiny_ckpt, flag, sentence):
    refused(run("txt2img", "a", "-m", tiny_ckpt, flag), sentence)
