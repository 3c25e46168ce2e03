"""The web UI's text, taken apart: every form of value that it and its extensions write, and texts made to be slow."""

import itertools
import time

import pytest

from sd.pipeline.image.stored_settings.settings_line import parts_of
from sd.pipeline.image.stored_settings.web_ui import settings_in

START = "a cat\nSteps: 20, Sampler: Euler, Seed: 1"


def values(line):
    return parts_of(f"a cat\nSteps: 20, Sampler: Euler, {line}").values


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('"a, b: c"', "a, b: c"),
        (r'"a \"quoted\" word, \u732b"', 'a "quoted" word, 猫'),
        ('"two\nlines, and: a colon"', "two\nlines, and: a colon"),
        (r'"two\nlines"', "two\nlines"),
        ('"Steps: 5, Sampler: DDIM, Seed: 9"', "Steps: 5, Sampler: DDIM, Seed: 9"),
        ('"x\nSteps: 5, Sampler: DDIM, Seed: 9"', "x\nSteps: 5, Sampler: DDIM, Seed: 9"),
        (r'"C:\dir, x"', r"C:\dir, x"),
        ("[a, Size: 64x64, Seed: 5]", "[a, Size: 64x64, Seed: 5]"),
        ('[{"type": "lora", "x": [1, 2]}, {"]": "}"}]', '[{"type": "lora", "x": [1, 2]}, {"]": "}"}]'),
        ("{'a': 1, 'Seed': 5}", "{'a': 1, 'Seed': 5}"),
        ('{\n  "a": 1,\n  "Seed": 5\n}', '{\n  "a": 1,\n  "Seed": 5\n}'),
        ("[v1] mix", "[v1] mix"),
        ('"broken', '"broken'),
        ("[broken", "[broken"),
        ("a]b", "a]b"),
        ('"a" and b', '"a" and b'),
        ("5:4", "5:4"),
        ("", ""),
    ],
)
def test_a_value_ends_where_it_does_and_the_next_one_is_read(written, value):
    expected = {"Steps": "20", "Sampler": "Euler", "X": value, "Size": "8x8"}
    assert values(f"X: {written}, Size: 8x8") == expected


def test_prompts_may_have_several_lines():
    text = "a (red:1.2) horse, 35mm: sharp\nat dusk\nNegative prompt: blurry\ntext\nSteps: 20, Sampler: Euler, Seed: 1"
    assert parts_of(text)[:2] == ("a (red:1.2) horse, 35mm: sharp\nat dusk", "blurry\ntext")
    assert parts_of(text.replace("\n", "\r\n")) == parts_of(text)


@pytest.mark.parametrize("text", ["a cat", "only a prompt: this, that: one", "Steps: 5", "Steps: 5, Seed: 1", "", "\n"])
def test_without_a_line_of_settings_there_are_none(text):
    assert parts_of(text).values == {}
    assert settings_in(text) is None


@pytest.mark.parametrize(
    ("text", "unused"),
    [
        (f"{START}, Seed: 5", ["Seed: 5 (a second value)"]),
        (f"{START}, Seed: 1", []),
        (f"{START}, Model: a, b.ckpt", ["b.ckpt"]),
        (f"{START},, ,", []),
        (
            f"{START}\nTemplate: a {{red|blue}} cat\nNegative Template: x",
            ["Template: a {red|blue} cat", "Negative Template: x"],
        ),
        (f"{START}, Wildcard: a\nb, Clip skip: 2", ["b, Clip skip: 2", "Wildcard: a"]),
        (START + "\nx" * 9, ["x", "x", "x", "6 more lines behind the settings"]),
        (
            f"{START}, Refiner: xl [1], Hires CFG Scale: 7, Token merging ratio: x",
            ["Refiner: xl [1]", "Hires CFG Scale: 7", "Token merging ratio: x"],
        ),
        (f'{START}, TI hashes: "a: b, c: d", Lora hashes: "e: f"', ["LoRA e (f), whose strength is not noted"]),
    ],
)
def test_nothing_vanishes_unnamed(text, unused):
    found = settings_in(text)
    assert (found.settings["prompt"], found.settings["seed"]) == ("a cat", 1)
    assert sorted(found.unused) == sorted(unused)


def test_the_last_line_of_settings_counts_that_is_not_inside_a_value():
    pasted = "Steps: 5, Sampler: DDIM, Seed: 9"
    found = parts_of(f"a cat\n{pasted}\nNegative prompt: x\nSteps: 20, Sampler: Euler, Seed: 1")
    assert (found.prompt, found.values["Seed"]) == (f"a cat\n{pasted}", "1")
    assert parts_of(f'{START}, Hires prompt: "x\n{pasted}"').values["Seed"] == "1"


UNITS = [
    ', a: {"b":',
    ', a: "b',
    ", a: [",
    ', a: "\\"',
    'a: {"b":{"c":[',
    '"',
    "\\",
    ",",
    'Steps: 1, a: "',
    "Steps:",
    "\n",
    "[]",
]
UNITS += [
    " ",
    "\t",
    " :",
    ", x ",
    'a: "b" ',
    '\nSteps: 1, b: 2, c: "',
    "\nSteps: 1, b: 2, c: [",
    '{"',
    ', a: ["',
    "Negative prompt:\n",
    ', a: {} x ["',
    "a" * 59 + ":",
]


@pytest.mark.parametrize("unit", UNITS)
def test_time_grows_with_the_length_of_the_text_only(unit):
    """A megabyte takes a second or two; where time grows with the square of it, hours."""
    started = time.process_time()
    for before, behind in itertools.product(("", START + ", "), ("", '"]}')):
        parts_of(before + unit * (60_000 // len(unit)) + behind)
    assert time.process_time() - started < 2
