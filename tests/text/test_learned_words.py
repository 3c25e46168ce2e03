"""Which words a prompt triggers, by hand as the web UI does it; and that their vectors reach the context."""

import copy
import pickle
from itertools import groupby

import numpy as np
import pytest
import torch
from conftest import TINY, assemble, fill, final, pixels, settings
from embeddings import made_up, of_web_ui
from hypothesis import given
from hypothesis import strategies as st
from oracles import diffusers_pipeline, relative_error

from sd.pipeline.learning import teach
from sd.pipeline.runner import Runner
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.text.chunks import COMMA, LOOK_BACK, chunks_of
from sd.text.learned_words import LearnedTokenizer, LearnedWord, missing_words, words_used
from sd.text.tokenizer import END, START, Tokenizer

PLAIN = Tokenizer()
A, CAT, BY = PLAIN.encode("a cat by")
WIDTH = TINY.text_encoder.width


def word(name, count=1, seed=0):
    return LearnedWord(name=name, vectors=made_up(count, WIDTH, seed).numpy())


def knowing(*words):
    return LearnedTokenizer(words=words)


EASY, HARD = word("Easy", 2), word("hard-one", 3, 1)
TOKENIZER = knowing(EASY, HARD, word("hard"))
FIRST = 49408  # easy has this id and the next one, hard-one the three that follow, hard the sixth


# What triggers a word


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a cat by easy", [A, CAT, BY, FIRST, FIRST + 1]),
        ("EASY a", [FIRST, FIRST + 1, A]),
        ("a easy, a", [A, FIRST, FIRST + 1, COMMA, A]),
        ("easy easy", [FIRST, FIRST + 1] * 2),
        ("hard-one", [FIRST + 2, FIRST + 3, FIRST + 4]),  # the longest of hard and hard-one
        ("Hard - One", [FIRST + 2, FIRST + 3, FIRST + 4]),  # the same ids
        ("hard a", [FIRST + 5, A]),
        ("hard one", [FIRST + 5, *PLAIN.encode("one")]),
        ("easygoing", PLAIN.encode("easygoing")),
        ("a cat", [A, CAT]),
        ("", []),
    ],
)
def test_a_word_is_recognised_by_the_ids_of_its_name(text, ids):
    assert TOKENIZER.encode(text) == ids


@pytest.mark.parametrize(
    "text",
    [
        *("embedding:easy", "embedding:EASY", "EMBEDDING:Easy", "embedding:easy.pt", "embedding:easy.safetensors"),
        *("embedding:styles/easy", "embedding:a/b/Easy.PT", "embedding:styles\\easy"),
    ],
)
def test_comfy_uis_form_is_the_same_word(text):
    for before, after in (("", ""), ("a ", " a"), ("a\n", "\na"), ("a, ", ", a"), ("a,", ". a")):
        ids = [*PLAIN.encode(before), FIRST, FIRST + 1, *PLAIN.encode(after)]
        assert TOKENIZER.encode(before + text + after) == ids


def test_the_longest_name_is_meant():
    assert TOKENIZER.encode("embedding:hard-one.pt") == [FIRST + 2, FIRST + 3, FIRST + 4]
    assert TOKENIZER.encode("embedding:hard") == [FIRST + 5]


@pytest.mark.parametrize("text", ["embedding:easier", "embedding:easy-2", "embedding:easy.xyz", "embedding:none"])
def test_a_name_that_is_missing_is_told_and_read_as_text(text):
    assert missing_words([f"a {text}, b"], TOKENIZER) == (text.removeprefix("embedding:"),)
    assert missing_words([f"a {text}, b"], PLAIN) == (text.removeprefix("embedding:"),)
    assert FIRST not in TOKENIZER.encode(f"a {text.replace('easy', 'eazy')}")


@pytest.mark.parametrize(
    "text", ["(embedding:none:1.2)", "[embedding:none:0.5]", "(embedding\\:none)", "embedding:none."]
)
def test_a_missing_name_is_told_without_what_is_around_it(text):
    assert missing_words([text], TOKENIZER) == ("none",)


def test_nothing_is_missing_where_all_names_are_known():
    texts = ["embedding:easy, (embedding:hard.pt:1.2)", "embedding : easy", "an embedding: yes", "(embedding:1.5)"]
    assert missing_words(texts, TOKENIZER) == ()
    assert missing_words(["reembedding:none"], TOKENIZER) == ()


def test_of_two_words_with_one_name_the_first_is_known():
    tokenizer = knowing(word("Twin", 1), word("twin", 2))
    assert tokenizer.encode("twin embedding:TWIN") == [FIRST, FIRST]


@pytest.mark.parametrize(
    "name", ["<cat-toy>", "灯台", "a b c", "x" * 200, "007", "it's", "Ünïcödé", "(brackets)", "a.b+c"]
)
def test_names_of_any_kind_trigger(name):
    tokenizer = knowing(word("other", 2), word(name))
    assert tokenizer.encode(f"a {name} a") == [A, FIRST + 2, A]
    assert tokenizer.encode(f"a embedding:{name} a") == [A, FIRST + 2, A]


@pytest.mark.parametrize("name", ["<cat>", "cat!", "(cat"])
def test_a_name_that_ends_in_a_mark_may_touch_another(name):
    (comma,) = PLAIN.encode(",")
    assert knowing(word(name)).encode(f"a, {name}, a") == [A, comma, FIRST, comma, A]
    assert knowing(word(name)).encode(f"a {name.upper()}. a")[1] == FIRST
    assert FIRST not in knowing(word("cat!")).encode("a bobcat! a")


def test_a_name_without_tokens_never_triggers():
    assert knowing(word(" ")).encode("a  a") == [A, A]


def test_letters_that_only_a_pattern_finds_equal_are_text():
    assert knowing(word("easy")).encode("embedding:eaſy") == PLAIN.encode("embedding:eaſy")


def test_words_used_are_listed_once_in_their_order():
    texts = ["hard (easy:1.2)", "easy BREAK hard-one"]
    assert [each.name for each in words_used(texts, TOKENIZER)] == ["hard", "Easy", "hard-one"]
    assert words_used(texts, PLAIN) == ()
    assert words_used(["(easy)"], TOKENIZER, plain=True) == (EASY,)


@pytest.mark.parametrize("count", [0, 76])
def test_a_word_without_vectors_or_with_too_many_is_refused(count):
    with pytest.raises(ValueError, match="a word has 1 to 75 vectors, 'easy' has"):
        knowing(word("easy", count))


# Chunks


def lengths(text, tokenizer=TOKENIZER):
    return [chunk.length for chunk in chunks_of(text, tokenizer)]


def test_weights_hold_for_all_places_of_a_word():
    (chunk,) = chunks_of("a (easy:1.3) a", TOKENIZER)
    assert chunk.ids[:6] == (START, A, FIRST, FIRST + 1, A, END)
    assert chunk.weights[:6] == (1, 1, 1.3, 1.3, 1, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a " * 73 + "easy", [75]),
        ("a " * 74 + "easy", [74, 2]),  # two places do not fit into one
        ("a " * 75 + "easy", [75, 2]),
        ("a " * 60 + ", " + "a " * 13 + "easy", [74, 2]),  # the comma counts only where a chunk is full
        ("a " * 60 + ", " + "a " * 14 + "easy", [61, 16]),
        ("a " * 74 + ", easy", [75, 2]),
        ("a " * 72 + "hard-one a", [75, 1]),
        ("a " * 73 + "hard-one", [73, 3]),
        ("easy " * 38, [74, 2]),
    ],
)
def test_a_word_that_does_not_fit_begins_the_next_chunk(text, expected):
    assert lengths(text) == expected


def test_a_word_may_fill_a_chunk():
    tokenizer = knowing(word("whole", 75))
    assert lengths("whole", tokenizer) == [75]
    assert lengths("a whole a", tokenizer) == [1, 75, 1]


def filled_one_by_one(units, room):
    """The web UI's way: tokens are added one at a time; a word of several is added whole."""
    rows, row, comma = [], [], None
    for unit in units:
        if unit == [COMMA]:
            comma = len(row)
        elif len(row) == room and comma is not None and room - comma <= LOOK_BACK:
            rows.append(row[: comma + 1])
            row, comma = row[comma + 1 :], None
        if len(row) + len(unit) > room:
            rows.append(row)
            row, comma = [], None
        row = row + unit
    return [*rows, row]


UNITS = st.sampled_from([[A], [A], [COMMA], [FIRST, FIRST + 1], [FIRST + 2, FIRST + 3, FIRST + 4]])


@given(st.lists(UNITS, min_size=60, max_size=260))
def test_chunks_are_those_of_filling_token_by_token(units):
    units = [unit for unit, group in groupby(units) for _ in group if unit != [COMMA]] + [[COMMA]]
    names = {A: "a", COMMA: ",", FIRST: "easy", FIRST + 2: "hard-one"}
    text = " ".join(names[unit[0]] for unit in units)
    rows = [[token for token, _ in chunk.tokens] for chunk in chunks_of(text, TOKENIZER)]
    assert rows == filled_one_by_one(units, 75)


def test_the_end_token_stays_behind_the_words():
    (chunk,) = chunks_of("a easy", TOKENIZER)
    assert chunk.ids.index(END) == 4
    assert chunk.ids[4:] == (END,) * 73


# The tokenizer's other calls


def test_a_cut_prompt_loses_whole_words():
    tokenized = TOKENIZER.tokenize("a " * 73 + "hard-one lighthouse")
    assert tokenized.ids == (START, *[A] * 73, END, END, END)
    assert (tokenized.cut, tokenized.cut_tokens, tokenized.length) == ("hard-one lighthouse", 4, 75)
    assert TOKENIZER.tokenize("a easy").cut == ""


@pytest.mark.parametrize("prompt", ["", "a cat", "a " * 90, "Hokusai " * 40, "灯台 🏯" * 30])
def test_without_learned_words_in_it_a_prompt_is_read_as_before(prompt):
    assert TOKENIZER.tokenize(prompt) == PLAIN.tokenize(prompt)
    assert TOKENIZER.pieces(prompt) == PLAIN.pieces(prompt)
    assert chunks_of(prompt, TOKENIZER) == chunks_of(prompt, PLAIN)


def test_pieces_name_the_word_at_its_last_place():
    assert TOKENIZER.pieces("a hard-one a")[1:4] == [(FIRST + 2, ""), (FIRST + 3, ""), (FIRST + 4, "hard-one ")]
    assert TOKENIZER.decode(TOKENIZER.encode("a EASY cat")) == "a Easy cat"


# The vectors in the text encoder


@pytest.fixture
def own_model():
    """A model of this test's own."""
    return assemble(TINY, fill(TINY))


def all_rows(model, words):
    """A text encoder with one table of all rows, own and learned."""
    encoder = copy.deepcopy(model.text_encoder)
    rows = [torch.from_numpy(each.vectors) for each in words]
    table = torch.cat([encoder.token_embedding.weight, *rows])
    encoder.token_embedding = torch.nn.Embedding.from_pretrained(table)
    return encoder


def test_a_word_has_the_effect_of_its_vectors(own_model):
    ids = torch.from_numpy(TOKENIZER("a easy cat by hard-one"))
    expected = all_rows(own_model, (EASY, HARD))(ids)
    teach(own_model, [EASY, HARD])
    assert torch.equal(own_model.text_encoder(own_model.tokenizer("a easy cat by hard-one")), expected)
    assert torch.equal(own_model.encode_prompts(["a easy cat by hard-one"]), expected)


def test_a_word_with_the_vector_of_another_is_that_word(own_model):
    vectors = own_model.text_encoder.token_embedding.weight[[CAT, BY]].clone()
    plain = own_model.encode_prompts(["a (cat by:1.3) a BREAK cat by"])
    teach(own_model, [LearnedWord(name="zzz", vectors=vectors.numpy())])
    assert torch.equal(own_model.encode_prompts(["a (zzz:1.3) a BREAK embedding:zzz"]), plain)


def test_words_are_taken_off_to_the_bit(own_model):
    before = {name: value.clone() for name, value in own_model.text_encoder.state_dict().items()}
    plain = own_model.encode_prompts(["a easy cat"])
    teach(own_model, [EASY])
    taught = own_model.encode_prompts(["a easy cat"])
    assert not torch.equal(taught, plain)
    assert own_model.text_encoder.state_dict().keys() == before.keys()
    teach(own_model, [HARD])
    assert torch.equal(own_model.encode_prompts(["a easy cat"]), plain)
    teach(own_model, [])
    assert (own_model.tokenizer, own_model.words) == (PLAIN, ())
    assert type(own_model.text_encoder.token_embedding) is torch.nn.Embedding
    assert torch.equal(own_model.encode_prompts(["a easy cat"]), plain)
    assert all(torch.equal(value, before[name]) for name, value in own_model.text_encoder.state_dict().items())


def test_no_weight_is_copied(own_model):
    before = own_model.text_encoder.token_embedding.weight.data_ptr()
    teach(own_model, [EASY])
    assert own_model.text_encoder.token_embedding.weight.data_ptr() == before
    assert not own_model.text_encoder.token_embedding.weight.requires_grad


def test_vectors_of_another_width_are_refused(own_model):
    with pytest.raises(ValueError, match=rf"must have the shape \(n, {WIDTH}\), got \(1, 8\)"):
        teach(own_model, [LearnedWord(name="easy", vectors=np.zeros((1, 8), np.float32))])
    assert own_model.words == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_are_rounded_to_the_networks_precision_and_kept_in_their_own(dtype, own_model):
    teach(own_model, [EASY])
    exact = own_model.text_encoder.token_embedding(torch.tensor([FIRST, A]))
    own_model.text_encoder.to(dtype)
    assert torch.equal(own_model.text_encoder.token_embedding(torch.tensor([FIRST, A])), exact.to(dtype))
    own_model.text_encoder.float()
    assert torch.equal(own_model.text_encoder.token_embedding(torch.tensor([FIRST])), exact[:1])


def execution(**options):
    return lambda: Execution(RunOptions(**options), **({"visited": torch.device("cpu")} if options else {}))


@pytest.mark.parametrize("runner", [Runner, Execution, execution(low_memory=True)], ids=["plain", "fast", "low memory"])
def test_every_runner_makes_the_same_pictures(runner, own_model):
    options = {"negative_prompt": "hard-one", "steps": 2}
    expected = [final(own_model, [settings(prompt=prompt, **options)]) for prompt in ("a cat", "a")]
    teach(own_model, [LearnedWord(name="zzz", vectors=own_model.text_encoder.token_embedding.weight[[CAT]].numpy())])
    own_model.runner = runner()
    latents = final(own_model, [settings(prompt="a zzz", **options), settings(prompt="a", seed=1, **options)])
    assert relative_error(latents[0], expected[0][0]) < 1e-5
    assert relative_error(latents[1], expected[1][0]) < 1e-5


def test_words_in_negative_prompts_and_at_some_steps_only_change_the_picture(own_model):
    teach(own_model, [EASY, HARD])
    variants = ["a cat", "a [cat:easy:0.5]", "a [cat:embedding:easy:0.5]", "a easy", "a [cat|easy]"]
    made = [final(own_model, [settings(prompt=prompt, steps=2)]) for prompt in variants]
    made.append(final(own_model, [settings(prompt="a cat", negative_prompt="easy", steps=2)]))
    same = [(i, j) for i in range(len(made)) for j in range(i) if torch.equal(made[i], made[j])]
    assert same == [(2, 1), (4, 1), (4, 2)]  # in two steps, [cat|easy] is [cat:easy:0.5]
    job = settings(prompt="a [cat:easy:0.5]", negative_prompt="[hard-one:a:0.5]")
    assert words_used(job.all_texts(), own_model.tokenizer) == (EASY, HARD)


def test_copies_and_pickles_know_the_words(own_model):
    teach(own_model, [EASY])
    prompt = settings(prompt="a easy", steps=1)
    expected = final(own_model, [prompt])
    for other in (copy.deepcopy(own_model), pickle.loads(pickle.dumps(copy.deepcopy(own_model.text_encoder)))):
        encoder = getattr(other, "text_encoder", other)
        assert torch.equal(encoder(own_model.tokenizer("easy")), own_model.text_encoder(own_model.tokenizer("easy")))
    assert torch.equal(final(copy.deepcopy(own_model), [prompt]), expected)


def test_a_whole_picture_is_made_with_a_word(own_model):
    teach(own_model, [EASY])
    (easy,), (other,) = (own_model.txt2img(prompt, width=64, height=64, steps=1, seed=1) for prompt in ("easy", "a"))
    assert (pixels(easy) != pixels(other)).any()


# diffusers


def test_the_context_is_that_of_diffusers(tmp_path, own_model, tiny_networks):
    theirs = diffusers_pipeline(TINY, tiny_networks)
    words = {"<one>": made_up(1, WIDTH), "<four>": made_up(4, WIDTH, 1)}
    for token, vectors in words.items():
        torch.save(of_web_ui(vectors, token), tmp_path / "x.pt")
        theirs.load_textual_inversion(tmp_path / "x.pt")
    teach(own_model, [LearnedWord(name=token, vectors=vectors.numpy()) for token, vectors in words.items()])
    for prompt in ("a <one> cat", "<four>", "a photograph by <four>, <one>, a cat", "a <ONE>".lower()):
        ids = theirs.tokenizer(
            theirs.maybe_convert_prompt(prompt, theirs.tokenizer), padding="max_length", return_tensors="pt"
        ).input_ids
        expected = theirs.text_encoder(ids)[0]
        assert relative_error(own_model.encode_prompts([prompt]), expected) < 1e-5
