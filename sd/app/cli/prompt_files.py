"""Prompts from files: one whole text, or a line for each prompt."""

import argparse
import json
import sys
from pathlib import Path

from sd.app.errors import UsageError
from sd.app.jobs.request import Line
from sd.pipeline.errors import shortened
from sd.pipeline.settings import FIELDS, is_of_type, nearest


def setting_spellings(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Every spelling of a flag that is a setting of a picture, without its hyphens -> the setting."""
    return {
        spelling: action.dest
        for action in parser._actions
        if action.dest in FIELDS
        for flag in action.option_strings
        for spelling in (flag.lstrip("-"), flag.lstrip("-").replace("-", "_"))
    }


def read_batch_file(file: str, parser: argparse.ArgumentParser) -> tuple[Line, ...]:
    """One prompt or one JSON object per line. A key is any spelling of the parser's flags."""
    lines, spellings = [], setting_spellings(parser)
    for number, line in enumerate(read_text("--from-file", file).split("\n"), 1):
        where = f"{source_name(file)}, line {number}: "
        line = line.strip()
        if line:
            lines.append(Line(json_settings(where, line, spellings) if line[0] == "{" else {"prompt": line}, where))
    if not lines:
        raise UsageError(f"--from-file {file} has no prompts.")
    return tuple(lines)


def read_prompt(file: str) -> str:
    """The one prompt that is the whole text of a file, stripped."""
    prompt = read_text("--prompt-file", file).strip()
    if not prompt:
        raise UsageError(f"--prompt-file {file} has no prompt.")
    return prompt


def read_text(flag: str, file: str) -> str:
    """The text of a file that a flag names; - is standard input."""
    if file == "-" and sys.stdin is None:
        raise UsageError(f"{flag} -: standard input is closed.")
    raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{source_name(file)}, line {line}: not UTF-8 text. Save the file as UTF-8.") from None


def source_name(file: str) -> str:
    return "standard input" if file == "-" else file


class Pairs(list):
    """The names and values of a JSON object, in their order; a name may come twice."""


def shown_json(value: object) -> str:
    """A value of a JSON text, for a message."""
    if isinstance(value, Pairs):
        return "an object in braces"
    return shortened(value) if isinstance(value, list) else json.dumps(value)[:100]


def json_settings(where: str, line: str, spellings: dict[str, str]) -> dict[str, object]:
    """The settings in a line such as {"prompt": "a horse", "seed": 7}."""

    def whole_number(digits: str) -> int:
        if len(digits) > 40:
            raise UsageError(f"{where}no setting can be a number of {len(digits)} digits.")
        return int(digits)

    try:
        given = json.loads(line, object_pairs_hook=Pairs, parse_int=whole_number)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}not a JSON object: {error}. Each line must be one whole object.") from None
    own = {}
    for key, value in given:
        name = spellings.get(key, key)
        if name in own:
            raise UsageError(f"{where}{key!r} sets {name} for the second time.")
        if name not in FIELDS:
            raise UsageError(f"{where}{key[:60]!r} {nearest(key, FIELDS)}")
        if isinstance(value, Pairs) or not is_of_type(value, FIELDS[name]):
            raise UsageError(f"{where}{key} cannot be {shown_json(value)}.")
        own[name] = value
    if "prompt" not in own:
        raise UsageError(f'{where}no "prompt" given.')
    return own
