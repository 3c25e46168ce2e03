r"""What is written in a prompt: weights, breaks between chunks, and words that change while a picture is made.

    (a) (a:1.3) [a]     a counts 1.1 times, 1.3 times, 1/1.1 times as much; brackets may stand in brackets
    BREAK               the rest begins a new chunk
    [a:b:0.4] [a:b:12]  a for the first 0.4 of the steps, or the first 12 steps; then b
    [a:0.4] [a::0.4]    nothing, then a; a, then nothing
    [a|b|c]             a, b, c by turns, one a step
    \( \) \[ \] \: \| \\  the character itself

`text_at` resolves what depends on the step, `read_weights` the rest. The syntax is that of the web UI for which most
prompts are written; docs/prompts.md has the rules one by one, and where they differ from it.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

STRONGER, WEAKER = 1.1, 1 / 1.1  # what plain round and square brackets multiply by
LARGEST_WEIGHT = 10
OPENING = {")": "(", "]": "["}

MARK = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
STEP = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
WEIGHT_MARK = re.compile(
    r"""\\(?P<escaped>[()\[\]:|\\])
    | :\s*(?P<weight>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+|nan|inf))\s*\)
    | (?P<bracket>[()\[\]])
    | [^\\()\[\]:]+ | [\\:]""",
    re.VERBOSE,
)
BREAK = re.compile(r"\bBREAK\b")


class PromptError(ValueError):
    """A prompt that cannot be meant so. Its text is the predicate of a sentence whose subject is the prompt."""


class Piece(NamedTuple):
    """A stretch of text that has one weight."""

    text: str
    weight: float


class OpenBracket:
    """A bracket and what has been read since, in parts: after a square one, colons and bars stand between them."""

    def __init__(self, opening: str):
        self.opening = opening
        self.parts = [""]
        self.separators = ""
        self.last_is_plain = True  # no bracket stands in the last part

    def add(self, text: str, *, plain: bool = True) -> None:
        self.parts[-1] += text
        self.last_is_plain = self.last_is_plain and plain

    def separate(self, mark: str) -> None:
        self.parts.append("")
        self.separators += mark
        self.last_is_plain = True

    def as_text(self) -> str:
        marks = (self.opening, *self.separators)
        return "".join(mark + part for mark, part in zip(marks, self.parts, strict=True))

    def at(self, step: int, steps: int, closing: str) -> str:
        """What it stands for at a step, now that it is closed."""
        if set(self.separators) == {"|"}:
            return self.parts[step % len(self.parts)]
        number = STEP.fullmatch(self.parts[-1])
        if self.separators in (":", "::") and number and self.last_is_plain:
            before, after = ("", *self.parts[:-1])[-2:]
            return before if step < first_steps(number[1], steps) else after
        return self.as_text() + closing


def first_steps(number: str, steps: int) -> int:
    """How many steps a number means: a share of all of them if it has a point or is below 1, else that many."""
    value = float(number)
    if "." in number or value < 1:
        value *= steps
    return int(max(0.0, min(value, steps)))


def text_at(prompt: str, step: int, steps: int) -> str:
    """The prompt as it stands at one step of 0 to steps - 1. Weights and escapes are still in it.

    >>> [text_at("a [cat:dog:0.5] [near|far]", step, 4) for step in range(4)]
    ['a cat near', 'a cat far', 'a dog near', 'a dog far']
    """
    if "[" not in prompt:
        return prompt
    done = []
    brackets = [OpenBracket("")]
    for mark in MARK.findall(prompt):
        inner = brackets[-1]
        if mark in ("(", "["):
            brackets.append(OpenBracket(mark))
        elif mark in OPENING and inner.opening == OPENING[mark]:
            brackets.pop()
            brackets[-1].add(inner.at(step, steps, mark), plain=False)
        elif mark in OPENING:  # it has no partner, and so none of the brackets that are open around it has one
            done += [*(bracket.as_text() for bracket in brackets), mark]
            brackets = [OpenBracket("")]
        elif mark in (":", "|") and inner.opening == "[":
            inner.separate(mark)
        else:
            inner.add(mark)
    return "".join([*done, *(bracket.as_text() for bracket in brackets)])


@lru_cache(maxsize=256)
def timeline(prompt: str, steps: int, *, plain: bool = False) -> tuple[str, ...]:
    """The prompt as it stands at each step: `steps` texts, all the same if it is plain."""
    if plain or text_at(prompt, 0, 1) == prompt:  # nothing changes
        return (prompt,) * steps
    return tuple(text_at(prompt, step, steps) for step in range(steps))


@lru_cache(maxsize=256)
def read_weights(text: str) -> tuple[tuple[Piece, ...], ...]:
    r"""The pieces of a text, each with its weight, in sections: a BREAK stands between two.

    text     of a prompt as it stands at a step
    returns  one section or more; they have no empty pieces, and no neighbours of equal weight

    Raises PromptError where a weight is outside of -10 to 10, or no number.

    >>> read_weights(r"a (red:1.3) \(old\) horse BREAK [dusk]")[0]
    (Piece(text='a ', weight=1.0), Piece(text='red', weight=1.3), Piece(text=' (old) horse ', weight=1.0))
    """
    marks = list(WEIGHT_MARK.finditer(text))
    brackets = find_brackets(marks)
    products = {"(": [1.0], "[": [1.0]}  # of the factors of all brackets that are open, for each kind
    sections: list[list[Piece]] = [[]]
    for i, mark in enumerate(marks):
        if i in brackets:
            kind, factor = brackets[i]
            if factor is None:
                products[kind].pop()
            else:
                products[kind].append(products[kind][-1] * factor)
            continue
        weight = products["("][-1] * products["["][-1]
        first, *others = [mark["escaped"]] if mark["escaped"] else BREAK.split(mark[0])
        add_piece(sections[-1], first, weight)
        for part in others:
            sections.append([])
            add_piece(sections[-1], part, weight)
    return tuple(tuple(section) for section in sections)


def find_brackets(marks: Sequence[re.Match]) -> dict[int, tuple[str, float | None]]:
    """Which marks are brackets that weight something: position -> kind, and the factor, None where it is closed.

    The two kinds do not see each other: in "(a [b) c]", b is in both. An opening bracket without a partner reaches to
    the end of the text; a closing one without a partner is text.
    """
    found: dict[int, tuple[str, float | None]] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for i, mark in enumerate(marks):
        kind = "(" if mark["weight"] else OPENING.get(mark["bracket"], "")
        if mark["bracket"] in opened:
            opened[mark["bracket"]].append(i)
            found[i] = (mark["bracket"], STRONGER if mark["bracket"] == "(" else WEAKER)
        elif kind and opened[kind]:
            if mark["weight"]:
                found[opened[kind][-1]] = (kind, float(mark["weight"]))
            opened[kind].pop()
            found[i] = (kind, None)
    return found


def add_piece(section: list[Piece], text: str, weight: float) -> None:
    if not text:
        return
    if not abs(weight) <= LARGEST_WEIGHT:  # nan included
        raise PromptError(
            f"gives {text.strip()[:40]!r} the weight {weight:g}; weights are {-LARGEST_WEIGHT} to {LARGEST_WEIGHT}. "
            r"Write \( and \) for brackets that are meant as text."
        )
    if section and section[-1].weight == weight:
        text = section.pop().text + text
    section.append(Piece(text, weight))
