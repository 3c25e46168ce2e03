"""`sd tokens`: how a prompt is read. Needs no model."""

import argparse
import json
import shutil
import unicodedata
from collections.abc import Iterator, Sequence

from convert.errors import counted, shown
from sd.app.cli.flags import add_embeddings_flag, whole_number
from sd.app.cli.parser import Parser
from sd.app.errors import UsageError

WIDEST = 24  # columns for one token


def parser() -> Parser:
    parser = Parser(
        prog="sd tokens",
        description="Show how a prompt is read: its tokens, their ids and weights, and where each chunk of\n"
        "75 tokens ends. A + marks a token whose word continues in the next one; an embedding shows\n"
        "how many places it takes.",
        epilog='example:\n  sd tokens "a (red:1.3) lighthouse, [dawn:dusk:0.5]"',
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="as for sd txt2img")
    add("--prompt-file", "--prompt_file", metavar="FILE", help="one prompt, all of a file's text; - is standard input")
    add("--plain-prompts", "--plain_prompts", action="store_true", help="brackets and BREAK are text")
    add_embeddings_flag(add)
    add("--steps", "--ddim_steps", type=whole_number(1, 1000), default=30, metavar="N",
        help="for prompts that change during the steps (default: 30)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead")
    return parser


def run(args: argparse.Namespace) -> int:
    from sd.app.cli.prompt_files import read_prompt
    from sd.app.cli.terminal import Terminal
    from sd.app.jobs.model_folder import find
    from sd.app.jobs.request import ModelRequest
    from sd.app.jobs.tokens import texts_of
    from sd.files import embedded_model

    if (args.prompt is None) == (args.prompt_file is None):
        raise UsageError('give one of PROMPT and --prompt-file. Example: sd tokens "a (red:1.3) horse".')
    prompt = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
    places = tuple(find(place, "embeddings") for place in args.embeddings)
    request = ModelRequest(file=embedded_model(), embeddings=places)
    job, texts = texts_of(prompt, request, Terminal(quiet=True), steps=args.steps, plain=args.plain_prompts)
    if args.json:
        lora = {"lora": [use.as_flag for use in job.adapters]} if job.adapters else {}
        print(json.dumps({"event": "tokens", "prompt": prompt, **lora, "steps": args.steps, "texts": texts}))
        return 0
    for use in job.adapters:
        print(f"not words, but an adapter: {shown(use.in_brackets)}")
    columns = min(80, shutil.get_terminal_size().columns)
    for i, text in enumerate(texts):
        if len(texts) > 1:
            print(("\n" if i else "") + f"{step_ranges(text['steps'])} of {args.steps}: {shown(text['text'], 2000)}")
        for line in strip_lines(text["chunks"], columns):
            print(line)
    return 0


def step_ranges(steps: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "steps 1-3, 7", the first eight ranges"""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return ("steps " if len(steps) > 1 else "step ") + ", ".join(words[:8]) + (" ..." if len(words) > 8 else "")


def strip_lines(chunks: Sequence[dict], columns: int) -> Iterator[str]:
    """The chunks as strips of three rows: tokens, ids, and weights other than 1."""
    for i, chunk in enumerate(chunks, 1):
        tokens = chunk["tokens"]
        room = len(chunk["ids"]) - 2
        yield f"chunk {i} of {len(chunks)}: {counted(len(tokens), 'token')} of {room}"
        first = [token for token in tokens if token.get("vector", 1) == 1]
        for number, cells in enumerate(rows_of([cell(token) for token in first], columns)):
            if number:
                yield ""
            widths = [max(map(width, column)) for column in cells]
            for row in filter(any, zip(*cells, strict=True)):
                padded = [text + " " * (wide - width(text)) for text, wide in zip(row, widths, strict=True)]
                yield ("  " + "  ".join(padded)).rstrip()


def cell(token: dict) -> tuple[str, str, str]:
    """One column of the strip."""
    weight = "" if token["weight"] == 1 else f"x{token['weight']:.4g}"
    if "embedding" in token:
        return shown(token["embedding"], WIDEST), counted(token["vectors"], "vector"), weight
    text = token["text"]
    word = shown(text.removesuffix(" "), WIDEST) + ("" if text.endswith(" ") else "+")
    return word, str(token["id"]), weight


def rows_of(cells: Sequence[tuple[str, str, str]], columns: int) -> Iterator[list[tuple[str, str, str]]]:
    """Rows of as many cells as fit into the columns."""
    row: list[tuple[str, str, str]] = []
    used = 0
    for one in cells:
        wide = 2 + max(map(width, one))
        if row and used + wide > columns:
            yield row
            row, used = [], 0
        row, used = [*row, one], used + wide
    if row:
        yield row


def width(text: str) -> int:
    """Columns on a terminal: two for wide characters, none for combining ones."""
    visible = [character for character in text if not unicodedata.combining(character)]
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in visible)
