"""The text with settings that the web UI writes, taken apart: prompts, the line of settings, and what stands behind it.

    Steps: 20, Sampler: Euler a, Model: "a, b", Hashes: {"vae": "1"}, Styles: [a, b]

A value is text up to a comma, JSON text in quotes, or what a bracket encloses. One pass, whatever the text is.
"""

import json
import re
from typing import NamedTuple

LONGEST_TEXT = 1_000_000  # characters
MOST_SHOWN = 60  # characters of a part that cannot be used

STEPS = re.compile(r"^(?=.*?\bSteps:)", re.MULTILINE)  # a line that may begin the settings
SPACE = re.compile(r"[ \t]*")
NAME = re.compile(r"([^:,\"\[\]{}\n]{1,60}):[ \t]*")
STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
BRACKETS = re.compile(STRING.pattern + r"|[\[\]{}]", re.DOTALL)
FINISHED = re.compile(r"[ \t]*(?=[,\n]|\Z)")  # behind a value
END = re.compile(r"[,\n]|\Z")


class Parts(NamedTuple):
    """What a text consists of."""

    prompt: str
    negative_prompt: str
    values: dict[str, str]  # empty if no line is one of settings; then all of the text counts as prompts
    unused: list[str]  # text without a name among the values, second values of one name, and lines behind


def parts_of(text: str) -> Parts:
    """Take such a text apart. The last line of settings counts that is not inside a value of an earlier one."""
    text = text.replace("\r\n", "\n").strip("\n")
    start, end, values, unused = len(text), len(text), {}, []
    ends, behind = Ends(text), 0
    for line in STEPS.finditer(text):
        if line.start() < behind:
            continue
        found, rest, behind = values_of(text, line.start(), ends)
        if "Steps" in found and len(found) >= 3:
            start, end, values, unused = line.start(), behind, found, rest
    lines = text[:start].split("\n")
    first = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[first:]).removeprefix("Negative prompt:").strip()
    lines_behind = [line.strip()[:MOST_SHOWN] for line in text[end:].split("\n") if line.strip()]
    if len(lines_behind) > 4:
        lines_behind[3:] = [f"{len(lines_behind) - 3} more lines behind the settings"]
    return Parts("\n".join(lines[:first]).strip(), negative, values, unused + lines_behind)


def values_of(text: str, start: int, ends: "Ends") -> tuple[dict[str, str], list[str], int]:
    """The values in one line of settings; what of it cannot be used; and where it ends.

    A line break inside quotes or brackets belongs to the value. Of two values of one name, the first counts: the web
    UI writes its own settings before those of extensions.
    """
    values: dict[str, str] = {}
    unused = []
    i = start
    while True:
        i = SPACE.match(text, i).end()
        name = NAME.match(text, i)
        begin = i = name.end() if name else i
        value = None
        if name and text.startswith('"', i):
            end = ends.of_string(i)
            if end and FINISHED.match(text, end):
                value, i = _unquoted(text[begin:end]), end
        elif name and text[i : i + 1] in ("[", "{"):
            i = ends.of_bracket(i) or i
        i = END.search(text, i).start()
        value = text[begin:i].strip() if value is None else value
        if name is None:
            unused += [value[:MOST_SHOWN]] if value else []
        elif values.setdefault(name[1].rstrip(), value) != value:
            unused.append(f"{name[1].rstrip()}: {value[:MOST_SHOWN]} (a second value)")
        if not text.startswith(",", i):
            return values, unused, i
        i += 1


def _unquoted(text: str) -> str:
    try:
        return json.loads(text, strict=False)
    except ValueError:  # a backslash that means itself
        return text[1:-1]


class Ends:
    """Where strings and brackets end in a text. No part of the text is looked at twice."""

    def __init__(self, text: str):
        self.text = text
        self.string_end, self.string_is_closed = 0, False  # of the last string that was looked at
        self.looked_at, self.partners = 0, {}  # how far brackets were looked for; opening -> behind its closing one

    def of_string(self, start: int) -> int | None:
        """Where the string that begins at `start` ends; None if it does not. Escapes are in step with those of a
        string that began before and goes on, since its quote here was escaped."""
        if start >= self.string_end:
            found = STRING.match(self.text, start)
            self.string_end = found.end()
            self.string_is_closed = len(found[0]) > 1 and found[0].endswith('"') and not _is_escaped(found[0])
        return self.string_end if self.string_is_closed else None

    def of_bracket(self, start: int) -> int | None:
        """Behind the partner of the bracket at `start`; None if it has none."""
        if start >= self.looked_at:
            open_ones = []
            for mark in BRACKETS.finditer(self.text, start):
                self.looked_at = mark.end()
                if mark[0] in "[{":
                    open_ones.append(mark)
                elif mark[0] in "]}" and {"]": "[", "}": "{"}[mark[0]] == open_ones[-1][0]:
                    self.partners[open_ones.pop().start()] = mark.end()
                if not open_ones:
                    break
            else:
                self.looked_at = len(self.text)
        return self.partners.get(start)


def _is_escaped(string: str) -> bool:
    """Whether the quote that a text ends with is escaped."""
    before = string[:-1]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1
