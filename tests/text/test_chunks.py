"""Rows of 75 tokens: positions counted by hand."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd.text.chunks import COMMA, chunks_of, empty_chunk, split
from sd.text.prompt_syntax import PromptError
from sd.text.tokenizer import END, START, Tokenizer

TOKENIZER = Tokenizer()
A, HORSE, RED = 320, 4558, 736


def chunks(text, **options):
    return chunks_of(text, TOKENIZER, **options)


def lengths(text, **options):
    return [chunk.length for chunk in chunks(text, **options)]


def test_the_ids_above_are_the_tokenizers():
    assert TOKENIZER.encode("a horse, red") == [A, HORSE, COMMA, RED]


@pytest.mark.parametrize("prompt", ["", "a horse", "A  Horse&#33; \n at dusk", "a " * 75, "灯台 🏯", "x: y, 16:9"])
@pytest.mark.parametrize("pad_token", [END, 0])
def test_a_prompt_that_fits_is_one_chunk_equal_to_the_tokenizers_row(prompt, pad_token):
    tokenizer = Tokenizer(pad_token=pad_token)
    (chunk,) = chunks_of(prompt, tokenizer)
    assert chunk.ids == tokenizer.tokenize(prompt).ids
    assert set(chunk.weights) == {1.0}
    assert chunk.length == len(tokenizer.encode(prompt))


def test_every_token_has_its_weight():
    (chunk,) = chunks("a (red:1.3) horse")
    assert chunk.ids[:5] == (START, A, RED, HORSE, END)
    assert chunk.weights == (1, 1, 1.3, 1, *[1] * 73)
    assert chunk.tokens == [(A, 1), (RED, 1.3), (HORSE, 1)]


def test_brackets_of_a_plain_prompt_are_tokens():
    (chunk,) = chunks("(red:1.3) BREAK [a]", plain=True)
    assert chunk.ids == TOKENIZER.tokenize("(red:1.3) BREAK [a]").ids
    assert set(chunk.weights) == {1.0}


def test_the_76th_token_begins_a_second_chunk_with_a_start_and_an_end_of_its_own():
    first, second = chunks("a " * 75 + "horse")
    assert first.ids == (START, *[A] * 75, END)
    assert second.ids == (START, HORSE, *[END] * 75)
    assert lengths("a " * 150) == [75, 75]
    assert lengths("a " * 151, plain=True) == [75, 75, 1]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (55, [56, 24]),  # the comma is token 56 of 75: the last 20 are 56 to 75
        (54, [75, 5]),  # token 55: too far back
        (74, [75, 5]),  # the last one: there is nothing to move
        (73, [74, 6]),
    ],
)
def test_a_chunk_ends_after_a_comma_among_its_last_20_tokens(before, expected):
    assert lengths("a " * before + "," + " a" * (79 - before)) == expected


def test_the_last_comma_that_fits_and_stands_alone_counts():
    assert lengths("a " * 60 + ", a a a, " + "a " * 30) == [65, 30]
    assert lengths("a " * 60 + "," + " a" * 14 + ", a") == [75, 2]
    assert chunks("a " * 75 + ", a")[1].ids[1:3] == (COMMA, A)
    assert lengths("a " * 60 + ",. " + "a " * 20)[0] == 75


def test_break_ends_a_chunk():
    for prompt, expected in {
        "a BREAK a a": [1, 2],
        "a BREAK BREAK a": [1, 0, 1],
        "BREAK a": [0, 1],
        "a BREAK": [1],
        "BREAK": [0],
        "BREAK BREAK": [0, 0],
        "a " * 75 + "BREAK a": [75, 1],
        "a " * 76 + "BREAK a": [75, 1, 1],
        "(a BREAK a:1.2)": [1, 1],
    }.items():
        assert lengths(prompt) == expected, prompt


def test_weights_go_with_their_tokens_into_the_next_chunk():
    _, second = chunks("a " * 70 + ", (red red red:1.5) (horse horse:0.5)")
    assert second.tokens == [(RED, 1.5)] * 3 + [(HORSE, 0.5)] * 2


def test_the_empty_chunk_is_the_chunk_of_the_empty_prompt():
    assert (empty_chunk(TOKENIZER),) == chunks("")


def test_an_absurd_weight_is_refused_unless_the_prompt_is_plain():
    with pytest.raises(PromptError):
        chunks("(a:99)")
    assert chunks("(a:99)", plain=True)[0].ids == TOKENIZER.tokenize("(a:99)").ids


@given(st.lists(st.sampled_from([COMMA, A, A, A, A, A, HORSE]), max_size=200), st.sampled_from([75, 30, 5, 1]))
def test_rows_hold_all_tokens_in_order_and_break_only_where_they_may(tokens, room):
    rows = list(split([(token, 1.0) for token in tokens], room))
    assert [token for row in rows for token, _ in row] == tokens
    for row, following in pairwise(rows):
        assert len(row) <= room
        assert following
        if len(row) < room:
            assert row[-1][0] == COMMA
            assert room - len(row) < 20
            assert all(token != COMMA for token, _ in following[: room - len(row)])
    assert len(rows[-1]) <= room
