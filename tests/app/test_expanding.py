"""Choices in prompts: what they become, one by one or drawn, and what is refused."""

import hashlib
from collections import Counter
from math import comb

import pytest

from sd.app.errors import UsageError
from sd.app.jobs.expanding import Expansion
from sd.app.jobs.prompt_choices import Wildcards, all_of, draws, number_of, one_of, parse
from sd.app.jobs.request import Line


@pytest.fixture
def wildcards(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "colour.txt").write_text("# a comment\nred\n\nblue\n")
    (tmp_path / "big" / "cat-like.txt").write_text("lion\n{tame|wild} __colour__ tiger\n")
    (tmp_path / "round.txt").write_text("a __trip__\n")
    (tmp_path / "trip.txt").write_text("__round__\n")
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    return Wildcards(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a cat", ["a cat"]),
        ("", [""]),
        ("a {red|blue} cat", ["a red cat", "a blue cat"]),
        ("{a|b} {c|d}", ["a c", "a d", "b c", "b d"]),
        ("{a|{b|c} d}", ["a", "b d", "c d"]),
        ("a{| very big} cat", ["a cat", "a very big cat"]),
        ("{one}", ["one"]),
        ("{2$$a|b|c}", ["a, b", "a, c", "b, c"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b"]),
        ("{0-1$$a|b}", ["", "a", "b"]),
        ("{2$$$$a|b}", ["ab"]),
        ("{3::a|.5::b}", ["a", "b"]),
        ("{2$$a|{b|c}}", ["a, b", "a, c"]),
        (r"\{a|b\}", ["{a|b}"]),
        (r"{a\|b|\}}", ["a|b", "}"]),
        (r"a \(b\) \\{c|d}", [r"a \(b\) \\c", r"a \(b\) \\d"]),
        ("(a:{1.1|1.2}), [b|c]", ["(a:1.1), [b|c]", "(a:1.2), [b|c]"]),
        ("__colour__", ["red", "blue"]),
        ("a__colour__b__colour__", ["aredbred", "aredbblue", "abluebred", "abluebblue"]),
        ("{__colour__|green}", ["red", "blue", "green"]),
        ("__big/cat-like__", ["lion", "tame red tiger", "tame blue tiger", "wild red tiger", "wild blue tiger"]),
        ("{2$$__colour__}", ["red, blue"]),
        (r"\__colour__", ["__colour__"]),
        ("two__ __", ["two__ __"]),
    ],
)
def test_a_prompt_becomes_every_text_in_order(wildcards, prompt, texts):
    parts = parse(prompt, wildcards)
    assert list(all_of(parts)) == texts
    assert number_of(parts) == len(texts)
    assert all(letters(one_of(parts, draws(i))) in map(letters, texts) for i in range(40))


def letters(text):
    """What is drawn may be joined in another order."""
    return sorted(text)


def test_without_a_folder_underlines_are_text():
    assert list(all_of(parse("__init__ {a|b}", Wildcards()))) == ["__init__ a", "__init__ b"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a {b|c", "a { is opened and not closed"),
        ("a {b|{c}", "a { is opened and not closed"),
        ("a } b", r"a } closes nothing. Write \} for the character itself."),
        ("{3$$a|b}", "{3$$a|b} cannot take 3 of 2."),
        ("{2-1$$a|b|c}", "{2-1$$a|b|c} cannot take 2-1 of 3."),
        ("__color__", "__color__: color.txt does not exist. Did you mean colour?"),
        ("__round__", "__round__ contains itself, by way of round, trip."),
        ("__empty__", "empty.txt has no lines."),
    ],
)
def test_what_cannot_be_expanded_is_refused(wildcards, prompt, said):
    with pytest.raises(UsageError) as refusal:
        list(Expansion("all", wildcards=wildcards).lines_of(Line({"prompt": prompt}, "jobs.txt, line 3: "), 0))
    assert str(refusal.value).startswith("jobs.txt, line 3: ")
    assert said in str(refusal.value)


def test_combinations_are_counted_without_making_them():
    forty = "{20$$" + "|".join(map(str, range(40))) + "}"
    assert number_of(parse(forty, Wildcards())) == comb(40, 20)
    assert Expansion("all").number_of(
        [Line({"prompt": forty}), Line({"prompt": "{a|b}", "negative_prompt": "{c|d}"})]
    ) == (comb(40, 20) + 4)


def test_all_prompts_of_a_line_and_of_the_run_are_expanded():
    expansion = Expansion("all", shared={"negative_prompt": "{x|y}", "steps": 4})
    made = [line.settings for line in expansion.lines_of(Line({"prompt": "{a|b}", "seed": 7}), 0)]
    assert made == [{"prompt": p, "negative_prompt": n, "seed": 7} for p in "ab" for n in "xy"]


def test_what_is_drawn_follows_from_seed_line_and_picture():
    line = Line({"prompt": "{a|b|c|d|e|f}"})
    drawn = [each.settings["prompt"] for each in Expansion("random", 5, count=8).lines_of(line, 3)]
    assert drawn == [each.settings["prompt"] for each in Expansion("random", 5, count=9).lines_of(line, 3)][:8]
    digests = [hashlib.sha256(f"5/3/{i}/0".encode()).hexdigest() for i in range(8)]
    assert drawn == ["abcdef"[int(digest, 16) * 6 >> 256] for digest in digests]
    for other in (Expansion("random", 6, count=8), Expansion("random", 5, count=8)):
        assert drawn != [each.settings["prompt"] for each in other.lines_of(line, 4)]


def test_weights_and_numbers_of_options_are_drawn_as_often_as_they_say():
    parts = parse("{3::a|b|0::c} {1-2$$d|e}", Wildcards())
    drawn = Counter(one_of(parts, draws(i)) for i in range(2000))
    share = {letter: sum(n for text, n in drawn.items() if text[0] == letter) / 2000 for letter in "abc"}
    assert abs(share["a"] - 0.75) < 0.04  # four standard deviations
    assert share["c"] == 0
    assert abs(sum(n for text, n in drawn.items() if "," in text) / 2000 - 0.5) < 0.045


@pytest.mark.parametrize(
    ("own", "expected"),
    [({"seed": 5}, {"seed": 7}), ({"vary": 0.5, "seed": 5, "vary_seed": 9}, {"seed": 5, "vary_seed": 11}), ({}, {})],
)
def test_seeds_of_a_line_count_on_from_picture_to_picture(own, expected):
    *_, last = Expansion("random", count=3).lines_of(Line({"prompt": "a", **own}), 0)
    assert {name: value for name, value in last.settings.items() if "seed" in name} == expected
