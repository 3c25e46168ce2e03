"""The files of --from-file: texts with a prompt a line, and tables with a prompt a row."""

import argparse
import csv
import secrets
from collections.abc import Iterator
from pathlib import Path

from convert.errors import shown_list
from sd.app.cli import say
from sd.app.cli.parser import Parser
from sd.app.cli.prompt_files import (
    check_is_of_lines,
    checked,
    lines_of,
    not_utf8,
    read_text,
    setting_spellings,
    value_of,
)
from sd.app.errors import UsageError
from sd.app.jobs.request import Line
from sd.pipeline.settings import FIELDS, LONGEST_PROMPT, is_of_type

TABLES = (".csv", ".tsv", ".parquet")
PROMPT_COLUMNS = ("prompt", "caption", "text")  # what is read as the prompt; the first that a table has
ROWS_AT_A_TIME = 1000
Cells = dict[str, object]  # of a row, by the names of the columns; None is an empty cell


def read_batch_file(file: str, parser: Parser) -> tuple[Line, ...]:
    """All lines of a file, of at most 64 MB if it is a text. Raises UsageError."""
    if is_table(file):
        lines = tuple(lines_of_table(file, parser))
    else:
        lines = tuple(lines_of(file, read_text("--from-file", file).split("\n"), parser))
    if not lines:
        raise UsageError(f"--from-file {file} has no prompts.")
    return lines


def stream_batch_file(file: str, parser: Parser) -> Iterator[Line]:
    """The same lines, one by one, of a file of any length."""
    return lines_of_table(file, parser) if is_table(file) else lines_of(file, texts_of(file), parser)


def seed_of_file(file: str) -> int:
    """A seed of 32 bits that follows from a file's bytes; drawn for standard input."""
    from convert.files.hashing import file_sha256

    return secrets.randbits(32) if not Path(file).is_file() else int(file_sha256(Path(file))[:8], 16)


def is_table(file: str) -> bool:
    return Path(file).suffix.lower() in TABLES


def texts_of(file: str) -> Iterator[str]:
    """The lines of a text. Raises UsageError for other encodings than UTF-8."""
    with open(file, "rb") as stream:
        for number, raw in enumerate(iter(lambda: stream.readline(4 * LONGEST_PROMPT + 8), b""), 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise not_utf8(file, number) from None


def lines_of_table(file: str, parser: Parser) -> Iterator[Line]:
    """A line for each row. A column is called as a flag in any spelling; others are left out, and named.

    An empty cell leaves its setting to the command.
    """
    flags, columns = {key: flag for key, flag in setting_spellings(parser).items() if flag.const is not False}, None
    rows = rows_of_parquet(file) if Path(file).suffix.lower() == ".parquet" else rows_of_csv(file)
    for where, row in rows:
        if columns is None:
            columns = columns_of(file, list(row), flags)
        given = []
        for name, action in columns.items():
            value = row.get(name)
            if value is None:
                continue
            try:
                given.append((name, *setting_of(action, value, parser)))
            except UsageError as error:
                raise UsageError(f"{where}{error}") from None
        if any(name == "prompt" for _, name, _ in given):  # a row without a prompt is like an empty line
            yield Line(checked(where, given), where)
        elif given:
            raise UsageError(f"{where}no prompt given.")


def columns_of(file: str, names: list[str], flags: dict[str, argparse.Action]) -> dict[str, argparse.Action | None]:
    """The columns that are settings, with their flags; the prompt has none. Says which are left out."""
    plain = {name: name.strip().lower().replace(" ", "_").lstrip("-") for name in names}
    prompt = next((name for word in PROMPT_COLUMNS for name in names if plain[name] == word), None)
    if prompt is None:
        raise UsageError(f"--from-file {file} has no column prompt. It has: {shown_list(names)}.")
    for name in names:
        check_is_of_lines(f"{file}: the column ", plain[name])
    if unused := [name for name in names if name != prompt and plain[name] not in flags]:
        say(f"{file}: columns that are no settings are not used: {shown_list(unused)}")
    return {prompt: None, **{name: flags[plain[name]] for name in names if name != prompt and plain[name] in flags}}


def setting_of(action: argparse.Action | None, value: object, parser: Parser) -> tuple[str, object]:
    """The name and value of a setting in a cell. A text is read as a word of the command line."""
    name = action.dest if action else "prompt"
    if isinstance(value, str) and action:
        value = value_of(action, [value], parser)
        value = [value] if name == "lora" else value
    if isinstance(value, float) and value.is_integer() and not is_of_type(value, FIELDS[name]):
        value = int(value)  # how pandas writes whole numbers where some are missing
    return name, value


def rows_of_csv(file: str) -> Iterator[tuple[str, Cells]]:
    """The rows of a table of texts, the first of which names the columns; separated by commas, or tabs in a .tsv."""
    csv.field_size_limit(4 * LONGEST_PROMPT)
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t" if file.lower().endswith(".tsv") else ",", strict=True)
            names = next(reader, [])
            for row in reader:
                where = f"{file}, line {reader.line_num}: "
                if len(row) > len(names):
                    raise UsageError(
                        f"{where}{len(row)} cells, but {len(names)} columns. Put texts into double quotes."
                    )
                yield where, {**dict.fromkeys(names), **{name: text or None for name, text in zip(names, row)}}  # noqa: B905
    except UnicodeDecodeError:
        raise UsageError(f"{file}: not UTF-8 text. Save the file as UTF-8.") from None
    except csv.Error as error:
        raise UsageError(f"{file}, line {reader.line_num}: {error}. Put texts into double quotes.") from None


def rows_of_parquet(file: str) -> Iterator[tuple[str, Cells]]:
    """The rows of a Parquet file. Raises UsageError if it is none, or the package that reads it is missing."""
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UsageError(
            f"--from-file {file}: .parquet files need the package pyarrow: pip install pyarrow. "
            "Without it, .csv and .jsonl are read."
        ) from None
    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(ROWS_AT_A_TIME):
                for row in batch.to_pylist():
                    number += 1
                    yield (
                        f"{file}, row {number}: ",
                        {name: None if value == "" else value for name, value in row.items()},
                    )
    except ArrowInvalid as error:
        raise UsageError(f"{file} is no Parquet file, or a damaged one: {str(error).splitlines()[0][:200]}") from None
