"""A prompt as the strip of tokens that the UNet sees: what each of the 77 is, and which of them form a word.

Each column has its own heat map: a token of the prompt, the start, the end, or all padding of a row together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sd.study.explain.nouns import first_noun
from sd.text.chunks import chunks_of, empty_chunk
from sd.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Column:
    kind: str  # "start", "token", "end" or "padding"
    text: str  # what a token stands for; a space marks the end of a word
    id: int
    weight: float  # from the prompt; 1 for start, end and padding
    count: int  # of tokens: 1, or the whole padding of a row
    row: int  # of 77, from 0


@dataclass(frozen=True, kw_only=True)
class TokenStrip:
    """One text of the prompt, as rows of 77 tokens."""

    text: str
    rows: int
    columns: tuple[Column, ...]
    words: tuple[tuple[int, ...], ...]  # the columns of each word; start, end and padding are words of their own
    noun: int  # which of the words is probably the first noun; the first word if there is none, the start if empty
    column_of: tuple[int, ...]  # for each of the 77 * rows tokens
    cut: str  # what does not fit into one row: here it is in the next rows, other programs may drop it
    cut_tokens: int


def token_strip(text: str, tokenizer: Tokenizer, *, plain: bool = False, rows: int = 1) -> TokenStrip:
    """The strip of a prompt as it stands at one step: as many rows as it needs, at least `rows`.

    plain  treat brackets and BREAK as text
    """
    chunks = chunks_of(text, tokenizer, plain=plain)
    chunks = (*chunks, *[empty_chunk(tokenizer)] * (rows - len(chunks)))
    columns: list[Column] = []
    words: list[list[int]] = []
    column_of: list[int] = []

    def add(kind: str, ids: Sequence[int], row: int, text: str = "", weight: float = 1.0, *, goes_on: bool = False):
        if goes_on:
            words[-1].append(len(columns))
        else:
            words.append([len(columns)])
        column_of.extend([len(columns)] * len(ids))
        columns.append(Column(kind=kind, text=text, id=ids[0], weight=weight, count=len(ids), row=row))

    for row, chunk in enumerate(chunks):
        add("start", chunk.ids[:1], row)
        inside = False  # a word whose last token has not come yet
        pieces = tokenizer.pieces_of(token for token, _ in chunk.tokens)
        for (token, piece), (_, weight) in zip(pieces, chunk.tokens, strict=True):
            add("token", [token], row, piece, weight, goes_on=inside)
            inside = not piece.endswith(" ")
        end = chunk.length + 1
        add("end", chunk.ids[end : end + 1], row)
        if chunk.ids[end + 1 :]:
            add("padding", chunk.ids[end + 1 :], row)
    beyond = [column.text for column in columns if column.kind == "token" and column.row > 0]
    return TokenStrip(
        text=text,
        rows=len(chunks),
        columns=tuple(columns),
        words=tuple(map(tuple, words)),
        noun=first_noun([_text([columns[i] for i in word]) for word in words]),
        column_of=tuple(column_of),
        cut="".join(beyond).strip(),
        cut_tokens=len(beyond),
    )


def _text(word: Sequence[Column]) -> str:
    return "".join(column.text for column in word).strip() if word[0].kind == "token" else ""
