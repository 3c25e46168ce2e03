"""Ray as an engine: a loaded model in each worker, shards as its tasks.

Pictures never leave a worker but as a shard's files: the driver sends lines and gets sizes and hashes, and has as many
shards in flight as there are workers. A worker that is lost, with its node or alone, loses the shard that it was
making; another makes that anew, and a new worker is started as soon as Ray has room for it.
"""

import os
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass

from convert.errors import counted
from sd.app.errors import JobError, UsageError
from sd.app.jobs.request import Events, JobRequest, Line
from sd.app.shards.facts import stats_of
from sd.app.shards.maker import Maker
from sd.app.shards.request import ShardRequest, shard_name
from sd.app.shards.run import WAIT, Todo, report
from sd.app.shards.store import Store, store_at

RETRIES = 5  # of a shard whose worker was lost
STARTS = 5  # of each worker, on average
TOLD = ("pictures", "failed", "files", "seconds")  # what the driver is told of a shard
Shard = tuple[int, tuple[Line, ...]]


class Worker:
    """A process of the cluster with a model. What goes wrong at the start is told by `start`."""

    def __init__(self, job: JobRequest, folder: str):
        with suppress(OSError):
            os.chdir(folder)  # of the driver, where paths that are not absolute begin
        self.job, self.heard, self.done = job, Heard(), 0

    def start(self) -> tuple[str, str, str]:
        """Open the model's file: what is wrong with it, if anything; device and precision."""
        self.maker = Maker(self.job, self.heard)
        try:
            self.maker.__enter__()
        except Exception as error:
            return f"{str(error) or type(error).__name__} ({platform.node()})", "", ""
        return "", self.maker.device, self.maker.precision

    def make(self, number: int, lines: Sequence[Line], facts: Mapping[str, object]) -> tuple[dict | None, list[str]]:
        """Make a shard: what is told of it, as `Maker.make` does, and warnings."""
        import torch

        self.done = 0
        with torch.no_grad():
            try:
                stats = self.maker.make(number, lines, store_at(self.job.out), facts, self._advance)
            except JobError as error:
                stats = {"problem": str(error)}
        warnings, self.heard.warnings = self.heard.warnings, []
        return stats and {name: value for name, value in stats.items() if name in (*TOLD, "problem")}, warnings

    def progress(self) -> int:
        """How many pictures of the present shard are done."""
        return self.done

    def _advance(self) -> None:
        self.done += 1


class Heard(Events):
    """Keeps warnings for the driver."""

    def __init__(self):
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass(eq=False)
class Hand:
    """A worker as the driver knows it: its actor, and how many pictures of its shard are done."""

    actor: object
    done: int = 0


class Ray:
    """The engine. A context: it connects to a cluster, or starts one on this machine.

    address  of the cluster; None: as the environment says, else one on this machine
    workers  how many; None: as many as there is room for now
    gpus     of each worker; a half lets two share one; None: one where there are any
    cpus     of each worker, and so its threads
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        gpus: float | None = None,
        cpus: float = 1,
    ):
        self.address, self.workers, self.gpus, self.cpus = address, workers, gpus, cpus
        self.starts = 0
        self.starting: dict[object, Hand] = {}  # by what they will answer, as in the next two
        self.making: dict[object, tuple[Hand, Shard]] = {}
        self.asked: dict[object, Hand] = {}
        self.idle: list[Hand] = []

    def __enter__(self) -> "Ray":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UsageError("--engine ray needs the package ray: pip install ray.") from None
        self.ray, self.is_ours = ray, not ray.is_initialized()
        self.others = ExitStack()  # Ray prints the logs of lost nodes to stdout, which is for results
        self.others.enter_context(redirect_stdout(self.others.enter_context(open(os.devnull, "w"))))
        if self.is_ours:
            try:
                ray.init(address=self.address, log_to_driver=False, logging_level="error")
            except (ConnectionError, RuntimeError, ValueError) as error:
                self.others.close()
                place = f"--address {self.address}" if self.address else "--engine ray"
                raise UsageError(f"{place}: no Ray cluster answers: {str(error).splitlines()[0][:200]}") from None
        return self

    def __exit__(self, *_: object) -> None:
        for hand in [*self.starting.values(), *self.idle, *(hand for hand, _ in self.making.values())]:
            self.ray.kill(hand.actor)
        if self.is_ours:
            self.ray.shutdown()
        self.others.close()

    def device(self, request: ShardRequest, _: Maker) -> tuple[str, str]:
        """Start the first worker; its device and precision. Raises UsageError if it cannot."""
        room = self.ray.cluster_resources()
        gpus, cpus = room.get("GPU", 0), room.get("CPU", 0)
        self.gpus = min(gpus, 1) if self.gpus is None else self.gpus
        if self.workers is None:
            self.workers = int(min(cpus // self.cpus, gpus // self.gpus if self.gpus else cpus))
        if self.workers < 1:
            raise UsageError(
                f"the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs: no room for a worker of {self.cpus:g} and "
                f"{self.gpus:g}. Give --cpus-per-worker or --gpus-per-worker."
            )
        self.job = request.job
        remote = self.ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, concurrency_groups={"telling": 1})
        self.kind = remote(Worker)
        self._start()  # the others wait until all lines are checked
        while True:
            (ref,), _ = self.ray.wait(list(self.starting))
            if found := self._started(ref):
                return found

    def _start(self) -> None:
        self.starts += 1
        if self.starts > STARTS * (self.workers + RETRIES):
            raise JobError(f"workers do not stay alive: {self.starts - 1} were started. Finished shards are kept.")
        hand = Hand(self.kind.remote(self.job, os.getcwd()))
        self.starting[hand.actor.start.remote()] = hand

    def _started(self, ref: object) -> tuple[str, str] | None:
        """Take in a worker that answers: its device and precision. Start another if it was lost."""
        hand = self.starting.pop(ref)
        try:
            problem, *found = self.ray.get(ref)
        except self.ray.exceptions.RayActorError:
            self._start()
            return None
        if problem:
            raise UsageError(f"a worker cannot start: {problem}")
        self.idle.append(hand)
        return tuple(found)

    def __call__(
        self,
        request: ShardRequest,
        maker: Maker,
        store: Store,
        facts: Mapping[str, object],
        todo: Todo,
        events: Events,
    ) -> int:
        """Have the shards made. Returns how many pictures could not be made."""
        events.note(f"{counted(self.workers, 'worker')} on Ray, {facts['precision']} on {facts['device']}")
        for _ in range(self.workers - 1):
            self._start()
        run = Run(self, store, facts, todo, events)
        with events.stage("pictures", facts["prompts"]["lines"] * facts["count"], "picture") as advance:
            while run.hand_out():
                refs = [*self.starting, *self.making]
                ready = self.ray.wait(refs, timeout=WAIT)[0] if refs else time.sleep(WAIT)
                for ref in ready or ():
                    if ref not in self.starting:
                        run.take(ref)
                    elif (found := self._started(ref)) and found != (facts["device"], facts["precision"]):
                        raise UsageError(
                            f"one worker has {facts['precision']} on {facts['device']}, another {found[1]} on "
                            f"{found[0]}: their pictures differ. Give --device and --precision."
                        )
                run.tell(advance)
        return run.failed


class Run:
    """What the driver knows while shards are made: little for each worker, nothing for shards that are done."""

    def __init__(self, engine: Ray, store: Store, facts: Mapping[str, object], todo: Todo, events: Events):
        self.engine, self.store, self.facts, self.todo, self.events = engine, store, facts, todo, events
        self.again: deque[Shard] = deque()  # of workers that were lost, and those that another engine makes
        self.not_before = 0.0  # when the latter are looked at again
        self.ask_at = 0.0  # when workers are asked how far they are
        self.lost: Counter[int] = Counter()  # workers that a shard has lost
        self.failed = self.finished = self.told = 0  # pictures

    def hand_out(self) -> bool:
        """Give each idle worker a shard; False when all are done."""
        engine = self.engine
        while engine.idle:
            later = time.monotonic() < self.not_before
            shard = self.again.popleft() if self.again and not later else next(self.todo, None)
            if shard is None:
                break
            hand = engine.idle.pop()
            engine.making[hand.actor.make.remote(*shard, self.facts)] = hand, shard
        return bool(engine.making or self.again)

    def take(self, ref: object) -> None:
        """What became of a shard."""
        engine = self.engine
        hand, (number, lines) = engine.making.pop(ref)
        name, hand.done = shard_name(number), 0
        try:
            told, warnings = engine.ray.get(ref)
        except engine.ray.exceptions.RayActorError:
            self.lost[number] += 1
            if self.lost[number] > RETRIES:
                raise JobError(
                    f"shard {name} has lost {self.lost[number]} workers. Finished shards are kept."
                ) from None
            self.events.warn(f"shard {name}: its worker was lost; it is made anew")
            self.again.append((number, lines))
            engine._start()
            return
        engine.idle.append(hand)
        for text in warnings:
            self.events.warn(text)
        if told is None:  # another engine is making it
            self.again.append((number, lines))
            self.not_before = time.monotonic() + WAIT
        elif not told:  # another engine has made it
            self.finished += len(lines) * self.facts["count"]
        elif "problem" in told:
            self.events.warn(f"shard {name} is left out: {told['problem']}")
            self.failed += len(lines) * self.facts["count"]
        elif not self.finished and stats_of(self.store, self.facts, number) is None:
            raise UsageError(
                f"a worker has written shard {name}, but it is not in {self.store.shown('')} here. Give an --out that "
                "all machines share: a folder, or a URL."
            )
        else:
            self.finished += told["pictures"]
            self.failed += len(told["failed"])
            report(self.store, self.facts, number, told, self.events)

    def tell(self, advance: Callable[[int], object]) -> None:
        """Move the progress to what workers say; each is asked again once it has answered."""
        ray, asked = self.engine.ray, self.engine.asked
        for ref in ray.wait(list(asked), num_returns=len(asked), timeout=0)[0] if asked else ():
            hand = asked.pop(ref)
            with suppress(ray.exceptions.RayActorError):
                hand.done = ray.get(ref)
        hands = [hand for hand, _ in self.engine.making.values()]
        if time.monotonic() >= self.ask_at:
            self.ask_at = time.monotonic() + WAIT
            for hand in {*hands} - {*asked.values()}:
                asked[hand.actor.progress.options(concurrency_group="telling").remote()] = hand
        done = self.finished + sum(hand.done for hand in hands)
        advance(max(0, done - self.told))
        self.told = max(self.told, done)
