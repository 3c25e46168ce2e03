"""Two other tokenizers to compare ours with, and where they disagree with each other.

The `clip` package's is the original and right by definition. transformers' splits and merges with libraries of its own
and does not clean the text first; the cases in which that matters are listed here with the original's ids.
"""

import gzip
import importlib.util
import json
import unicodedata
from functools import cache
from pathlib import Path

import regex
from tokenizers import Regex, normalizers

ROOT = Path(__file__).parents[1]
# `import clip` would import torch and torchvision: pip install openai-clip==1.0.1 --no-deps
CLIP = Path(importlib.util.find_spec("clip").submodule_search_locations[0])
VOCABULARY_FILE = CLIP / "bpe_simple_vocab_16e6.txt.gz"


def load_module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_transformers(folder: Path):
    """transformers' tokenizer, from files written out of the original's vocabulary."""
    from transformers import CLIPTokenizer

    merges = gzip.decompress(VOCABULARY_FILE.read_bytes()).decode("utf-8").split("\n")[1 : 1 + 48894]
    (folder / "vocab.json").write_text(json.dumps(original.encoder))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder))


original_module = load_module(CLIP / "simple_tokenizer.py")
original = original_module.SimpleTokenizer()
original_ids = cache(original.encode)


def original_clean(text: str) -> str:
    """The text as the original splits it, before it is made lower case."""
    return original_module.whitespace_clean(original_module.basic_clean(text))


CLEANING = {  # transformers does not clean: what ftfy or html.unescape changes, it reads as it stands
    "mojibake": ("cafÃ©", [15304]),
    "mojibake with C1 controls": ("a\x92b", [320, 262, 321]),
    "the C1 line break, which is a damaged ellipsis": ("a\x85b", [320, 959, 321]),
    "curly quotes": ("it’s", [585, 568]),
    "Latin ligatures": ("ﬁne", [3797]),
    "full-width letters": ("Ｗｉｄｅ", [3184]),
    "control characters are dropped": ("a\x00b", [3937]),
    "control characters that are spaces to others": ("a\x0bb", [3937]),
    "terminal escapes": ("\x1b[31mred", [736]),
    "byte order mark": ("\ufeffbom", [19469]),
    "HTML entities": ("caf&eacute;", [15304]),
    "HTML entities beside a tag": ("<b> &eacute;", [283, 321, 285, 4166]),
    "HTML entities escaped twice": ("a &amp;amp; b", [320, 261, 321]),
    "surrogate pairs": ("\ud83d\ude00", [7334]),  # transformers raises TypeError on surrogates
    "lone surrogates become U+FFFD": ("a\ud83db", [320, 39802, 321]),
}

SPLITTING = {  # differences that remain on cleaned text: when it happens, an example, the original's ids
    "the special words in capitals": (
        lambda text: special_words(text.lower()) > exact_special_words(text),
        "<|STARTOFTEXT|>",
        [49406],
    ),
    "the special words stuck to punctuation are none": (
        lambda text: special_words(text.lower()) < exact_special_words(text),
        "!!<|endoftext|>",
        [1443, 27, 347, 40786, 4160, 91, 285],
    ),
    "the long s counts as s where the pattern spells an s": (
        lambda text: "'ſ" in text or "<|ſtartoftext|>" in text.lower(),
        "'ſ",
        [6, 129, 379],
    ),
    "a capital sigma that ends a word": (
        lambda text: text.lower() != "".join(character.lower() for character in text),
        "ΣΑΣ",
        [139, 225, 138, 109, 139, 480],
    ),
    "U+0345 disappears, as its upper case is a letter and it is none": (
        lambda text: "\u0345" in text,
        "a\u0345b",
        [320, 321],
    ),
    "an entity beside a tag makes a decomposed letter, after ftfy composed them": (
        lambda text: unicodedata.normalize("NFC", text) != text,
        "<e&#x301;",
        [283, 324, 136, 479],
    ),
    "characters that one library's Unicode tables know and another's do not": (
        lambda text: any(unicode_tables_differ(character) for character in text),
        "a\u209db",
        [64, 5227, 251, 321],
    ),
}


def needs_cleaning(text: str) -> bool:
    """Does cleaning change more than composing accents (NFC) and joining spaces, which transformers does too?"""
    return original_clean(text) != original_module.whitespace_clean(unicodedata.normalize("NFC", text))


def is_split_differently(cleaned: str) -> bool:
    return any(happens(cleaned) for happens, _, _ in SPLITTING.values())


def special_words(text: str) -> int:
    return sum(word in ("<|startoftext|>", "<|endoftext|>") for word in original.pat.findall(text))


def exact_special_words(text: str) -> int:
    return text.count("<|startoftext|>") + text.count("<|endoftext|>")


@cache
def unicode_tables_differ(character: str) -> bool:
    """Do Python, `regex` and `tokenizers` disagree whether it is a letter, number or space, or on its lower case?"""
    if normalizers.Lowercase().normalize_str(character) != character.lower():
        return True
    for kind in r"\p{L}", r"\p{N}", r"\s":
        theirs = normalizers.Replace(Regex(kind), "").normalize_str(character) == ""
        if theirs != bool(regex.match(kind, character)):
            return True
    return False
