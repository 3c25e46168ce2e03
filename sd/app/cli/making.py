"""What the commands that make pictures do: all at once, or in shards."""

import argparse

from sd.app.cli.make_pictures import request_of
from sd.app.cli.shard_flags import asks_for_shards, engine_of, shard_request_of
from sd.app.cli.terminal import Terminal


def run(args: argparse.Namespace, task: str) -> int:
    """Make the pictures that the flags ask for.

    task  a key of `convert.families.table.TASKS`
    """
    terminal = Terminal(quiet=args.quiet, as_json=args.json)
    if asks_for_shards(args):
        from sd.app.shards.run import make_shards

        request = shard_request_of(args, task)
        with engine_of(args) as engine:
            make_shards(request, terminal, engine)
    else:
        from sd.app.jobs.run import make_pictures

        make_pictures(request_of(args, task), terminal)
    return 0
