"""From the flags of a command to a run in shards."""

import argparse
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli import say
from sd.app.cli.batch_files import seed_of_file, stream_batch_file
from sd.app.cli.make_pictures import count_of, expansion_of, job_of, model_of, settings_of
from sd.app.errors import UsageError
from sd.app.jobs.outputs import DEFAULT_OUT
from sd.app.jobs.request import Line
from sd.app.shards.part import part_of
from sd.app.shards.request import DEFAULT_SIZE, ShardRequest

if TYPE_CHECKING:
    from sd.app.shards.run import Engine

NOT_IN_SHARDS = {  # what the flags of a run would mean for its pictures' files
    "grid": "--grid",
    "grid_columns": "--grid-columns",
    "save_steps": "--save-steps",
    "save_steps_as": "--save-steps-as",
    "force": "--force",
}


OF_SHARDS = ("shard_size", "shards", "shard_table", "shard_picture", "engine")
OF_ENGINE = {"address": "address", "workers": "workers", "gpus_per_worker": "gpus", "cpus_per_worker": "cpus"}


def asks_for_shards(args: argparse.Namespace) -> bool:
    """Raises UsageError for flags of an engine without one."""
    for name in OF_ENGINE:
        if getattr(args, name) is not None and args.engine is None:
            raise UsageError(f"--{name.replace('_', '-')} does nothing without --engine ray.")
    return any(getattr(args, name) is not None for name in OF_SHARDS)


def engine_of(args: argparse.Namespace) -> "AbstractContextManager[Engine | None]":
    """What makes the shards; None is this process. Raises UsageError for a number that cannot be."""
    if args.engine is None:
        return nullcontext()
    from sd.app.shards.ray_engine import Ray

    given = {ours: getattr(args, name) for name, ours in OF_ENGINE.items() if getattr(args, name) is not None}
    for name, lowest in (("cpus", 0.01), ("gpus", 0)):
        if not lowest <= given.get(name, 1) <= 1024:
            raise UsageError(f"--{name}-per-worker {given[name]:g} is out of range: {lowest:g} to 1024.")
    return Ray(**given)


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
    model = model_of(args)  # first: a refiner brings settings of its own
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
            args, task, model=model, lines=(), settings=settings, is_batch_file=True,
            count=expansion.pictures_of_a_line if expansion else count,
        ),
        lines=lines,
        source=args.from_file,
        size=args.shard_size or DEFAULT_SIZE,
        part=(1, 1) if args.shards is None else part_of(args.shards, os.environ),
        table=args.shard_table or "jsonl",
        picture=args.shard_picture or "png",
    )  # fmt: skip
