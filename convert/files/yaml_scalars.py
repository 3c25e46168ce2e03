"""A few scalars of a YAML file, by their place in it: all that a config beside a checkpoint is read for.

Block style and flow style, quotes, comments and texts over several lines are understood. Anchors are passed over; a
value that is only an alias for another place cannot be read. Of several documents, the first counts.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

LARGEST = 256 << 10  # bytes; the original configs have 2,000
DEEPEST = 64  # levels
KEY = re.compile(
    r"""("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^\s#"'{}\[\]][^\s#:]*(?:[ :#]+[^\s#:]+)*?)[ \t]*:(?:[ \t]+|$)"""
)
DOCUMENT = re.compile(r"(?:---|\.\.\.)(?=\s|$)")
PROPERTIES = re.compile(r"(?:[&!][^\s{}\[\],]*(?:[ \t]+|(?=\n|$)))*")  # anchors and tags
SPACE = re.compile(r"(?:\s+|(?<![^\s{}\[\],])#[^\n]*)*")  # in flow style, with comments
TOKEN = re.compile(
    r"""([{}\[\],]|:(?=[\s{}\[\],"']|$))                # a mark
    |("(?:[^"\\]|\\.)*"|'(?:[^']|'')*')                 # a quoted text
    |((?:[^{}\[\],:#"'\n]|:(?![\s{}\[\],]|$))           # a plain one
      (?:[^{}\[\],:\#\n]|:(?![\s{}\[\],]|$)|(?<=\S)\#)*)""",
    re.VERBOSE,
)
NULLS = ("", "~", "null", "Null", "NULL")


class YamlError(ValueError):
    """A file that cannot be read. Its text is the predicate of a sentence whose subject is the file."""


def read_scalars(path: Path, wanted: Collection[str]) -> dict[str, str]:
    """The texts at these places, such as "model.params.parameterization", as far as the file has them.

    Raises YamlError for a file that is damaged, too large, or no file.
    """
    reader = _Reader(_text(path), wanted)
    reader.read()
    return reader.found


def _text(path: Path) -> str:
    if not path.is_file():
        raise YamlError("is a link to a file that does not exist" if path.is_symlink() else "is not a file")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise YamlError(f"cannot be opened ({error.strerror})") from None
    if len(raw) > LARGEST:
        raise YamlError(f"is larger than {LARGEST >> 10} kB")
    try:
        text = raw.decode("utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except ValueError:
        raise YamlError("is damaged: it is not text") from None
    if "\0" in text:
        raise YamlError("is damaged: it is not text")
    if not text.strip():
        raise YamlError("is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Reader:
    def __init__(self, text: str, wanted: Collection[str]):
        self.text, self.wanted, self.found = text, set(wanted), {}

    def read(self) -> None:
        """Go through the lines. A key belongs to the nearest key above it that is indented less."""
        levels: list[tuple[int, str]] = []  # indentation and key of those around the current line
        position, begun = 0, False
        valued = -1  # how far a key is indented whose value has begun: lines that are indented more go on with it
        while position < len(self.text):
            start, end = position, self._end_of_line(position)
            position = end + 1
            line = self.text[start:end]
            if DOCUMENT.match(line):
                if begun:
                    return
                line = "   " + line[3:]
            content = line.strip()
            if not content or content[0] == "#" or (content[0] == "%" and not begun):
                continue
            begun, indent = True, len(line) - len(line.lstrip(" "))
            if -1 < valued < indent:
                continue
            if line[indent] == "\t":
                raise self._damaged("is indented with a tab", start)
            while content.startswith("- ") or content == "-":
                levels = self._with_level(levels, indent, "-")
                indent += len(content) - len(content[1:].lstrip())
                content = content[1:].lstrip()
            at = start + indent
            path = [name for _, name in levels]
            key = KEY.match(content) if content else None
            if key:
                levels, valued = self._with_level(levels, indent, _key(key[1])), -1
                path = [name for _, name in levels]
                at += key.end()
            elif content and content[0] not in "{[" and (not levels or levels[-1][0] >= indent):
                raise self._damaged("is not YAML", start)
            at = PROPERTIES.match(self.text, at, end).end()
            if self.text.startswith(("{", "["), at):
                position = self._end_of_line(self._flow(at, path)) + 1
            elif self.text.startswith(('"', "'"), at):
                quoted = TOKEN.match(self.text, at)
                if not quoted:
                    raise self._damaged("has a quote that is not closed", start)
                self._found(path, quoted[2])
                position = self._end_of_line(quoted.end()) + 1
            elif value := re.split(r"(?:^|\s)#", self.text[at:end], maxsplit=1)[0].strip():
                self._found(path, value)
                valued = levels[-1][0] if levels else -1

    def _flow(self, start: int, path: list[str]) -> int:
        """Read `{...}` or `[...]`; returns where it ends."""
        around: list[list[str]] = []  # mark and current key of each bracket that is open
        value, position = "", start
        while around or position == start:
            token = TOKEN.match(self.text, SPACE.match(self.text, position).end())
            if not token:
                raise self._damaged("has a bracket that is not closed", start)
            position, mark = token.end(), token[1]
            if mark is None:
                value = f"{value} {token[2] or token[3]}".strip()
            elif mark in "{[":
                around.append([mark, "-"])
                self._check_depth(around)
                value = ""
            elif mark == ":":
                around[-1][1], value = _key(value), ""
            else:
                self._found([*path, *(key for _, key in around)], PROPERTIES.sub("", value, count=1))
                around[-1][1], value = "-", ""
                if mark in "}]" and around.pop()[0] + mark not in ("{}", "[]"):
                    raise self._damaged("has brackets that do not go together", position)
        return position

    def _with_level(self, levels: list[tuple[int, str]], indent: int, key: str) -> list[tuple[int, str]]:
        levels = [*(level for level in levels if level[0] < indent), (indent, key)]
        self._check_depth(levels)
        return levels

    def _check_depth(self, levels: list) -> None:
        if len(levels) > DEEPEST:
            raise YamlError(f"has more than {DEEPEST} levels")

    def _end_of_line(self, position: int) -> int:
        end = self.text.find("\n", position)
        return len(self.text) if end < 0 else end

    def _damaged(self, what: str, position: int) -> YamlError:
        return YamlError(f"is damaged: line {1 + self.text.count(chr(10), 0, position)} {what}")

    def _found(self, path: list[str], text: str) -> None:
        place = ".".join(path)
        if text.startswith("*") and any(f"{name}.".startswith(f"{place.removesuffix('.<<')}.") for name in self.wanted):
            raise YamlError(f"has only an alias for {place}")
        if place not in self.wanted or text in NULLS:
            return
        if self.found.setdefault(place, _plain(text)) != _plain(text):
            raise YamlError(f"says {place} twice, and differently")


def _key(text: str) -> str:
    """The name of a key, whose dots are no steps of a place."""
    return _plain(text).replace(".", "/")


def _plain(text: str) -> str:
    """A scalar without its quotes."""
    if text[:1] == "'" and text[-1:] == "'":
        return text[1:-1].replace("''", "'")
    if text[:1] == '"' and text[-1:] == '"':
        try:
            return json.loads(text, strict=False)
        except ValueError:
            return text[1:-1]
    return text
