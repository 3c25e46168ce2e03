"""Prompts from files: one whole text, or a line for each prompt."""

import argparse
import difflib
import json
import os
import re
import select
import shlex
import stat
import sys
import time
from collections.abc import Iterable, Iterator

from sd.app.cli.parser import Parser
from sd.app.errors import UsageError
from sd.app.jobs.request import Line
from sd.pipeline.errors import shortened
from sd.pipeline.settings import FIELDS, LONGEST_PROMPT, is_of_type, nearest

LARGEST_FILE = 64 << 20  # bytes
PATIENCE = 10  # seconds to wait for somebody who writes to a named pipe
JSON_LINE = re.compile(r'\{\s*(["}]|$)')
UNQUOTED_KEY = re.compile(r"\{\s*'?([\w-]+)'?\s*:")
WEB_UI = {  # names of settings in its lines that are no spellings of our flags
    "sampler_name": "sampler",
    "scheduler": "schedule",
    "subseed_strength": "vary",
    "denoising_strength": "strength",
    "hr_scale": "hires",
    "hr_second_pass_steps": "hires_steps",
}
OF_THE_RUN = {  # the same for what all lines share
    **dict.fromkeys(("n_iter", "batch_count", "count"), "Give --count to the command."),
    **dict.fromkeys(("batch_size", "n_samples"), "Give --batch-size to the command."),
    **dict.fromkeys(("sd_model", "model", "ckpt"), "Give -m to the command."),
    "embeddings": "Give --embeddings to the command.",
    **dict.fromkeys(("outpath_samples", "outpath_grids", "out", "outdir"), "Give --out to the command."),
    **dict.fromkeys(("init", "init_img", "init_image"), "Give --init to the command."),
    "refiner": "Give --refiner to the command.",
    "mask": "Give --mask to the command.",
    "depth": "Give --depth to the command.",
    "invert_depth": "Give --invert-depth to the command.",
    "resize_mode": "Give --resize-mode to the command.",
}


def setting_spellings(parser: Parser) -> dict[str, argparse.Action]:
    """Every spelling of a flag that is a setting of a picture, without its hyphens -> the flag."""
    return {
        spelling: action
        for action in parser._actions
        if action.dest in FIELDS
        for flag in action.option_strings
        for spelling in (flag.lstrip("-"), flag.lstrip("-").replace("-", "_"))
    }


def lines_of(file: str, texts: Iterable[str], parser: Parser) -> Iterator[Line]:
    """A line each: a prompt; one that begins with `{"` is a JSON object, one that begins with `--` has flags.

    A key is any spelling of the parser's flags.
    """
    flags = setting_spellings(parser)
    for number, line in enumerate(texts, 1):
        where, line = f"{source_name(file)}, line {number}: ", line.strip()
        if len(line) > LONGEST_PROMPT:
            raise UsageError(f"{where}{len(line)} characters; a line has at most {LONGEST_PROMPT}.")
        if JSON_LINE.match(line):
            yield Line(json_settings(where, line, flags), where)
        elif line.startswith("--"):
            yield Line(flag_settings(where, line, flags, parser), where)
        elif (key := UNQUOTED_KEY.match(line)) and (key[1] in flags or key[1] in FIELDS):
            raise UsageError(f'{where}JSON has its keys in double quotes: {{"{key[1]}": ...}}.')
        elif line:
            yield Line({"prompt": line}, where)


def read_prompt(file: str) -> str:
    """The one prompt that is the whole text of a file, stripped."""
    prompt = read_text("--prompt-file", file).strip()
    if not prompt:
        raise UsageError(f"--prompt-file {file} has no prompt.")
    if len(prompt) > LONGEST_PROMPT:
        raise UsageError(f"--prompt-file {file} has {len(prompt)} characters; a prompt has at most {LONGEST_PROMPT}.")
    return prompt


def read_text(flag: str, file: str) -> str:
    """The text of a file that a flag names; - is standard input. Raises UsageError for one that does not end."""
    if file == "-" and sys.stdin is None:
        raise UsageError(f"{flag} -: standard input is closed.")
    raw = sys.stdin.buffer.read(LARGEST_FILE + 1) if file == "-" else read_bytes(flag, file)
    if len(raw) > LARGEST_FILE:
        raise UsageError(f"{flag} {file} is longer than {LARGEST_FILE >> 20} MB. Split it.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(file, raw[: error.start].count(b"\n") + 1) from None


def not_utf8(file: str, line: int) -> UsageError:
    return UsageError(f"{source_name(file)}, line {line}: not UTF-8 text. Save the file as UTF-8.")


def read_bytes(flag: str, file: str) -> bytes:
    """All of a file, or one byte more than the largest has. Raises UsageError for a pipe that nobody writes to."""
    begun = b""
    with open(file, "rb", opener=lambda path, how: os.open(path, how | getattr(os, "O_NONBLOCK", 0))) as stream:
        if stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
            begun = wait_for_writer(stream.fileno())
            if begun is None:
                raise UsageError(f"{flag} {file} is a pipe that nobody has written to for {PATIENCE} seconds.")
            os.set_blocking(stream.fileno(), True)
        return begun + stream.read(LARGEST_FILE + 1)


def wait_for_writer(pipe: int) -> bytes | None:
    """What a non-blocking pipe holds once somebody writes to it; None if nobody does."""
    poll, end = select.poll(), time.monotonic() + PATIENCE
    poll.register(pipe, select.POLLIN)
    while time.monotonic() < end:
        try:
            begun = os.read(pipe, 1 << 16)
        except BlockingIOError:  # somebody is about to write
            return b""
        if begun or poll.poll(100):  # written to, or closed again
            return begun
    return None


def source_name(file: str) -> str:
    return "standard input" if file == "-" else file


class Pairs(list):
    """The names and values of a JSON object, in their order; a name may come twice."""


def shown_json(value: object) -> str:
    """A value of a JSON text, for a message."""
    if isinstance(value, Pairs):
        return "an object in braces"
    return shortened(value) if isinstance(value, list) else json.dumps(value)[:100]


def json_settings(where: str, line: str, flags: dict[str, argparse.Action]) -> dict[str, object]:
    """The settings in a line such as {"prompt": "a horse", "seed": 7}."""

    def whole_number(digits: str) -> int:
        if len(digits) > 40:
            raise UsageError(f"{where}no setting can be a number of {len(digits)} digits.")
        return int(digits)

    try:
        given = json.loads(line, object_pairs_hook=Pairs, parse_int=whole_number)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}not a JSON object: {error}. Each line must be one whole object.") from None
    names = {key: flag.dest for key, flag in flags.items() if flag.const is not False}  # true means what it says
    return checked(where, ((key, names.get(key, key), value) for key, value in given))


def flag_settings(where: str, line: str, flags: dict[str, argparse.Action], parser: Parser) -> dict[str, object]:
    """The settings in a line such as --prompt "a horse" --steps 20, by our flags or the web UI's names."""
    try:
        words = shlex.split(line)
    except ValueError:
        raise UsageError(f"{where}a quote is opened and not closed. Put texts into double quotes.") from None
    given: list[tuple[str, list[str]]] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") or flag in parser._option_string_actions:
            given.append((flag, [value] if equals else []))
        else:
            given[-1][1].append(word)
    found = []
    for flag, values in given:
        name = flag.lstrip("-")
        action = flags.get(WEB_UI.get(name, name))
        if action is None:
            check_is_of_lines(where, flag)
        if action is None and name not in ("prompt", "p"):
            near = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
            hint = f" Did you mean --{near[0]}?" if near else ""
            raise UsageError(f"{where}{flag} is not a setting of a picture here.{hint}")
        try:
            value = " ".join(values) if action is None else value_of(action, values, parser)
        except UsageError as error:
            raise UsageError(f"{where}{error}") from None
        found.append((flag, "prompt" if action is None else action.dest, value))
    if loras := [value for _, name, value in found if name == "lora"]:  # can be given several times
        found = [*(row for row in found if row[1] != "lora"), ("--lora", "lora", loras)]
    return checked(where, found)


def value_of(action: argparse.Action, words: list[str], parser: Parser) -> object:
    """The value that words give to a flag. Raises UsageError."""
    text = " ".join(words)
    if action.nargs in (0, "?") and text.lower() in ("", "true", "1"):  # the web UI writes --tiling true
        return action.const
    if action.nargs in (0, "?") and text.lower() in ("false", "0"):
        return not action.const if isinstance(action.const, bool) else action.default
    if action.nargs == 0:
        raise UsageError(f"{action.option_strings[0]} takes no value, got {text!r}.")
    if not words:
        raise UsageError(f"{action.option_strings[0]} needs a value.")
    value = parser._get_value(action, text)
    parser._check_value(action, value)
    return value


def check_is_of_lines(where: str, key: str) -> None:
    """Raise UsageError for what is no setting of a line, but one of the command."""
    if problem := OF_THE_RUN.get(key.lstrip("-").replace("-", "_")):
        raise UsageError(f"{where}{key} is the same for all lines. {problem}")


def checked(where: str, given: Iterable[tuple[str, str, object]]) -> dict[str, object]:
    """The settings by our names, from each one's spelling, name and value. Raises UsageError."""
    own = {}
    for key, name, value in given:
        if name in own:
            raise UsageError(f"{where}{key!r} sets {name} for the second time.")
        if name not in FIELDS:
            check_is_of_lines(where, key)
            raise UsageError(f"{where}{key[:60]!r} {nearest(key, FIELDS)}")
        if isinstance(value, Pairs) or not is_of_type(value, FIELDS[name]):
            raise UsageError(f"{where}{key} cannot be {shown_json(value)}.")
        own[name] = value
    if "prompt" not in own:
        raise UsageError(f'{where}no "prompt" given.')
    return own
