"""`sd shards`: whether a run in shards is complete."""

import argparse
import json
from dataclasses import asdict

from convert.errors import counted, shown
from sd.app.cli import say
from sd.app.cli.parser import Parser

RIGHT, WRONG = 0, 1


def parser() -> Parser:
    parser = Parser(
        prog="sd shards",
        description="What sd txt2img --shard-size wrote: verify it.",
        epilog="examples:\n  sd shards verify out/\n\nsd shards COMMAND --help describes a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser, required=True)
    verifying = commands.add_parser(
        "verify",
        help="check that all shards are there, and as they were written",
        description="Read every shard of a run: each must be there, with each of its samples once, as it was\n"
        "written. Names what is missing or damaged. Exit code 0 if all is right, else 1.",
    )
    verifying.add_argument("out", metavar="OUT", help="the folder or URL that was given as --out")
    verifying.add_argument("--json", action="store_true", help="one JSON object a shard")
    return parser


def run(args: argparse.Namespace) -> int:
    from sd.app.shards.store import store_at
    from sd.app.shards.verify import verify

    counts, pictures = {"right": 0, "missing": 0, "damaged": 0}, 0
    for verdict in verify(store_at(args.out)):
        counts[verdict.state] += 1
        pictures += verdict.pictures
        if args.json:
            print(json.dumps(asdict(verdict)))
        elif verdict.state != "right" or verdict.problem:
            problem = f": {shown(verdict.problem, 500)}" if verdict.problem else ""
            print(f"{verdict.state:<8} {shown(verdict.shard)}{problem}")
    whole = counts["right"] == sum(counts.values())
    if not args.json:
        bad = ", ".join(f"{number} {state}" for state, number in counts.items() if number and state != "right")
        print(
            f"{counted(counts['right'], 'shard')} right, with {counted(pictures, 'picture')}"
            + (f"; {bad}" if bad else "")
        )
    if counts["damaged"]:
        say("remove the files of damaged shards; then the command that made them makes them again.")
    return RIGHT if whole else WRONG
