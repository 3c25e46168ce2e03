r"""The syntax of prompts: weights, breaks between chunks, and words that change from step to step.

    (a) (a:1.3) [a]     weight a by 1.1, by 1.3, by 1/1.1; brackets nest
    BREAK               the rest begins a new chunk
    [a:b:0.4] [a:b:12]  a for the first 40 % of the steps, or for the first 12 steps; then b
    [a:0.4] [a::0.4]    nothing, then a; a, then nothing
    [a|b|c]             a, b, c in turn, one per step
    \( \) \[ \] \: \| \\  the character itself
    <lora:detail:0.8>   an adapter, wherever it stands; it is taken out before all else is read

`text_at` resolves what depends on the step, `read_weights` the rest. The syntax is that of the web UI for which most
prompts are written; docs/prompts.md lists all rules and the differences.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

STRONGER, WEAKER = 1.1, 1 / 1.1  # factors of plain round and square brackets
LARGEST_WEIGHT = 10
OPENING = {")": "(", "]": "["}

# Regular expressions: what `text_at` reads at a time, the number in [a:b:0.4], and what `read_weights` reads at a time.
# In "embedding:easy", the colon belongs to the name of a learned word.
MARK = re.compile(r"\\.|\bembedding:|[\[\]():|]|(?:(?!\bembedding:)[^\\\[\]():|])+|\\", re.DOTALL)
STEP = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
WEIGHT_MARK = re.compile(
    r"""\\(?P<escaped>[()\[\]:|\\])
    | :\s*(?P<weight>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+|nan|inf))\s*\)
    | (?P<bracket>[()\[\]])
    | [^\\()\[\]:]+ | [\\:]""",
    re.VERBOSE,
)
BREAK = re.compile(r"\bBREAK\b")
ADAPTER = re.compile(r"<(?:lora|lyco):[^<>]+>", re.IGNORECASE)  # see `sd.text.prompt_adapters`


class PromptError(ValueError):
    """An invalid prompt. Its text continues a sentence whose subject is the prompt: "gives 'red' the weight 99 …"."""


class Piece(NamedTuple):
    """A part of a text with one weight."""

    text: str
    weight: float


class OpenBracket:
    """An open bracket and the text read since; in square brackets, ":" and "|" split it into parts."""

    def __init__(self, opening: str):
        self.opening = opening
        self.parts = [""]
        self.separators = ""
        self.last_is_plain = True  # the last part contains no brackets

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
        """The text that the bracket stands for at a step, once closed."""
        if set(self.separators) == {"|"}:
            return self.parts[step % len(self.parts)]
        if edit := self.edit():
            before, after, number = edit
            return before if step < first_steps(number, steps) else after
        return self.as_text() + closing

    def in_second_pass(self, steps: int, second: int, closing: str) -> str:
        """What the bracket becomes after a first pass of `steps`, before a second one of `second` steps."""
        if edit := self.edit():
            before, after, number = edit
            left = first_steps(number, second, passed=steps)
            return f"[{before}:{after}:{left}]" if left else after
        return self.as_text() + closing

    def edit(self) -> tuple[str, str, str] | None:
        """The text before, the text after, and when it changes; None if the bracket is no edit."""
        number = STEP.fullmatch(self.parts[-1])
        if self.separators in (":", "::") and number and self.last_is_plain:
            return *("", *self.parts[:-1])[-2:], number[1]
        return None


def first_steps(number: str, steps: int, *, passed: int = 0) -> int:
    """The steps that a number means: a share of all steps if it has a point or is below 1, else a count.

    passed  steps of a first pass, if this is the second: counts go on from there, and its shares are 1 to 2
    """
    value = float(number)
    if "." in number or value < 1:
        value = (value - (passed > 0)) * steps
    else:
        value -= passed
    return int(max(0.0, min(value, steps)))


def without_adapters(prompt: str) -> str:
    """The prompt without the adapters that it names. In negative prompts they are text, as in the web UI.

    >>> without_adapters("a [cat<lora:detail:0.8>:dog:0.5]")
    'a [cat:dog:0.5]'
    """
    return ADAPTER.sub("", prompt) if "<" in prompt else prompt


def text_at(prompt: str, step: int, steps: int) -> str:
    """The prompt as it stands at one step, 0 to steps - 1; weights and escapes are left in.

    >>> [text_at("a [cat:dog:0.5] [near|far]", step, 4) for step in range(4)]
    ['a cat near', 'a cat far', 'a dog near', 'a dog far']
    """
    return resolved(prompt, lambda bracket, closing: bracket.at(step, steps, closing))


def second_pass_text(prompt: str, steps: int, second: int) -> str:
    """The prompt of a second pass: edits whose time has come are done, the others count its own steps.

    steps, second  how many steps run in the first pass and in the second

    >>> second_pass_text("a [cat:dog:0.5] [near:far:1.5] [red:blue:23]", 20, 10)
    'a dog [near:far:5] [red:blue:3]'
    """
    return resolved(prompt, lambda bracket, closing: bracket.in_second_pass(steps, second, closing))


def resolved(prompt: str, resolve: Callable[[OpenBracket, str], str]) -> str:
    """The prompt with each pair of brackets replaced by what `resolve` makes of it and its closing bracket."""
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
            brackets[-1].add(resolve(inner, mark), plain=False)
        elif mark in OPENING:  # a closing bracket without a partner: the open brackets around it have none either
            done += [*(bracket.as_text() for bracket in brackets), mark]
            brackets = [OpenBracket("")]
        elif mark in (":", "|") and inner.opening == "[":
            inner.separate(mark)
        else:
            inner.add(mark)
    return "".join([*done, *(bracket.as_text() for bracket in brackets)])


@lru_cache(maxsize=256)
def timeline(prompt: str, steps: int, *, plain: bool = False) -> tuple[str, ...]:
    """The prompt as it stands at each step: `steps` texts. A plain prompt never changes."""
    if plain or text_at(prompt, 0, 1) == prompt:  # it does not depend on the step
        return (prompt,) * steps
    return tuple(text_at(prompt, step, steps) for step in range(steps))


@lru_cache(maxsize=256)
def read_weights(text: str) -> tuple[tuple[Piece, ...], ...]:
    r"""Split a text at every BREAK into sections, and each section into pieces of one weight.

    text     the prompt as it stands at one step
    returns  at least one section; no piece is empty, and neighbouring pieces differ in weight

    Raises PromptError for a weight that is not a number from -10 to 10.

    >>> read_weights(r"a (red:1.3) \(old\) horse BREAK [dusk]")[0]
    (Piece(text='a ', weight=1.0), Piece(text='red', weight=1.3), Piece(text=' (old) horse ', weight=1.0))
    """
    marks = list(WEIGHT_MARK.finditer(text))
    brackets = find_brackets(marks)
    products = {"(": [1.0], "[": [1.0]}  # for each kind of bracket: the product of the factors of those open
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
    """Find the brackets that change weights: index in `marks` -> kind, and the factor; None for a closing bracket.

    The two kinds are independent: in "(a [b) c]", b is in both. An opening bracket without a partner reaches to the
    end of the text; a closing one without a partner is text.
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
            r"Write \( and \) for brackets in the text itself."
        )
    if section and section[-1].weight == weight:
        text = section.pop().text + text
    section.append(Piece(text, weight))
