"""From a prompt to the rows of tokens that the text encoder reads: as many as it takes, 75 tokens in each.

For "a horse, a (red:1.3) house":

    ids      49406   320  4558   267   320   736  1212 49407 49407 ... 49407
    weights      1     1     1     1     1   1.3     1     1     1 ...     1
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sd.text.prompt_syntax import Piece, read_weights
from sd.text.tokenizer import END, START, Tokenizer

COMMA = 267  # the token of a comma that stands alone
LOOK_BACK = 20  # tokens: how far a chunk may end before it is full, to end after a comma

WeightedToken = tuple[int, float]


@dataclass(frozen=True)
class Chunk:
    """One row of the text encoder's input, and how much each token counts."""

    ids: tuple[int, ...]  # context_length of them: start, part of the prompt, end, padding
    weights: tuple[float, ...]  # one for each; 1 for start, end and padding
    length: int  # how many tokens of the prompt are in it

    @property
    def tokens(self) -> list[WeightedToken]:
        """Those of the prompt, without start, end and padding."""
        return list(zip(self.ids, self.weights, strict=True))[1 : self.length + 1]


@lru_cache(maxsize=256)
def chunks_of(text: str, tokenizer: Tokenizer, *, plain: bool = False) -> tuple[Chunk, ...]:
    """The chunks of a text, one at least.

    text   of a prompt as it stands at a step
    plain  brackets and BREAK are text

    Raises `sd.text.prompt_syntax.PromptError` where a weight is out of range.
    """
    sections = ((Piece(text, 1.0),),) if plain else read_weights(text)
    room = tokenizer.context_length - 2
    rows: list[list[WeightedToken]] = []
    for section in sections:
        tokens = [(token, piece.weight) for piece in section for token in tokenizer.encode(piece.text)]
        rows += split(tokens, room)
    if len(rows) > 1 and not rows[-1]:  # nothing comes after the last BREAK
        rows.pop()
    return tuple(framed(row, tokenizer) for row in rows)


def split(tokens: Sequence[WeightedToken], room: int) -> Iterator[list[WeightedToken]]:
    """Rows of at most `room` tokens. A row that is full ends after a comma, if there is one among its last 20 tokens.

    What comes after the comma begins the next row. Where the next token is itself a comma, the row stays full.
    """
    start = 0
    while len(tokens) - start > room:
        end = start + room
        if tokens[end][0] != COMMA:
            ends = range(end, max(end - LOOK_BACK, start), -1)
            end = next((after for after in ends if tokens[after - 1][0] == COMMA), end)
        yield list(tokens[start:end])
        start = end
    yield list(tokens[start:])


def framed(row: Sequence[WeightedToken], tokenizer: Tokenizer) -> Chunk:
    padding = tokenizer.context_length - 2 - len(row)
    return Chunk(
        ids=(START, *(token for token, _ in row), END, *[tokenizer.pad_token] * padding),
        weights=(1.0, *(weight for _, weight in row), *[1.0] * (padding + 1)),
        length=len(row),
    )


def empty_chunk(tokenizer: Tokenizer) -> Chunk:
    """What fills up the shorter of two prompts."""
    return framed([], tokenizer)
