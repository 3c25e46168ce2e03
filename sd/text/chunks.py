"""Split a prompt into chunks, the rows that the text encoder reads: up to 75 tokens of the prompt in each.

For "a horse, a (red:1.3) house":

    ids      49406   320  4558   267   320   736  1212 49407 49407 ... 49407
    weights      1     1     1     1     1   1.3     1     1     1 ...     1
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sd.text.prompt_syntax import Piece, read_weights
from sd.text.tokenizer import END, START, Tokenizer

COMMA = 267  # the token of "," as a word of its own
LOOK_BACK = 20  # tokens: a full chunk may end this much early to end after a comma

WeightedToken = tuple[int, float]


@dataclass(frozen=True)
class Chunk:
    """One row of the text encoder's input, with a weight for each token."""

    ids: tuple[int, ...]  # (context_length,): start, part of the prompt, end, padding
    weights: tuple[float, ...]  # one per id; 1 for start, end and padding
    length: int  # tokens of the prompt

    @property
    def tokens(self) -> list[WeightedToken]:
        """The tokens of the prompt, without start, end and padding."""
        return list(zip(self.ids, self.weights, strict=True))[1 : self.length + 1]


@lru_cache(maxsize=256)
def chunks_of(text: str, tokenizer: Tokenizer, *, plain: bool = False) -> tuple[Chunk, ...]:
    """Split a text into chunks, at least one.

    text   the prompt as it stands at one step
    plain  treat brackets and BREAK as text

    Raises `sd.text.prompt_syntax.PromptError` for a weight out of range.
    """
    sections = ((Piece(text, 1.0),),) if plain else read_weights(text)
    room = tokenizer.context_length - 2
    rows: list[list[WeightedToken]] = []
    for section in sections:
        tokens = [(token, piece.weight) for piece in section for token in tokenizer.encode(piece.text)]
        rows += split(tokens, room, tokenizer.place_in_word)
    if len(rows) > 1 and not rows[-1]:  # the text ends in BREAK
        rows.pop()
    return tuple(chunk_of(row, tokenizer) for row in rows)


def split(
    tokens: Sequence[WeightedToken], room: int, place_in_word: Callable[[int], int] = lambda token: 0
) -> Iterator[list[WeightedToken]]:
    """Rows of at most `room` tokens. A full row ends after the last comma among its last 20 tokens, if there is one.

    The tokens after that comma begin the next row. If the next token is itself a comma, the row stays full. A learned
    word that does not fit as a whole begins the next row.
    """
    start = 0
    while len(tokens) - start > room:
        end = start + room
        if place := place_in_word(tokens[end][0]):
            end -= place
        elif tokens[end][0] != COMMA:
            ends = range(end, max(end - LOOK_BACK, start), -1)
            end = next((after for after in ends if tokens[after - 1][0] == COMMA), end)
        yield list(tokens[start:end])
        start = end
    yield list(tokens[start:])


def chunk_of(row: Sequence[WeightedToken], tokenizer: Tokenizer) -> Chunk:
    """Add the start token, the end token and the padding."""
    padding = tokenizer.context_length - 2 - len(row)
    return Chunk(
        ids=(START, *(token for token, _ in row), END, *[tokenizer.pad_token] * padding),
        weights=(1.0, *(weight for _, weight in row), *[1.0] * (padding + 1)),
        length=len(row),
    )


def empty_chunk(tokenizer: Tokenizer) -> Chunk:
    """A chunk without a prompt: it brings the shorter of two prompts to the length of the other."""
    return chunk_of([], tokenizer)
