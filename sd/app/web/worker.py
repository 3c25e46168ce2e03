"""One loaded model, one queue, and one thread that works on it."""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from convert.errors import CheckpointError, counted, shown
from sd.app.errors import JobError, UsageError, failure_of
from sd.app.jobs.model import opened, opened_refiner
from sd.app.jobs.outputs import name_pictures, picture_paths
from sd.app.jobs.plan import check_request, with_seeds
from sd.app.jobs.request import Events, JobRequest, ModelRequest
from sd.app.jobs.run import Outputs, Planned, inputs_of, make_planned, planned
from sd.app.jobs.unused import vae_problems
from sd.app.web.job import LAST, Job, StoppedError
from sd.app.web.job_events import JobEvents
from sd.app.web.limits import MOST_PAGES, MOST_PICTURES, MOST_PIXELS
from sd.app.web.memory import PictureMemory
from sd.app.web.models import Models
from sd.pipeline.errors import PictureError, SettingError

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint
    from sd.config import ModelConfig
    from sd.pipeline.stable_diffusion import StableDiffusion

log = logging.getLogger(__name__)
OURS = (UsageError, JobError, CheckpointError, SettingError, PictureError, OSError)  # whose text is for the user


class BusyError(Exception):
    """The queue is full, or the server is about to end."""


@dataclass(kw_only=True)
class Loaded:
    """A model in memory, and what its files say."""

    request: ModelRequest
    checkpoint: "Checkpoint"
    refiner: "ModelConfig | None"
    model: "StableDiffusion"
    dtypes: dict  # when it was loaded
    vaes: list[str]  # what is to be said of its VAEs
    preview: Callable | None = None


class Worker:
    """Makes the pictures of jobs, one job after the other, in the order in which they came.

    models        which a request can name; the default is loaded by `start`
    out           a folder or template for the files of the pictures
    keep          how many pictures stay in memory, and jobs that are over
    most_waiting  jobs; one more is refused

    A request's own `out` and `force` do not count. All functions may be called from any thread.
    """

    def __init__(
        self, models: Models, *, out: str, keep: int = 200, most_waiting: int = 100, max_megapixels: float = 64
    ):
        self.models, self.out = models, out
        self.memory, self.pages = PictureMemory(keep), PictureMemory(MOST_PAGES)
        self.keep, self.most_waiting, self.max_megapixels = keep, most_waiting, max_megapixels
        self.loaded: Loaded | None = None
        self.jobs: OrderedDict[str, Job] = OrderedDict()  # the latest last
        self.current: Job | None = None
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._planning = threading.Lock()  # one request at a time: its pictures take memory
        self._closed = False
        self._thread: threading.Thread | None = None

    # What the faces call

    def start(self, events: Events) -> None:
        """Load the default model, and begin to work. Raises what loading raises."""
        began, failed = threading.Event(), []

        def load() -> None:
            try:
                self._load(self.models.default, events)
            except BaseException as error:
                failed.append(error)
            finally:
                began.set()
            if not failed:
                self._work()

        self._thread = threading.Thread(target=load, name="worker", daemon=True)  # the one that computes also loads
        self._thread.start()
        began.wait()
        if failed:
            raise failed[0]

    def submit(self, request: JobRequest, **options: object) -> Job:
        """Check a request, and queue it.

        options  as in `Job`: previews, folder, work

        Raises UsageError and the errors of settings, pictures and checkpoints for what cannot be made; BusyError.
        """
        with self._changed:
            self._require_room()
        request = replace(request, out=self.out, force=False, names_only=True, max_megapixels=self.max_megapixels)
        check_limits(request)
        check_request(request)
        request = with_seeds(request)
        with self._planning:
            jobs = self.plan(request, Events()).jobs
        require_small_batches(request, jobs)
        job = Job(request=request, **options)
        job.of, job.steps = len(jobs), 0
        with self._changed:
            self._require_room()
            self._queue.append(job)
            self.jobs[job.id] = job
            self._forget()
            self._changed.notify_all()
        return job

    def position(self, job: Job) -> int | None:
        """How many jobs are before it; None if it does not wait."""
        with self._changed:
            waiting = self._waiting()
            return waiting.index(job) + (self.current is not None) if job in waiting else None

    def find(self, id: str) -> Job | None:
        return self.jobs.get(id)

    def latest(self) -> list[Job]:
        """All jobs that are kept, the latest first."""
        with self._changed:
            return list(reversed(self.jobs.values()))

    def close(self) -> None:
        """Stop all jobs, and end the thread at the next step. Finished pictures are kept."""
        with self._changed:
            self._closed = True
            jobs = [*self._queue, *([self.current] if self.current else [])]
            self._changed.notify_all()
        for job in jobs:
            job.stop()

    def give_up(self) -> None:
        """Say that the current job was stopped, although its step still runs."""
        if current := self.current:
            current.end("stopped")

    def join(self, timeout: float | None = None) -> bool:
        """Whether the thread has ended."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # The thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self.current = None
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                self.current = job = self._queue.popleft()
                waiting = self._waiting()
            for position, other in enumerate(waiting, 1):
                other.moved_up(position)
            if job.begin():
                self._do(job)

    def _do(self, job: Job) -> None:
        try:
            (job.work or self._make)(job)
            job.end("done")
        except StoppedError:
            job.end("stopped")
        except OURS as error:
            job.end("failed", str(error))
        except Exception as error:
            problem = failure_of(error)
            if problem is None:
                log.exception("job %s", job.id)
            job.end("failed", problem or f"internal error: {type(error).__name__}: {error}")
        finally:
            if self.loaded and self.loaded.model.dtypes != self.loaded.dtypes:
                self.loaded = None  # a network failed and was widened: later pictures are not to depend on that

    def _make(self, job: Job) -> None:
        loaded = self.use(job)
        events = JobEvents(job, (), self.memory)
        run = self.plan(job.request, events)
        if job.previews:
            from sd.app.web.previews import preview_of

            loaded.preview = loaded.preview or preview_of(loaded.model)
        events = JobEvents(job, run.jobs, self.memory, loaded.preview if job.previews else None)
        job.of = len(run.jobs)
        paths = picture_paths(name_pictures(self.out, run.jobs), run.jobs)
        outputs = Outputs(jobs=run.jobs, seed_moved=0, paths=paths, finished={}, sheet=None)
        make_planned(run, loaded.model, outputs, events, loaded.vaes)

    def use(self, job: Job) -> Loaded:
        """The model of a job, which takes the place of another if it has to. Only in the worker's thread."""
        request = job.request.model
        if self.loaded is None or self.loaded.request != request:
            job.message("note", f"loading {shown(request.file.name)}")
            self._load(request, JobEvents(job, (), self.memory))
        return self.loaded

    def _load(self, request: ModelRequest, events: Events) -> None:
        with opened(request, None) as (checkpoint, prepare), opened_refiner(request) as refiner:
            load, load_refiner = prepare(), refiner and refiner[1]()
            self.loaded = None  # never two in memory
            model = load(events)
            model.refiner = load_refiner and load_refiner(events)
        self.loaded = Loaded(
            request=request,
            checkpoint=checkpoint,
            refiner=refiner and refiner[0].config,
            model=model,
            dtypes=model.dtypes,
            vaes=vae_problems(request, model),
        )

    def plan(self, request: JobRequest, events: Events) -> Planned:
        """Check a request against its model: the one in memory, or the header of its file."""
        inputs, loaded = inputs_of(request, events), self.loaded
        if loaded and loaded.request == request.model:
            from convert.families.table import task_refusal

            if refusal := task_refusal(loaded.checkpoint.config, request.task):
                raise UsageError(refusal)
            return planned(request, loaded.checkpoint, loaded.refiner, inputs, events)
        with opened(request.model, request.task) as (checkpoint, _), opened_refiner(request.model) as refiner:
            return planned(request, checkpoint, refiner and refiner[0].config, inputs, events)

    def _require_room(self) -> None:
        if self._closed:
            raise BusyError("the server is about to end.")
        if len(waiting := self._waiting()) >= self.most_waiting:
            raise BusyError(f"{counted(len(waiting), 'job')} wait already. Try again later.")

    def _waiting(self) -> list[Job]:
        """The jobs in the queue that were not stopped there."""
        return [job for job in self._queue if not job.over]

    def _forget(self) -> None:
        """Forget the oldest jobs that are over, beyond so many."""
        over = [job.id for job in self.jobs.values() if job.state in LAST]
        for id in over[: max(0, len(over) - self.keep)]:
            del self.jobs[id]


def check_limits(request: JobRequest) -> None:
    """Raise UsageError for a job that is too much for a server."""
    number = len(request.lines) * request.count
    if number > MOST_PICTURES:
        raise UsageError(f"{number} pictures are asked for; a job makes at most {MOST_PICTURES}. Lower count.")


def require_small_batches(request: JobRequest, jobs: list) -> None:
    """Raise UsageError for a batch of more pixels than a server makes at once."""
    at_once = min(request.batch_size, len(jobs))
    pixels = max((job.size[0] * job.size[1] for job in jobs), default=0) * at_once
    if pixels > MOST_PIXELS:
        raise UsageError(
            f"a batch of {at_once} would have {pixels / 1e6:.1f} million pixels; a server makes at most "
            f"{MOST_PIXELS / 1e6:.1f} million at once. Lower batch_size or the size."
        )
