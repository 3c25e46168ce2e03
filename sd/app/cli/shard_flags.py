"""From the flags of a command to a run in shards."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from sd.app.cli import say
from sd.app.cli.batch_files import seed_of_file, stream_batch_file
from sd.app.cli.make_pictures import count_of, expansion_of, job_of, settings_of
from sd.app.errors import UsageError
from sd.app.jobs.outputs import DEFAULT_OUT
from sd.app.jobs.request import Line
from sd.app.shards.part import part_of
from sd.app.shards.request import DEFAULT_SIZE, ShardRequest

NOT_IN_SHARDS = {  # what the flags of a run would mean for its pictures' files
    "grid": "--grid",
    "grid_columns": "--grid-columns",
    "save_steps": "--save-steps",
    "save_steps_as": "--save-steps-as",
    "force": "--force",
}


def asks_for_shards(args: argparse.Namespace) -> bool:
    return any(getattr(args, name) is not None for name in ("shard_size", "shards", "shard_table", "shard_picture"))


def shard_request_of(args: argparse.Namespace, task: str) -> ShardRequest:
    """The run in shards that the flags mean. Raises UsageError for flags that do not go with it."""
    for name, flag in NOT_IN_SHARDS.items():
        if getattr(args, name):
            raise UsageError(f"{flag} does nothing with shards, which hold the pictures. Leave it out.")
    if args.from_file is None or (args.prompt, args.prompt_flag, args.prompt_file) != (None, None, None):
        raise UsageError("shards are of a file of prompts: give --from-file FILE, and no other prompt.")
    if not Path(args.from_file).is_file():
        raise UsageError(
            f"--from-file {args.from_file} is not a file. Shards need one that can be read again, on every machine."
        )
    if args.out == DEFAULT_OUT or args.out.endswith(".png") or "{" in args.out or os.path.isfile(args.out):
        given = "" if args.out == DEFAULT_OUT else f", and not {args.out}"
        raise UsageError(f"shards need a folder of their own: give -o FOLDER{given}.")
    settings, seed = settings_of(args), args.seed
    if seed in (None, -1):
        seed = seed_of_file(args.from_file)
        say(f"seed {seed}, which follows from {args.from_file}", quiet=args.quiet)
    settings["seed"], count = seed, count_of(args, 1)
    expansion = expansion_of(args, settings, count)

    def lines() -> Iterator[Line]:
        for number, line in enumerate(stream_batch_file(args.from_file, args.parser)):
            yield from expansion.lines_of(line, number) if expansion else [line]

    return ShardRequest(
        job=job_of(
            args, task, lines=(), settings=settings, count=expansion.pictures_of_a_line if expansion else count,
            is_batch_file=True,
        ),
        lines=lines,
        source=args.from_file,
        size=args.shard_size or DEFAULT_SIZE,
        part=(1, 1) if args.shards is None else part_of(args.shards, os.environ),
        table=args.shard_table or "jsonl",
        picture=args.shard_picture or "png",
    )  # fmt: skip
