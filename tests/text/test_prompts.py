"""How prompts are read. Expected values were worked out by hand from the rules in docs/prompts.md."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd.text.prompt_syntax import PromptError, first_steps, read_weights, second_pass_text, text_at, timeline

SYNTAX = "()[]:|\\"
ANY_TEXT = st.text(st.one_of(st.sampled_from(SYNTAX + " .,019ab-+e\n"), st.characters(codec="utf-8")), max_size=60)


def pieces(text):
    """The pieces of a text with one section, weights to nine digits."""
    (section,) = read_weights(text)
    return [(piece, round(weight, 9)) for piece, weight in section]


DOWN = round(1 / 1.1, 9)
PIECES = {
    "brackets weight what they hold": {
        "": [],
        "a horse, at dusk": [("a horse, at dusk", 1)],
        "a (red) horse": [("a ", 1), ("red", 1.1), (" horse", 1)],
        "[a]": [("a", DOWN)],
        "(a:1.3)": [("a", 1.3)],
        "(a:.5)(b:2.)(c:3)": [("a", 0.5), ("b", 2), ("c", 3)],
        "(a: 1.3 )": [("a", 1.3)],
        "(a:-0.5)(b:+2)(c:0)": [("a", -0.5), ("b", 2), ("c", 0)],
        "((a))": [("a", 1.21)],
        "(a (b:1.5) c:2)": [("a ", 2), ("b", 3), (" c", 2)],
        "([a])": [("a", 1)],
        "(a)(b)": [("ab", 1.1)],
        "(un)believable": [("un", 1.1), ("believable", 1)],
        "()": [],
        "(a [b) c]": [("a ", 1.1), ("b", 1), (" c", DOWN)],  # the two kinds of brackets do not see each other
        "(a:10)(b:-10)": [("a", 10), ("b", -10)],
    },
    "a backslash turns syntax into text": {
        r"\(a\) \[b\]": [("(a) [b]", 1)],
        r"(a \(b\):1.5)": [("a (b)", 1.5)],
        r"(a\:1.5)": [("a:1.5", 1.1)],
        r"a\\b \| c": [("a\\b | c", 1)],
        r"\o/ C:\dir": [(r"\o/ C:\dir", 1)],  # before any other character a backslash is text
        "a\\": [("a\\", 1)],
    },
    "what is no syntax is text and never an error": {
        "a: b :c": [("a: b :c", 1)],
        "16:9": [("16:9", 1)],
        "a :1.2)": [("a :1.2)", 1)],
        "a) b]": [("a) b]", 1)],
        "smile :)": [("smile :)", 1)],
        "a (b": [("a ", 1), ("b", 1.1)],  # reaches to the end
        "a [b (c": [("a ", 1), ("b ", DOWN), ("c", 1)],
        "(a:b)": [("a:b", 1.1)],
        "(a:1.2.3)": [("a:1.2.3", 1.1)],
        "(a:1e2)": [("a:1e2", 1.1)],
        "[a:1.3)": [("a:1.3)", DOWN)],
        "a | b": [("a | b", 1)],
    },
}


@pytest.mark.parametrize("rule", PIECES)
def test_pieces_and_weights(rule):
    assert {prompt: pieces(prompt) for prompt in PIECES[rule]} == PIECES[rule]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [["a "], [" b"]]),
        ("a BREAK", [["a "], []]),
        ("BREAK BREAK a", [[], [" "], [" a"]]),
        ("a BREAKs, break, Break aBREAK", [["a BREAKs, break, Break aBREAK"]]),
    ],
)
def test_break_divides_a_prompt_into_sections(prompt, expected):
    assert [[piece.text for piece in section] for section in read_weights(prompt)] == expected


def test_break_may_stand_in_brackets():
    sections = read_weights("(a BREAK b:1.5) c")
    assert [[tuple(piece) for piece in section] for section in sections] == [
        [("a ", 1.5)],
        [(" b", 1.5), (" c", 1.0)],
    ]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a (horse:11)", "gives 'horse' the weight 11; weights are -10 to 10."),
        ("(a:-10.5)", "gives 'a' the weight -10.5"),
        ("((a:5):5)", "gives 'a' the weight 25"),
        ("(a:inf)", "gives 'a' the weight inf"),
        ("(a:-nan)", "gives 'a' the weight nan"),
        (f"(a:{'9' * 400})", "gives 'a' the weight inf"),
        (f"((a:0):{'9' * 400})", "gives 'a' the weight nan"),
        ("(" * 25 + "a", "gives 'a' the weight 10.8347"),  # 1.1 to the 25th
    ],
)
def test_an_absurd_weight_is_refused_and_named(prompt, said):
    with pytest.raises(PromptError) as caught:
        read_weights(prompt)
    assert said in str(caught.value)


@given(st.text(st.characters(codec="utf-8", exclude_characters=SYNTAX), max_size=80))
def test_text_without_syntax_is_one_piece_of_weight_one(text):
    if "BREAK" not in text:
        assert read_weights(text) == (((text, 1.0),) if text else (),)
        assert timeline(text, 3) == (text,) * 3


@given(ANY_TEXT)
def test_any_text_is_read_and_nothing_is_added_to_it(text):
    try:
        sections = read_weights(text)
    except PromptError:
        return
    left = iter(text)
    for section in sections:
        for piece, weight in section:
            assert abs(weight) <= 10
            assert all(character in left for character in piece)  # in this order, each once


WORDS = st.text("abc ,.é", min_size=1, max_size=4)


def weighted_trees(inner):
    some = st.lists(inner, min_size=1, max_size=3)
    number = st.sampled_from(["0.5", "1.25", ".8", "-1"])
    return st.one_of(st.tuples(st.just("()"), some), st.tuples(st.just("[]"), some), st.tuples(number, some))


def written(tree):
    """A tree as a prompt."""
    if isinstance(tree, str):
        return tree
    kind, children = tree
    text = "".join(map(written, children))
    return kind[0] + text + kind[1] if kind in ("()", "[]") else f"({text}:{kind})"


def leaves(tree, weight=1.0):
    """The words of a tree, each with its weight."""
    if isinstance(tree, str):
        return [(character, weight) for character in tree]
    kind, children = tree
    factor = {"()": 1.1, "[]": 1 / 1.1}.get(kind) or float(kind)
    return [leaf for child in children for leaf in leaves(child, weight * factor)]


@given(st.recursive(WORDS, weighted_trees, max_leaves=12))
def test_nested_brackets_multiply(tree):
    (section,) = read_weights(written(tree))
    expected = leaves(tree)
    assert "".join(piece.text for piece in section) == "".join(character for character, _ in expected)
    found = [weight for piece in section for weight in [piece.weight] * len(piece.text)]
    assert found == pytest.approx([weight for _, weight in expected])


def runs(prompt, steps=10):
    """Each text of a prompt, by the last step, counted from 1, that has it."""
    found = {}
    last = None
    for step, text in enumerate(timeline(prompt, steps), 1):
        if text == last:
            found.pop(step - 1)
        found[step] = last = text
    return found


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a horse", {10: "a horse"}),
        ("a [cat:dog:3] b", {3: "a cat b", 10: "a dog b"}),
        ("a [dog:3]", {3: "a ", 10: "a dog"}),
        ("a [dog: 3 ]", {3: "a ", 10: "a dog"}),
        ("a [cat::3]", {3: "a cat", 10: "a "}),
        ("a[b:[c:d:2]:1]e", {1: "abe", 2: "ace", 10: "ade"}),
        ("[[a:b:2]:c:5]", {2: "a", 5: "b", 10: "c"}),
        ("[(a:1.3):[b]:4]", {4: "(a:1.3)", 10: "[b]"}),
        ("([a:b:4]:1.3)", {4: "(a:1.3)", 10: "(b:1.3)"}),
        ("[a:b:4], [c:0.6]", {4: "a, ", 6: "b, ", 10: "b, c"}),
        (r"[a\:b:c\|d:4]", {4: r"a\:b", 10: r"c\|d"}),
        ("[ a : b :4]", {4: " a ", 10: " b "}),
        ("[a:b:0]", {10: "b"}),
        ("[a:b:-2]", {10: "b"}),
        ("[a:b:11]", {10: "a"}),
        ("[a:b:1e999]", {10: "a"}),
    ],
)
def test_edits_change_the_prompt_after_their_step(prompt, expected):
    assert runs(prompt) == expected


def test_a_number_with_a_point_or_below_one_is_a_share_of_the_steps():
    for number, steps, expected in [
        *(("0.5", 10, 5), ("5e-1", 10, 5), (".25", 30, 7), ("0.04", 20, 0)),  # whole steps: 7.5 is 7
        *(("1.0", 10, 10), ("1.5", 10, 10), ("1e999", 10, 10), ("-1.e999", 10, 0)),
        *(("1", 10, 1), ("3", 10, 3), ("30", 10, 10), ("-3", 10, 0)),  # no point: steps
    ]:
        assert first_steps(number, steps) == expected, number


@pytest.mark.parametrize(
    ("prompt", "expected"),  # after 20 steps, before 10; counts go on, and shares of the second pass are 1 to 2
    [
        ("a [b:.5] c", "a b c"),
        ("a [b:1.5] c", "a [:b:5] c"),
        ("[a:b:0.5] [c:d:1.0] [e:f:1.09] [g:h:1.9]", "b d f [g:h:9]"),
        ("[a:b:12] [c:d:20] [e:f:21] [g:h:40]", "b d [e:f:1] [g:h:10]"),
        ("[a:b:2.5] [c:d:1e999]", "[a:b:10] [c:d:10]"),
        ("[a::0.5] [b::25]", " [b::5]"),
        ("[[a:b:0.5]:[c:d:1.3]:1.5]", "[b:[c:d:3]:5]"),
        ("([a:b:22]:1.3) [c] [d|e] [f:g]", "([a:b:2]:1.3) [c] [d|e] [f:g]"),
        ("[a:b:0] [c:d:-1]", "b d"),
    ],
)
def test_a_second_pass_goes_on_counting(prompt, expected):
    assert second_pass_text(prompt, 20, 10) == expected


@given(ANY_TEXT, st.integers(1, 12), st.integers(1, 12))
def test_any_text_has_a_second_pass(text, steps, second):
    assert len(timeline(second_pass_text(text, steps, second), second)) == second


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("[a|b]", ["a", "b", "a", "b", "a"]),
        ("[a|b|c] d", ["a d", "b d", "c d", "a d", "b d"]),
        ("[fe|]male", ["female", "male", "female", "male", "female"]),
        ("[(a:1.2)|[b]]", ["(a:1.2)", "[b]", "(a:1.2)", "[b]", "(a:1.2)"]),
        ("[[a|b]:c:3]", ["a", "b", "a", "c", "c"]),
        ("[[a:b:2]|c]", ["a", "c", "b", "c", "b"]),
        ("([a|b]:1.2)", ["(a:1.2)", "(b:1.2)", "(a:1.2)", "(b:1.2)", "(a:1.2)"]),
    ],
)
def test_alternatives_take_turns(prompt, expected):
    assert list(timeline(prompt, 5)) == expected


def test_square_brackets_of_another_form_are_left_to_the_weights():
    for prompt in [
        *("[a]", "[a:b]", "[a:b:c:0.5]", "[a:b:c]", "[a:b|c:0.5]", "[a:nan]", "[a:inf]", "[a:b:(0.5)]", "a | b : 0.5"),
        *("(a|b)", "(a:b:0.5)", r"\[a:b:0.5]", r"[a:b:0.5\]", r"[a\:0.5]", "[a:b:0.5", "a:b:0.5]", "[a:(b:0.5]"),
        "[a:b):0.5]",
    ]:
        assert timeline(prompt, 4) == (prompt,) * 4


def test_unbalanced_brackets_do_not_hide_others():
    assert runs("((a][:b:c [d:3]") == {3: "((a][:b:c ", 10: "((a][:b:c d"}
    assert runs("a [b [c:d:3]") == {3: "a [b c", 10: "a [b d"}


@given(ANY_TEXT, st.integers(1, 12))
def test_any_text_gives_a_prompt_at_every_step(text, steps):
    texts = timeline(text, steps)
    assert len(texts) == steps
    for step, now in enumerate(texts):
        assert now == text_at(text, step, steps)
        left = iter(text)
        assert all(character in left for character in now)
    assert timeline(text, steps, plain=True) == (text,) * steps


def test_deep_and_long_prompts_are_read():
    deep = "[" * 5000 + "a" + ":1]" * 5000
    assert timeline(deep, 2) == ("", "a")
    assert pieces("[" * 5000 + "a" + "]" * 5000) == [("a", 0)]  # to nine digits
    assert pieces("a, " * 20_000) == [("a, " * 20_000, 1)]
    digits = "9" * 50_000  # quadratic time would be minutes
    assert timeline(f"[a:b:{digits}]", 2) == ("a", "a")
    assert pieces(f"a:{digits}") == [(f"a:{digits}", 1)]
