"""A run in shards: everything is checked first, then what is missing is made, here or by an engine."""

import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from convert.errors import counted
from sd.app.errors import JobError
from sd.app.jobs.request import Events, Line
from sd.app.shards.facts import facts_of, keep, names_of, require_same, stats_of
from sd.app.shards.maker import Maker
from sd.app.shards.request import ShardRequest, shard_name
from sd.app.shards.store import Store, store_at
from sd.app.shards.writing import require_table

WAIT = 1.0  # seconds until shards that another process makes are looked at again
Todo = Iterator[tuple[int, tuple[Line, ...]]]


class Engine(Protocol):
    """Who makes the shards. `Here` is the plain one."""

    def device(self, request: ShardRequest, maker: Maker) -> tuple[str, str]:
        """The device and the precision that pictures are made with."""

    def __call__(
        self, request: ShardRequest, maker: Maker, store: Store, facts: Mapping[str, object], todo: Todo, events: Events
    ) -> int:
        """Make the shards of `todo`. Returns how many pictures could not be made."""


def make_shards(request: ShardRequest, events: Events, engine: Engine | None = None) -> None:
    """Make the shards of a part that are missing. Several processes may do so in one place: each shard is made once.

    Raises the errors of `sd.app.jobs.run.make_pictures`; UsageError where the place has shards of another run.
    """
    require_table(request.table)
    store, engine = store_at(request.job.out), engine or Here()
    with Maker(request.job, events) as maker:
        facts = facts_of(request, *engine.device(request, maker))
        require_same(store, facts)
        wanted = [number for number in range(facts["shards"]) if request.is_here(number)]
        there = store.names()
        missing = {n for n in wanted if names_of(facts, n)[-1] not in there or stats_of(store, facts, n) is None}
        if len(missing) < len(wanted):
            events.note(f"{len(wanted) - len(missing)} of {counted(len(wanted), 'shard')} exist already")
        if not missing:
            return
        for number, lines in request.shards():
            if number in missing:
                maker.plan(lines, number * request.size * request.job.count)
        store.make()
        keep(store, facts)
        todo = ((number, lines) for number, lines in request.shards() if number in missing)
        failed = engine(request, maker, store, facts, todo, events)
    if failed:
        raise JobError(f"{counted(failed, 'picture')} could not be made. The stats of the shards name them.")


class Here:
    """This process makes shard after shard."""

    def device(self, request: ShardRequest, maker: Maker) -> tuple[str, str]:
        return maker.device, maker.precision

    def __call__(
        self, request: ShardRequest, maker: Maker, store: Store, facts: Mapping[str, object], todo: Todo, events: Events
    ) -> int:
        maker.load()
        failed = 0

        def is_done(number: int, lines: tuple[Line, ...]) -> bool:
            nonlocal failed
            try:
                stats = maker.make(number, lines, store, facts)
            except JobError as error:  # another shard may need less memory
                events.warn(f"shard {shard_name(number)} is left out: {error}")
                failed += len(lines) * request.job.count
                return True
            if stats:
                report(store, facts, number, stats, events)
                failed += len(stats["failed"])
            return stats is not None

        later = [(number, lines) for number, lines in todo if not is_done(number, lines)]
        if later:
            events.note(f"another process makes {counted(len(later), 'shard')}: waiting for it")
        while later:
            time.sleep(WAIT)
            later = [(number, lines) for number, lines in later if not is_done(number, lines)]
        return failed


def report(store: Store, facts: Mapping[str, object], number: int, stats: Mapping[str, object], events: Events) -> None:
    """Tell that a shard is complete."""
    name = names_of(facts, number)[0]
    told = {"shard": number, "pictures": stats["pictures"], "sha256": stats["files"][name]["sha256"]}
    events.written("shard", store.shown(name), seconds=stats["seconds"], failed=len(stats["failed"]), **told)
