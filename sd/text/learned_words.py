"""Words that a model has learned in addition to CLIP's: textual inversion, as a tokenizer that knows them.

A word has n vectors and takes n places. Its ids lie behind those of the vocabulary, so that the text encoder finds its
vectors in further rows of the token embedding (`sd.networks.learned_rows`):

    "a cat by easy"     320 2368 638 49408 49409        easy has two vectors

A word is recognised as the web UI does it: by the ids of its name, wherever they stand, so capitals do not matter; of
several, the one with most ids. `embedding:easy`, as ComfyUI writes it, is the same word.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion" (2022), 3.2.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sd.text.chunks import chunks_of
from sd.text.prompt_syntax import Piece, read_weights
from sd.text.tokenizer import END, START, VOCABULARY_SIZE, TokenizedPrompt, Tokenizer

SUFFIX = r"(?:\.(?:safetensors|pt|pth|bin|ckpt|png|webp|avif))?"
FOLDER = r"(?:[^\s,()\[\]|:/\\]+[/\\])*"
BEFORE, BEHIND = r"(?<!\w)", r"(?!\w)"  # no letter, digit or _
LETTER = re.compile(r"[^\W_]")
MENTION = re.compile(r"(?<!\w)embedding:([^\s,()\[\]|:]+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedWord:
    """A word, as a prompt has it, and its vectors."""

    name: str
    vectors: np.ndarray = field(repr=False)  # (n, D) float32
    vectors_2: np.ndarray | None = field(default=None, repr=False)  # (n, D2), of a model with a second text encoder
    file: str = ""  # that they are from
    sha256: str | None = None  # of the file
    bundled: bool = False  # with an adapter, and there as long as it is applied


@dataclass(frozen=True, kw_only=True)
class LearnedTokenizer(Tokenizer):
    """A tokenizer that knows further words. Of two with the same name, it knows the first.

    >>> word = LearnedWord(name="Easy", vectors=np.zeros((2, 768), np.float32))
    >>> LearnedTokenizer(words=(word,)).encode("a cat by EASY")
    [320, 2368, 638, 49408, 49409]
    """

    words: tuple[LearnedWord, ...]

    def __post_init__(self):
        super().__post_init__()
        room = self.context_length - 2
        for word in self.words:
            if not 0 < len(word.vectors) <= room:
                raise ValueError(f"a word has 1 to {room} vectors, {word.name!r} has {len(word.vectors)}")

    @cached_property
    def first_ids(self) -> tuple[int, ...]:
        """The id of each word's first vector."""
        counts = [len(word.vectors) for word in self.words]
        return tuple(VOCABULARY_SIZE + sum(counts[:i]) for i in range(len(counts)))

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Of each id behind the vocabulary: the number of its word, and which of the word's vectors it means."""
        return tuple((number, place) for number, word in enumerate(self.words) for place in range(len(word.vectors)))

    @cached_property
    def by_first_id(self) -> dict[int, list[tuple[tuple[int, ...], int]]]:
        """The ids of each name and the number of its word, by the first of these ids; the longest first."""
        found: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for number, word in enumerate(self.words):
            if ids := tuple(super().encode(word.name)):
                found.setdefault(ids[0], []).append((ids, number))
        return {first: sorted(names, key=lambda row: -len(row[0])) for first, names in found.items()}

    @cached_property
    def by_name(self) -> dict[str, int]:
        """The number of each word, by its name in small letters."""
        return {word.name.lower(): number for number, word in reversed(list(enumerate(self.words)))}

    @cached_property
    def in_text(self) -> re.Pattern:
        """What is recognised before the text becomes ids.

        `embedding:NAME`, with or without the folder and the suffix of its file; and a name with a mark at its end, such
        as <cat>, since CLIP joins marks that touch: in "<cat>," it reads the id of ">,".
        """
        names = sorted(self.by_name, key=len, reverse=True)
        marked = [name for name in names if LETTER.search(name) and not (name[0].isalnum() and name[-1].isalnum())]
        either = [rf"(?<!\w)embedding:{FOLDER}({'|'.join(map(re.escape, names))}){SUFFIX}(?![\w-]|\.\w)"]
        if marked:
            bounded = (f"{BEFORE * name[0].isalnum()}{re.escape(name)}{BEHIND * name[-1].isalnum()}" for name in marked)
            either.append(f"({'|'.join(bounded)})")
        return re.compile("|".join(either), re.IGNORECASE)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for found in self.in_text.finditer(text) if self.words else ():
            number = self.by_name.get((found[1] or found[found.lastindex]).lower())
            if number is not None:  # None: rare letters, which are equal to the pattern only
                ids += self._recognised(super().encode(text[end : found.start()]))
                ids += self._ids_of(number)
                end = found.end()
        return ids + self._recognised(super().encode(text[end:]))

    def tokenize(self, prompt: str) -> TokenizedPrompt:
        ids, room = self.encode(prompt), self.context_length - 2
        if max(ids, default=0) < VOCABULARY_SIZE:
            return super().tokenize(prompt)
        kept = len(ids) if len(ids) <= room else room - self.place_in_word(ids[room])
        cut = kept  # where the first word begins that is not whole
        pieces = [piece for _, piece in self.pieces_of(ids)] if kept < len(ids) else []
        while pieces and cut > 0 and not pieces[cut - 1].endswith(" "):
            cut -= 1
        return TokenizedPrompt(
            ids=(START, *ids[:kept], END, *[self.pad_token] * (room - kept)),
            length=kept + 2,
            cut="".join(pieces[cut:]).removesuffix(" "),
            cut_tokens=len(ids) - kept,
        )

    def pieces_of(self, ids: Iterable[int]) -> list[tuple[int, str]]:
        """As for other tokens: the last id of a word has its text, the others none."""
        pieces = []
        known: list[int] = []
        for token in [*ids, None]:
            if token is not None and token < VOCABULARY_SIZE:
                known.append(token)
                continue
            pieces += super().pieces_of(known)
            known = []
            if token is not None:
                word = self.word_of(token)
                last = self.place_in_word(token) == len(word.vectors) - 1
                pieces.append((token, f"{word.name} " if last else ""))
        return pieces

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(piece for _, piece in self.pieces_of(ids)).removesuffix(" ")

    def place_in_word(self, token: int) -> int:
        return 0 if token < VOCABULARY_SIZE else self.places[token - VOCABULARY_SIZE][1]

    def word_of(self, token: int) -> LearnedWord | None:
        """The learned word that an id belongs to; None for CLIP's own."""
        return None if token < VOCABULARY_SIZE else self.words[self.places[token - VOCABULARY_SIZE][0]]

    def _ids_of(self, number: int) -> range:
        first = self.first_ids[number]
        return range(first, first + len(self.words[number].vectors))

    def _recognised(self, ids: list[int]) -> list[int]:
        """The ids with those of each name replaced by those of its word."""
        found: list[int] = []
        i = 0
        while i < len(ids):
            names = self.by_first_id.get(ids[i], ())
            name, number = next((row for row in names if tuple(ids[i : i + len(row[0])]) == row[0]), ((ids[i],), None))
            found += name if number is None else self._ids_of(number)
            i += len(name)
        return found


def words_used(texts: Iterable[str], tokenizer: Tokenizer, *, plain: bool = False) -> tuple[LearnedWord, ...]:
    """The learned words in these texts, each once, in the order in which they first stand there.

    plain  as in `sd.text.chunks.chunks_of`
    """
    if not isinstance(tokenizer, LearnedTokenizer):
        return ()
    chunks = (chunk for text in texts for chunk in chunks_of(text, tokenizer, plain=plain))
    words = dict.fromkeys(tokenizer.word_of(token) for chunk in chunks for token, _ in chunk.tokens)
    return tuple(word for word in words if word is not None)


def missing_words(texts: Iterable[str], tokenizer: Tokenizer, *, plain: bool = False) -> tuple[str, ...]:
    """Each NAME of an `embedding:NAME` in these texts that is no learned word; it is read like any other text."""
    known = tokenizer.in_text if isinstance(tokenizer, LearnedTokenizer) and tokenizer.words else None
    found: dict[str, None] = {}
    for piece in (piece.text for text in texts for piece in pieces_of(text, plain=plain)):
        missing = [each for each in MENTION.finditer(piece) if not (known and known.match(piece, each.start()))]
        found |= dict.fromkeys(each[1].rstrip(".;!?") for each in missing)
    return tuple(found)


def pieces_of(text: str, *, plain: bool) -> Sequence[Piece]:
    return [Piece(text, 1.0)] if plain else [piece for section in read_weights(text) for piece in section]
