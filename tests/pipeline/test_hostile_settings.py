"""Settings that make no sense, in every field: each is accepted or refused in a sentence, in little time."""

import itertools
import json
import time
from dataclasses import fields

import pytest
from conftest import refused
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd.app.cli.like import read
from sd.app.cli.prompt_files import json_settings
from sd.app.errors import UsageError
from sd.app.jobs.plan import size_of
from sd.pipeline.errors import SettingError
from sd.pipeline.image.input_settings import Expansion, InputSettings
from sd.pipeline.image.metadata import settings_from
from sd.pipeline.settings import FIELDS, Settings

GOOD = {"prompt": "a", "width": 64, "height": 64, "seed": 1, "vary_seed": 2, "hires": None}
BIG = 10**400
NUMBERS = [BIG, -BIG, 10**5000, 2**64, 2**63, -1, 0, 1e308, -0.0, 5e-324, float("inf"), float("-inf"), float("nan")]
DEEP = json.loads("[" * 400 + "]" * 400)
VALUES = [*NUMBERS, True, False, None, "", "9" * 400, "1e999", "nan", "2x", "\0", "\udcff", "x" * 10**6, {}, {"a": 1}]
VALUES += [[], [None], ["a"], [[1]], [True], DEEP, (), b"", object(), 1j, {1}]
VALUES += [list(pair) for pair in itertools.product([BIG, 0, 1, 8, -8, float("inf"), float("nan"), "1"], repeat=2)]


def save(path, **texts):
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def refusal(make, *arguments, **options):
    """The error of a call that refuses what it is given, in a sentence; None if it accepts it."""
    try:
        made = make(*arguments, **options)
    except (SettingError, UsageError) as error:
        text = str(error)
        if len(text) > 1000 or "\n" in text or text[-1] not in ".:":
            raise AssertionError(f"no sentence: {text[:2000]}") from error
        return error
    json.dumps(str(made))
    return None


@pytest.mark.parametrize("kind", [Settings, InputSettings, Expansion])
def test_each_value_in_each_field_is_accepted_or_refused_in_a_sentence(kind):
    started = time.process_time()
    for field, value in itertools.product(fields(kind), VALUES):
        error = refusal(kind, **{**(GOOD if kind is Settings else {}), field.name: value})
        assert error is None or error.name in (field.name, "expand", "vary_seed")
    assert time.process_time() - started < 5


def test_numbers_of_hundreds_of_digits_are_named_by_their_length():
    for name, value in (("sigmas", [BIG]), ("guidance_interval", [0.3, BIG]), ("hires", BIG), ("steps", BIG)):
        with pytest.raises(SettingError, match=f"^{name} cannot be a number of about 400 digits.$"):
            Settings(**{**GOOD, name: value})
    with pytest.raises(SettingError, match="0, inf is not an interval"):
        Settings(**GOOD, guidance_interval=(0, float("inf")))


@pytest.mark.parametrize("name", FIELDS)
def test_a_json_line_and_a_pictures_own_text_never_end_otherwise(name):
    for value in VALUES:
        try:
            line = json.dumps({"prompt": "a", **{name: value}})
        except (TypeError, ValueError):
            continue
        refusal(lambda line=line: size_of(json_settings("jobs, line 1: ", line, {}), 64))
        settings_from({**GOOD, name: value})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "sigmas": {}}', "line 1: sigmas cannot be an object in braces."),
        ('{"prompt": "a", "seed": %s}' % ("9" * 5000), "line 1: no setting can be a number of 5000 digits."),
        ('{"prompt": "a", "sigmas": %s}' % ("[" * 5000), "line 1: not a JSON object"),
    ],
)
def test_json_lines_are_refused_with_their_number(line, said):
    with pytest.raises(UsageError, match=f"^jobs, {said}"):
        json_settings("jobs, line 1: ", line, {})


@pytest.mark.parametrize("unit", ["a, ", "(", "[", "[a|b]", "[a:b:1]", ":", "\\", "[a:", "((a))"])
def test_a_prompt_is_read_in_little_time_or_refused(unit):
    started = time.process_time()
    for length, steps in ((20_000, 30), (10**6, 30), (10**5, 1000)):
        refusal(Settings, **{**GOOD, "prompt": unit * (length // len(unit)), "steps": steps, "sampler": "euler"})
    assert time.process_time() - started < 5


def test_the_longest_prompts():
    with pytest.raises(SettingError, match=r"prompt has 100,001 characters; at most 100,000 are read."):
        Settings(**{**GOOD, "prompt": "a" * 100_001})
    with pytest.raises(
        SettingError, match=r"may change at each of 1000 steps; at most 5,000 are read at so many steps."
    ):
        Settings(**{**GOOD, "prompt": "[a]" * 2000, "steps": 1000})


EXACT = {"prompt": "a", "width": 64, "height": 64, "seed": 1, "steps": 1, "guidance_scale": 1, "strength": 1.0}
HOSTILE = {
    "expand": [5, [], {}, "left", "left=x", True],
    "mask_blur": [1e999, "a", [1]],
    "mask_threshold": [2**70, 1.5, None],
    "resize_mode": [1, "x", []],
    "init": [5, {"name": [1]}, {}],
    "model": [5, [], {"weights": []}, {"sha256": 5, "name": {}}],
    "run": [1, {"compile": []}],
    "device": [[], {}],
    "precision": [[], {"unet": []}],
    "guidance_interval": [[0, 1e999]],
    "unheard": [DEEP[0][0], "\0"],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pictures_own_text_with_wrong_types_is_read_and_they_are_left_out(tmp_path, name):
    for value in HOSTILE[name]:
        save(tmp_path / "like.png", sd=json.dumps({**EXACT, name: value}), parameters="a\nSteps: 2, Seed: 5, Size: 8x8")
        found, _ = read(tmp_path / "like.png")
        settings, unused = found.settings, found.unused
        assert settings["seed"] == (5 if name in FIELDS else 1)
        assert name not in settings
        if name in ("expand", "mask_blur", "mask_threshold", "resize_mode"):
            assert any(text.startswith(name.replace("_", " ")) for text in unused)


def test_such_a_picture_is_made_again_without_them(run, tiny_ckpt, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    save(tmp_path / "like.png", sd=json.dumps({**EXACT, **{name: values[0] for name, values in HOSTILE.items()}}))
    arguments = ["--init", "in.png", "--mask", "in.png", "-m", tiny_ckpt, "--steps", 1, "-W", 64, "-H", 64]
    refused(run("inpaint", "--like", "like.png", *arguments), "has no settings that can be read")
    without = {name: values[0] for name, values in HOSTILE.items() if name not in FIELDS}
    save(tmp_path / "like.png", sd=json.dumps({**EXACT, **without}))
    code, _, err = run("inpaint", "--like", "like.png", *arguments)
    assert code == 0
    assert (
        "like.png: could not use unheard; resize mode 1; mask threshold 1180591620717411303424; mask blur inf; expa"
        in err
    )
