"""Makes shards with one loaded model: in this process, or as a worker of an engine."""

import json
import platform
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from sd import __version__
from sd.app.errors import JobError
from sd.app.jobs.model import opened, opened_refiner, pick_device_and_precision
from sd.app.jobs.plan import check_request, check_switch, varies, with_settings
from sd.app.jobs.request import Events, JobRequest, Line
from sd.app.jobs.run import Outputs, Planned, inputs_of, make_planned, planned
from sd.app.shards.facts import names_of, run_id, stats_of
from sd.app.shards.request import shard_name
from sd.app.shards.store import Store
from sd.app.shards.writing import Tar, write_table

if TYPE_CHECKING:
    from PIL import Image

    from sd.pipeline.stable_diffusion import StableDiffusion

AHEAD = 16  # pictures that wait to be encoded


class Maker(ExitStack):
    """A context in which the model's file is open: first checked against, then loaded.

    job  what all pictures share, with a seed and without lines
    """

    def __init__(self, job: JobRequest, events: Events):
        super().__init__()
        self.job, self.events, self.model = job, Once(events), None

    def __enter__(self) -> "Maker":
        super().__enter__()
        check_request(self.job)
        self.inputs = inputs_of(self.job, self.events)
        self.checkpoint, self._prepare = self.enter_context(opened(self.job.model, self.job.task))
        self.refiner = self.enter_context(opened_refiner(self.job.model))
        device, dtype = pick_device_and_precision(self.job.model, self.checkpoint.config)
        self.device, self.precision = device.type, str(dtype).removeprefix("torch.")
        return self

    def plan(self, lines: Sequence[Line], first: int) -> Planned:
        """The run of a shard, checked. first: the number of its first picture. Raises as `planned`."""
        request, settings = replace(self.job, lines=tuple(lines)), self.job.settings
        names = ("seed", "vary_seed") if varies(request) else ("seed",)
        seeds = {name: settings.get(name, settings["seed"]) + first for name in names}
        request = with_settings(request, **seeds)
        check_request(request)
        run = planned(request, self.checkpoint, self.refiner and self.refiner[0].config, self.inputs, self.events)
        if self.refiner:
            check_switch(run.jobs, self.checkpoint.config)
        return run

    def load(self) -> "StableDiffusion":
        if self.model is None:
            load, load_refiner = self._prepare(), self.refiner and self.refiner[1]()
            self.model = load(self.events)
            self.model.refiner = load_refiner and load_refiner(self.events)
        return self.model

    def make(
        self,
        number: int,
        lines: Sequence[Line],
        store: Store,
        facts: Mapping[str, object],
        advance: Callable[[], None] = lambda: None,
    ) -> dict | None:
        """Make a shard and give its stats; {} if it is there already, None while another process makes it.

        advance  called after each picture

        Raises JobError if there was not enough memory: then there is no shard. Pictures that the weights or settings
        make impossible, always and everywhere, are named in the stats.
        """
        name = shard_name(number)
        with store.held(name) as is_ours:
            if stats_of(store, facts, number):
                return {}
            if not is_ours:
                return None
            return self._make(number, lines, store, facts, advance)

    def _make(
        self, number: int, lines: Sequence[Line], store: Store, facts: Mapping[str, object], advance: Callable[[], None]
    ) -> dict:
        start, began = time.perf_counter(), datetime.now(timezone.utc)
        first = number * facts["shard_size"] * self.job.count
        run, model, taken = self.plan(lines, first), self.load(), {}
        watched = self.events.watched()
        tar_name, table_name, stats_name = names_of(facts, number)

        with store.writing(tar_name) as file, ThreadPoolExecutor(1) as beside:  # pictures are encoded beside the steps
            tar, adding = Tar(file, facts["picture"]), deque()

            def take(i: int, picture: "Image.Image", texts: Mapping[str, str], ms: int) -> None:
                adding.append(beside.submit(tar.add, key_of(first + i), picture, texts))
                if len(adding) > AHEAD:
                    adding.popleft().result()
                taken[key_of(first + i)] = ms
                advance()

            outputs = Outputs(jobs=run.jobs, seed_moved=0, paths=[], finished={}, sheet=None, take=take)
            try:
                make_planned(run, model, outputs, watched)
            except JobError:
                if not all(isinstance(error, ArithmeticError) for error in watched.failures.values()):
                    raise
            for added in adding:
                added.result()
            files = {tar_name: tar.close()}
        with store.writing(table_name) as file:
            files[table_name] = write_table(file, tar.rows, facts["table"])
        stats = {
            "shard": shard_name(number),
            "run": run_id(facts),
            "pictures": len(taken),
            "failed": {key_of(first + i): str(error) for i, error in sorted(watched.failures.items())},
            "files": files,
            "begun": began.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start, 3),
            "ms": dict(sorted(taken.items())),
            "made_by": {"host": platform.node(), "version": __version__, **model_versions()},
        }
        with store.writing(stats_name) as file:
            file.write(json.dumps(stats, ensure_ascii=False).encode() + b"\n")
        return stats


def key_of(picture: int) -> str:
    """The key of a sample: the number of its picture in the run, from 0."""
    return f"{picture:09}"


def model_versions() -> dict[str, str]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"torch": torch.__version__, "device": device}


class Once(Events):
    """Passes on what is said, each text once, and remembers failures."""

    def __init__(self, events: Events, said: set[str] | None = None):
        self.events, self.said = events, set() if said is None else said
        self.failures: dict[int, Exception] = {}

    def watched(self) -> "Once":
        """The same, with failures of its own."""
        return Once(self.events, self.said)

    def _new(self, text: str) -> bool:
        new = text not in self.said
        self.said.add(text)
        return new

    def note(self, text: str) -> None:
        if self._new(text):
            self.events.note(text)

    def warn(self, text: str) -> None:
        if self._new(text):
            self.events.warn(text)

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[..., object]]:
        return self.events.stage(name, total, unit)

    def failed(self, numbers: Sequence[int], error: Exception) -> None:
        self.failures |= dict.fromkeys(numbers, error)
