"""CLIP's byte-pair encoding: from a prompt to the 77 token ids that the text encoder reads.

    "A  Corgi&#39;s hat"
      clean    lower case, single spaces              "a corgi's hat"
      split    letters, single digits, the rest       "a"  "corgi"  "'s"  "hat"
      merge    bytes, joined pair by pair             320  31320   568   3801
      frame    start, the ids, end, padding           49406 320 31320 568 3801 49407 49407 ... 49407

The 49,408 ids:

    0..255         one byte, in the order of BYTE_ORDER
    256..511       the same bytes at the end of a word
    512..49405     two smaller ids joined, in the order that training found: pairs with small ids are joined first
    49406, 49407   start and end of the text

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4. Merges are
learned by algorithm 1 and applied as in section 3.2 of Sennrich et al., "Neural Machine Translation of Rare Words with
Subword Units" (2016). (The CLIP paper states 49,152 ids and 76 positions; the released model has 49,408 and 77.)
"""

import codecs
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from operator import index
from pathlib import Path

import numpy as np
import regex

START, END = 49406, 49407
SPECIAL = {"<|startoftext|>": START, "<|endoftext|>": END}
VOCABULARY_SIZE = 49408
FIRST_MERGE = 512
MERGES_FILE = Path(__file__).with_name("data") / "clip_merges.bin"

# Bytes that are printable in Latin-1 come first: the original vocabulary is a text file, one character per byte.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ORDER = bytes(PRINTABLE + sorted(set(range(256)) - set(PRINTABLE)))
ID_OF_BYTE = bytes(BYTE_ORDER.index(byte) for byte in range(256))

WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """One prompt as the text encoder reads it, and what did not fit."""

    ids: tuple[int, ...]  # (context_length,): start, the prompt, end, padding
    length: int  # ids before the padding, start and end included
    cut: str  # the end of the cleaned prompt, from the first word that lost a token; "" if everything fits
    cut_tokens: int  # tokens lost; fewer than `cut` has if its first word was kept in part


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Turn prompts into rows of ids.

    >>> tokenizer = Tokenizer()
    >>> tokenizer(["a horse", ""]).shape
    (2, 77)
    >>> tokenizer.encode("a horse")
    [320, 4558]
    >>> tokenizer.decode([320, 4558])
    'a horse'
    >>> Tokenizer(context_length=5).tokenize("a photograph of an astronaut")
    TokenizedPrompt(ids=(49406, 320, 8853, 539, 49407), length=5, cut='an astronaut', cut_tokens=2)
    """

    context_length: int = 77
    pad_token: int = END  # Stable Diffusion 1; version 2 pads with 0

    def __post_init__(self):
        if self.context_length < 2:
            raise ValueError(f"context_length must be at least 2 (start and end), got {self.context_length}")
        check_ids([self.pad_token])
        merge_table()  # a missing or damaged file shows here, not at the first prompt

    def __call__(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Tokenize a batch: (B, context_length) int64. One string is a batch of one.

        Cuts prompts that are too long silently; `tokenize` says what was cut.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [self.tokenize(prompt).ids for prompt in prompts]
        return np.array(rows, dtype=np.int64).reshape(len(rows), self.context_length)

    def tokenize(self, prompt: str) -> TokenizedPrompt:
        """Fit one prompt into the context; it always keeps its end token."""
        text = clean(prompt)
        ids = encode_cleaned(text)
        room = self.context_length - 2
        kept = ids[:room]
        padding = [self.pad_token] * (room - len(kept))
        return TokenizedPrompt(
            ids=(START, *kept, END, *padding),
            length=len(kept) + 2,
            cut=text_beyond(text, room) if len(ids) > room else "",
            cut_tokens=len(ids) - len(kept),
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without start, end and padding.

        The words <|startoftext|> and <|endoftext|> in the text become START and END, as in the original.
        """
        return encode_cleaned(clean(text))

    def place_in_word(self, token: int) -> int:
        """How many tokens of the same learned word stand before this one: 0, since CLIP's own may be separated."""
        return 0

    def pieces(self, text: str) -> list[tuple[int, str]]:
        """Each id with the text it stands for; a space marks the end of a word.

        A character spread over several ids goes to the last of them; the others get "".

        >>> Tokenizer().pieces("Hokusai 🏯")
        [(606, 'ho'), (1836, 'ku'), (10886, 'sai '), (1109, ''), (363, '🏯 ')]
        """
        return self.pieces_of(self.encode(text))

    def pieces_of(self, ids: Iterable[int]) -> list[tuple[int, str]]:
        """The same for ids from `encode`."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        return [(token, decoder.decode(bytes_of_ids()[token])) for token in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, in lower case, a space after every word; invalid UTF-8 becomes U+FFFD."""
        ids = [index(token) for token in ids]
        check_ids(ids)
        return b"".join(bytes_of_ids()[token] for token in ids).decode("utf-8", "replace").removesuffix(" ")


def clean(text: str) -> str:
    """Repair the encoding, resolve HTML entities, use single spaces and lower case.

    ftfy undoes mojibake, straightens quotes, splits ligatures and drops control characters. Printable ASCII without
    entities needs none of that, so ftfy is not even imported. Entities are resolved twice, since the captions that
    CLIP learned from had often been escaped twice.
    """
    if not isinstance(text, str):
        raise TypeError(f"a prompt must be a str, got {type(text).__name__}")
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def encode_cleaned(text: str) -> list[int]:
    return [token for word in WORD.findall(text) for token in encode_word(word)]


def text_beyond(text: str, room: int) -> str:
    """The rest of a cleaned text, from the first word that ends beyond `room` tokens."""
    for word in WORD.finditer(text):
        room -= len(encode_word(word.group()))
        if room < 0:
            return text[word.start() :]
    return ""


def encode_word(word: str) -> tuple[int, ...]:
    return cached_merge(word) if len(word) <= 64 else merge(word)  # 64 letters bound the cache's memory


def merge(word: str) -> tuple[int, ...]:
    """Join the bytes of one word until no two neighbours form a known pair.

    The pair with the smallest joined id goes first, the leftmost among equals. A heap holds the possible joins and a
    doubly linked list the neighbours, so n letters take n log n steps. The result equals the textbook's, which joins
    all equal pairs before it looks for new ones: a new pair contains the new id, so its joined id is larger still.
    """
    if word in SPECIAL:
        return (SPECIAL[word],)
    merges = merge_table()
    ids = list(word.encode("utf-8").translate(ID_OF_BYTE))
    ids[-1] += 256
    size = len(ids)
    before, after = list(range(-1, size - 1)), list(range(1, size + 1))
    joins = [(merges[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in merges]
    heapify(joins)
    while joins:
        joined, left = heappop(joins)
        right = after[left]
        if right == size or merges.get((ids[left], ids[right])) != joined:
            continue  # one of the two has been joined to its other neighbour
        ids[left], ids[right] = joined, -1
        after[left] = after[right]
        if after[left] < size:
            before[after[left]] = left
        for first, second in (before[left], left), (left, after[left]):
            if first >= 0 and second < size and (pair := (ids[first], ids[second])) in merges:
                heappush(joins, (merges[pair], first))
    return tuple(token for token in ids if token >= 0)


cached_merge = lru_cache(maxsize=1 << 15)(merge)


def read_merges() -> np.ndarray:
    """(48894, 2): row i holds the two ids that id 512 + i joins. `scripts/checks/build_merges.py` writes the file."""
    data = MERGES_FILE.read_bytes()
    expected = (START - FIRST_MERGE) * 4
    if len(data) != expected:
        raise ValueError(f"{MERGES_FILE} is damaged: {len(data)} bytes instead of {expected}; reinstall the package")
    return np.frombuffer(data, "<u2").reshape(-1, 2)


@cache
def merge_table() -> dict[tuple[int, int], int]:
    """(left id, right id) -> joined id. All tokenizers share it."""
    left, right = read_merges().T.tolist()
    return dict(zip(zip(left, right, strict=True), range(FIRST_MERGE, START), strict=True))


@cache
def bytes_of_ids() -> list[bytes]:
    """The bytes that each id stands for, with a space at the end of a word."""
    single = [bytes([byte]) for byte in BYTE_ORDER]
    pieces = single + [piece + b" " for piece in single]
    for left, right in read_merges().tolist():
        pieces.append(pieces[left] + pieces[right])
    return pieces + [word.encode() for word in SPECIAL]


def check_ids(ids: Sequence[int]) -> None:
    unknown = [token for token in ids if not 0 <= token < VOCABULARY_SIZE]
    if unknown:
        raise ValueError(f"token ids must be 0..{VOCABULARY_SIZE - 1}, got {unknown[0]}")
