r"""Prompts with choices, such as "a {red|blue} __animal__": all that they can mean, or some drawn by a seed.

    {red|blue}            one of them; an option may be empty, and hold choices of its own
    {3::red|blue}         drawn three times as often as the others
    {2$$a|b|c}            two of them, joined by ", "; {1-3$$ and $$a|b|c}: one to three, joined by " and "
    __animal__            a line of animal.txt in the folder of wildcards; __big/animal__: of big/animal.txt
    \{  \|  \}  \__       these characters themselves

This is the syntax of the web UI's extension Dynamic Prompts. What is drawn depends on the seed, the number of the line
and the number of the picture alone, so that every machine and every version of Python draws the same.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, count
from pathlib import Path

from sd.app.errors import UsageError
from sd.pipeline.errors import nearest

MODES = ("all", "random")  # what --choices makes of them: every combination, or one that is drawn
LARGEST_FILE = 16 << 20  # bytes of a file
NAME = re.compile(r"__([^\W_][\w/-]*?)__")
HOW_MANY = re.compile(r"\s*(\d{1,4})(?:-(\d{1,4}))?\$\$(?:([^{}|$]*)\$\$)?")
WEIGHT = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?|\.\d{1,6})::")
ESCAPED = re.compile(r"\\([{|}]|__)")
MARK = re.compile(r"\\.|[{|}]", re.DOTALL)


@dataclass(frozen=True)
class Choice:
    """`least` to `most` of the options, joined; each option has a weight and its parts."""

    options: tuple[tuple[float, "Parts"], ...]
    least: int = 1
    most: int = 1
    joiner: str = ", "


Parts = tuple[str | Choice, ...]
Draw = Callable[[], float]  # the next number in [0, 1)


@dataclass
class Wildcards:
    """The files of a folder, each with an option a line; empty lines and those that begin with # do not count."""

    folder: Path | None = None
    found: dict[str, Choice] = field(default_factory=dict)

    def __post_init__(self):
        if self.folder is not None and not self.folder.is_dir():
            raise UsageError(f"--wildcards {self.folder} is not a folder. Give the one that holds files such as a.txt.")

    def choice(self, name: str, within: tuple[str, ...] = ()) -> Choice:
        """The options of `__name__`. within: the wildcards whose lines are being read. Raises UsageError."""
        if name in within:
            raise UsageError(f"__{name}__ contains itself, by way of {', '.join(within)}.")
        if name not in self.found:
            path = self.folder / f"{name}.txt"
            if not path.is_file():
                names = (
                    each.relative_to(self.folder).with_suffix("").as_posix() for each in self.folder.rglob("*.txt")
                )
                raise UsageError(f"__{name}__: {name}.txt {nearest(name, sorted(names))}")
            if path.stat().st_size > LARGEST_FILE:
                raise UsageError(f"{path} is longer than {LARGEST_FILE >> 20} MB. Split it.")
            try:
                lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
            except UnicodeDecodeError:
                raise UsageError(f"{path}: not UTF-8 text. Save the file as UTF-8.") from None
            options = [line for line in lines if line and not line.startswith("#")]
            if not options:
                raise UsageError(f"{path} has no lines.")
            self.found[name] = Choice(tuple(_option(line, self, (*within, name)) for line in options))
        return self.found[name]


def parse(text: str, wildcards: Wildcards, within: tuple[str, ...] = ()) -> Parts:
    """The parts of a prompt: texts and choices in turn. Raises UsageError for a brace without its other half."""
    parts: list[str | Choice] = []
    place = 0
    while place < len(text):
        if escaped := ESCAPED.match(text, place):
            piece, place = escaped[1], escaped.end()
        elif text[place] == "\\":
            piece, place = text[place : place + 2], place + 2
        elif text[place] == "{":
            end = _closing(text, place)
            piece, place = _choice(text[place + 1 : end], wildcards, within), end + 1
        elif text[place] == "}":
            raise UsageError(r"a } closes nothing. Write \} for the character itself.")
        elif wildcards.folder and (name := NAME.match(text, place)):
            piece, place = wildcards.choice(name[1], within), name.end()
        else:
            piece, place = text[place], place + 1
        if isinstance(piece, str) and parts and isinstance(parts[-1], str):
            parts[-1] += piece
        else:
            parts.append(piece)
    return tuple(parts)


def _closing(text: str, start: int) -> int:
    """Where the brace closes that opens at `start`."""
    depth = 0
    for mark in MARK.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return mark.start()
    raise UsageError(r"a { is opened and not closed. Close it, or write \{ for the character itself.")


def _choice(inside: str, wildcards: Wildcards, within: tuple[str, ...]) -> Choice:
    """The choice in a pair of braces."""
    number = HOW_MANY.match(inside)
    start = depth = 0
    if number:
        start = number.end()
    texts = []
    for mark in MARK.finditer(inside, start):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if mark[0] == "|" and depth == 0:
            texts.append(inside[start : mark.start()])
            start = mark.end()
    options = tuple(_option(text, wildcards, within) for text in [*texts, inside[start:]])
    if not number:
        return Choice(options)
    if len(options) == 1 and len(options[0][1]) == 1 and isinstance(options[0][1][0], Choice):
        options = options[0][1][0].options  # {2$$__animal__}: two lines of the file
    least, most = int(number[1]), int(number[2] or number[1])
    if not least <= most <= len(options):
        raise UsageError(f"{{{inside[:60]}}} cannot take {number[0].split('$$')[0].strip()} of {len(options)}.")
    return Choice(options, least, most, ", " if number[3] is None else number[3])


def _option(text: str, wildcards: Wildcards, within: tuple[str, ...]) -> tuple[float, Parts]:
    weight = WEIGHT.match(text)
    start = weight.end() if weight else 0
    return float(weight[1]) if weight else 1.0, parse(text[start:], wildcards, within)


def number_of(parts: Parts) -> int:
    """How many texts the parts can become."""
    return math.prod(1 if isinstance(part, str) else _number_of_choice(part) for part in parts)


def _number_of_choice(choice: Choice) -> int:
    ways = [1, *[0] * choice.most]  # ways[k]: to take k of the options so far
    for _, option in choice.options:
        texts = number_of(option)
        for taken in range(choice.most, 0, -1):
            ways[taken] += ways[taken - 1] * texts
    return sum(ways[choice.least :])


def all_of(parts: Parts) -> Iterator[str]:
    """Every text that the parts can become; the last choice changes first."""
    if not parts:
        yield ""
        return
    for first in [parts[0]] if isinstance(parts[0], str) else _all_of_choice(parts[0]):
        for rest in all_of(parts[1:]):
            yield first + rest


def _all_of_choice(choice: Choice) -> Iterator[str]:
    for taken in range(choice.least, choice.most + 1):
        for options in combinations([option for _, option in choice.options], taken):
            between = [part for option in options for part in (choice.joiner, *option)][1:]
            yield from all_of(tuple(between))


def one_of(parts: Parts, draw: Draw) -> str:
    """One of the texts that the parts can become."""
    return "".join(part if isinstance(part, str) else _one_of_choice(part, draw) for part in parts)


def _one_of_choice(choice: Choice, draw: Draw) -> str:
    left, taken = list(choice.options), []
    more = choice.most - choice.least
    for _ in range(choice.least + int(draw() * (more + 1) if more else 0)):
        mark = draw() * sum(weight for weight, _ in left)
        for place, (weight, _) in enumerate(left):
            mark -= weight
            if mark < 0 or place == len(left) - 1:
                break
        taken.append(left.pop(place)[1])
    return choice.joiner.join(one_of(option, draw) for option in taken)


def draws(*key: object) -> Draw:
    """Numbers in [0, 1) that follow from the key: from the first 53 bits of sha256 hashes."""
    numbers = count()
    start = "/".join(map(str, key))

    def draw() -> float:
        digest = hashlib.sha256(f"{start}/{next(numbers)}".encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

    return draw
