"""The tokenizer against two others: the `clip` package's, which is right by definition, and transformers'."""

import doctest
import html
import subprocess
import sys
import time

import build_merges
import ftfy
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_oracles import (
    CLEANING,
    ROOT,
    SPLITTING,
    VOCABULARY_FILE,
    is_split_differently,
    load_transformers,
    needs_cleaning,
    original,
    original_clean,
    original_ids,
)
from tokenizer_strings import generated, hand_picked

import sd.text.tokenizer
from sd.text.tokenizer import END, START, Tokenizer, clean

tokenizer = Tokenizer()
PRINTABLE_ASCII = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "&")


@pytest.fixture(scope="module")
def strings() -> list[str]:
    return hand_picked() + generated(4000, seed=1)


@pytest.fixture(scope="module")
def transformers_encode(tmp_path_factory):
    tokenizer = load_transformers(tmp_path_factory.mktemp("transformers"))

    def encode(text: str) -> list[int]:
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (START, END)
        return ids[1:-1]

    return encode


def test_ids_and_cleaned_text_equal_the_original_on_every_string(strings):
    assert len(set(strings)) >= 4000
    assert [text for text in strings if tokenizer.encode(text) != original_ids(text)] == []
    assert [text for text in strings if clean(text) != original_clean(text).lower()] == []


@settings(max_examples=400)
@given(st.text(st.characters()))  # every code point, lone surrogates too
def test_ids_equal_the_original_on_any_text(text):
    assert tokenizer.encode(text) == original.encode(text)


@settings(max_examples=400)
@given(
    st.lists(st.sampled_from([*"&#x;<|>/' 1aſéß馬\u0301\u0345Σ", "amp", "endoftext|>", "'ll", "â€™", "Ã"])).map("".join)
)
def test_ids_equal_the_original_on_texts_made_of_troublesome_parts(text):
    assert tokenizer.encode(text) == original.encode(text)


def test_every_character_is_split_as_in_the_original():
    codes = [
        *range(0xD800),
        *range(0xE000, 0x10000),
        *range(0x10000, 0x110000, 13),
    ]  # the first plane, a 13th of others
    text = " ".join(f"a{chr(code)}1{chr(code)}!" for code in codes)
    assert sd.text.tokenizer.WORD.findall(text) == original.pat.findall(text)


def test_a_batch_has_the_rows_of_the_original(strings):
    expected = [[START, *original_ids(text)[:75], END] for text in strings]
    expected = np.array([row + [END] * (77 - len(row)) for row in expected])
    rows = tokenizer(strings)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, expected)


def test_decoded_text_equals_the_original():
    rows = [[token] for token in range(49408)] + np.random.default_rng(0).integers(0, 49408, (1000, 20)).tolist()
    assert [row for row in rows if tokenizer.decode(row) != original.decode(row).removesuffix(" ")] == []


def test_entities_are_resolved_twice_where_ftfy_leaves_them_alone():
    assert clean("<b> caf&amp;eacute;") == "<b> café"  # beside a tag
    assert clean("<b> caf&amp;amp;eacute;") == "<b> caf&eacute;"


@pytest.mark.slow
def test_transformers_agrees_on_every_string_outside_the_listed_classes(strings, transformers_encode):
    cleaned = [(text, original_clean(text)) for text in strings]
    different = [(text, after) for text, after in cleaned if transformers_encode(after) != original_ids(text)]
    assert [text for text, after in different if not is_split_differently(after)] == []
    assert sum(not is_split_differently(after) for _, after in cleaned) > 0.97 * len(strings)  # the classes are small
    ready = [text for text, after in cleaned if not needs_cleaning(text) and not is_split_differently(after)]
    assert len(ready) > len(strings) / 2
    assert [text for text in ready if transformers_encode(text) != original_ids(text)] == []


def test_transformers_does_not_clean(transformers_encode):
    for name, (text, expected) in CLEANING.items():
        assert tokenizer.encode(text) == original.encode(text) == expected, name
        assert needs_cleaning(text), name
        try:
            assert transformers_encode(text) != expected, name
        except TypeError:
            assert "surrogate" in name


def test_transformers_splits_differently(transformers_encode):
    for name, (_, text, expected) in SPLITTING.items():
        cleaned = original_clean(text)
        assert tokenizer.encode(text) == original.encode(text) == expected, name
        assert [other for other, (predicate, _, _) in SPLITTING.items() if predicate(cleaned)] == [name]
        assert transformers_encode(cleaned) != expected, name


def test_ordinary_prompts_are_in_no_class_of_disagreement():
    for text in (
        "a photograph of an astronaut riding a horse",
        "a corgi's birthday party, oil on canvas",
        "portrait of an old fisherman, highly detailed, sharp focus, 85mm, f/1.4, golden hour",
        "A high tech solarpunk utopia in the Amazon rainforest, trending on artstation, 8k, intricate, cinematic",
    ):
        assert not needs_cleaning(text)
        assert not is_split_differently(text)


def test_printable_ascii_needs_neither_ftfy_nor_html():
    for first in PRINTABLE_ASCII:
        text = "".join(first + second for second in PRINTABLE_ASCII)
        assert ftfy.fix_text(first) == first
        assert html.unescape(html.unescape(ftfy.fix_text(text))) == text
    replaced = {*ftfy.chardata.LIGATURES, *ftfy.chardata.WIDTH_MAP, *ftfy.chardata.CONTROL_CHARS}
    assert replaced.isdisjoint(map(ord, PRINTABLE_ASCII))
    assert ftfy.chardata.possible_encoding(PRINTABLE_ASCII, "ascii")  # no mojibake
    for text in ("caf\u00e9 cafÃ©", "a\x00b", "\x1b[31mred", "a\x7fb", "&lt;", "it’s"):
        assert clean(text) == original_clean(text).lower() != " ".join(text.split())


def test_spaces_that_python_and_the_original_see_differently_never_survive_cleaning():
    everything = "".join(map(chr, range(0x110000)))
    codes = sorted(map(ord, {*filter(str.isspace, everything)} ^ {*regex.findall(r"\s", everything)}))
    assert codes == [0x1C, 0x1D, 0x1E, 0x1F]
    for code in codes:
        assert ftfy.fix_text(f"a{chr(code)}b") == "ab"
        assert html.unescape(f"a&#{code};b") == "ab"


def test_a_row_is_start_ids_end_padding():
    assert tokenizer.tokenize("a horse").ids == (49406, 320, 4558, 49407, *[49407] * 73)
    # Stable Diffusion 2 pads with zeros
    assert Tokenizer(pad_token=0).tokenize("a horse").ids == (49406, 320, 4558, 49407, *[0] * 73)
    assert tokenizer([]).shape == (0, 77)
    np.testing.assert_array_equal(tokenizer("a horse"), tokenizer(["a horse"]))
    for text in "", "   ", "\x00", "&#28;":
        prompt = tokenizer.tokenize(text)
        assert prompt.ids == (49406, *[49407] * 76)
        assert (prompt.length, prompt.cut, prompt.cut_tokens) == (2, "", 0)


def test_truncated_prompt_keeps_end_token():
    row = (49406, *[4558] * 75, 49407)
    prompt = tokenizer.tokenize("horse " * 75)  # just fits
    assert (prompt.ids, prompt.length, prompt.cut, prompt.cut_tokens) == (row, 77, "", 0)
    prompt = tokenizer.tokenize("horse " * 75 + "Astronaut, 8k")
    assert (prompt.ids, prompt.length, prompt.cut, prompt.cut_tokens) == (row, 77, "astronaut, 8k", 4)
    assert Tokenizer(pad_token=0).tokenize("horse " * 100).ids == row


def test_a_word_cut_in_the_middle_is_named():
    word = "antidisestablishmentarianism"
    assert len(original.encode(word)) == 6
    prompt = tokenizer.tokenize("horse " * 73 + word + " of MARS")
    assert prompt.ids == (49406, *[4558] * 73, *original.encode(word)[:2], 49407)
    assert (prompt.cut, prompt.cut_tokens) == (f"{word} of mars", 6)


def test_kept_and_cut_text_make_up_the_whole(strings):
    cut = [text for text in strings if len(original_ids(text)) > 75]
    assert len(cut) > 100
    for text in cut:
        prompt = tokenizer.tokenize(text)
        assert prompt.cut_tokens == len(original_ids(text)) - 75
        assert clean(text).endswith(prompt.cut)
        kept = original.encode(clean(text).removesuffix(prompt.cut))
        assert len(kept) <= 75
        assert list(prompt.ids[1 : 1 + len(kept)]) == kept


def test_a_shorter_context_cuts_earlier():
    prompt = Tokenizer(context_length=4).tokenize("a photograph of a horse")
    assert prompt.ids == (49406, 320, 8853, 49407)
    assert (prompt.length, prompt.cut, prompt.cut_tokens) == (4, "of a horse", 3)
    prompt = Tokenizer(context_length=2).tokenize("a horse")
    assert (prompt.ids, prompt.cut) == ((49406, 49407), "a horse")
    with pytest.raises(ValueError, match="context_length must be at least 2"):
        Tokenizer(context_length=1)


def test_decoding_gives_back_text_with_single_spaces_between_words():
    for text in "a horse", "caf\u00e9 \u00fcber 馬 космонавт 🐎", "a , b ! 8 k", "don 't", "", "</ w >":
        assert tokenizer.decode(tokenizer.encode(text)) == text
    row = tokenizer(["a horse"])[0]
    assert tokenizer.decode(row[1:3]) == tokenizer.decode((320, 4558)) == "a horse"
    assert tokenizer.decode(row[:4]) == "<|startoftext|>a horse <|endoftext|>"


def test_pieces_join_to_the_decoded_text(strings):
    for text in strings:
        pieces = tokenizer.pieces(text)
        assert [token for token, _ in pieces] == original_ids(text)
        assert "".join(piece for _, piece in pieces).removesuffix(" ") == tokenizer.decode(original_ids(text))
    # a character of several ids stands with the last one
    assert [piece for _, piece in tokenizer.pieces("🏯")] == ["", "🏯 "]


def test_prompts_that_are_not_strings_and_ids_outside_the_vocabulary_are_refused():
    for wrong in (None, 3, b"a horse", ["a horse"]):
        for refused in (lambda wrong=wrong: tokenizer.tokenize(wrong), lambda wrong=wrong: tokenizer([wrong])):
            with pytest.raises(TypeError, match="a prompt must be a str, got"):
                refused()
    for wrong in (-1, 49408):
        with pytest.raises(ValueError, match=f"token ids must be 0..49407, got {wrong}"):
            tokenizer.decode([320, wrong])
        with pytest.raises(ValueError, match=f"token ids must be 0..49407, got {wrong}"):
            Tokenizer(pad_token=wrong)
    with pytest.raises(TypeError):
        tokenizer.decode([320.5])


def test_lone_surrogates_are_read_as_replacement_characters():
    assert tokenizer.encode("a\ud83db") == tokenizer.encode("a\ufffdb")


def test_long_words_equal_the_original_and_take_less_than_a_second():
    for text in "horse" * 600, "馬に乗る" * 250, "?!" * 1500:
        assert tokenizer.encode(text) == original.encode(text)
    start = time.process_time()
    assert len(tokenizer.encode("ab" * 5000)) > 1000
    assert time.process_time() - start < 1  # 0.02 s on one slow core; the original takes 2 s


def test_remembered_words_are_bounded_in_number_and_length():
    assert sd.text.tokenizer.cached_merge.cache_info().maxsize == 32768
    before = sd.text.tokenizer.cached_merge.cache_info().currsize
    tokenizer.encode("x" * 65)
    assert sd.text.tokenizer.cached_merge.cache_info().currsize == before


def test_importing_needs_neither_torch_nor_ftfy():
    code = (
        "import sys; from sd.text.tokenizer import Tokenizer; Tokenizer()(['a horse']); "
        "print(sorted({'torch', 'ftfy', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_examples_in_docstrings_are_right():
    results = doctest.testmod(sd.text.tokenizer)
    assert results.attempted >= 5
    assert results.failed == 0


def test_shipped_merges_equal_a_rebuild_from_the_original_vocabulary(tmp_path):
    rebuilt = tmp_path / "merges.bin"
    assert build_merges.main([str(VOCABULARY_FILE), "--file", str(rebuilt)]) == 0
    assert rebuilt.read_bytes() == sd.text.tokenizer.MERGES_FILE.read_bytes()
    assert build_merges.main([str(VOCABULARY_FILE), "--check"]) == 0


def test_one_changed_byte_or_a_missing_one_is_noticed(tmp_path, monkeypatch):
    data = bytearray(sd.text.tokenizer.MERGES_FILE.read_bytes())
    data[1000] ^= 1
    changed = tmp_path / "merges.bin"
    changed.write_bytes(data)
    assert build_merges.main([str(VOCABULARY_FILE), "--check", "--file", str(changed)]) == 1
    assert changed.read_bytes() == data  # nothing is written
    changed.write_bytes(data[:-1])
    monkeypatch.setattr(sd.text.tokenizer, "MERGES_FILE", changed)
    with pytest.raises(ValueError, match="195575 bytes instead of 195576"):
        sd.text.tokenizer.read_merges()


def test_another_source_is_refused_by_its_sha256(tmp_path, capsys):
    for name in "openai-clip-1.0.1.tar.gz", "bpe_simple_vocab_16e6.txt.gz":
        source = tmp_path / name
        source.write_bytes(b"something else")
        assert build_merges.main([str(source), "--file", str(tmp_path / "merges.bin")]) == 2
        assert "expected " in capsys.readouterr().err
    assert not (tmp_path / "merges.bin").exists()


def test_every_merge_joins_earlier_ids_and_each_id_is_made_in_one_way():
    assert len(original.encoder) == sd.text.tokenizer.VOCABULARY_SIZE  # keyed by text: no two ids stand for the same
    assert all(max(pair) < joined for pair, joined in sd.text.tokenizer.merge_table().items())


def test_every_id_stands_for_the_bytes_of_the_original():
    for token, piece in enumerate(sd.text.tokenizer.bytes_of_ids()[:START]):
        letters = original.decoder[token]
        end = b" " if letters.endswith("</w>") and len(letters) > 4 else b""
        assert piece == bytes(original.byte_decoder[letter] for letter in letters.removesuffix("</w>")) + end
