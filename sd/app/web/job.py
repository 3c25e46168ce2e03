"""A job of the server: what is asked for, how far it is, what it has made, and its events for any number of readers."""

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from convert.families.table import TASKS
from sd.app.jobs.request import JobRequest, SkippedError
from sd.app.web.uploads import Uploads

LAST = ("done", "failed", "stopped")  # states in which nothing more happens, and the names of their events


class StoppedError(Exception):
    """Raised in the worker where a job is to end: at the next step, or before the next picture."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A finished picture. Its bytes are kept apart, and for a while only: see `sd.app.web.memory`."""

    sha256: str  # of the bytes
    path: Path  # of the same bytes on disk
    seed: int
    width: int
    height: int
    settings: Mapping[str, object]  # fields of a job that makes it again
    infotext: str  # the same as other tools write and read it
    ms: int

    @property
    def url(self) -> str:
        return f"/pictures/{self.sha256}.png"

    def facts(self) -> dict[str, object]:
        names = ("url", "seed", "width", "height", "settings", "infotext", "ms", "sha256")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Event:
    """Something that happened to a job, by number."""

    id: int
    name: str  # "state", "step", "message", "picture", and last "done", "failed" or "stopped"
    data: Mapping[str, object]


@dataclass(eq=False, kw_only=True)
class Job:
    """What the server works on. The worker changes it, others read it, ask it to stop, and wait for its events.

    request   whose pictures it makes
    previews  whether its steps come with a preview
    folder    of the pictures that came with the request; removed once the job is over
    work      what the worker does: by default, the pictures of the request
    """

    request: JobRequest
    previews: bool = True
    folder: Uploads | None = None
    work: Callable | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    made: float = field(default_factory=time.time)  # when it was asked for, in seconds since 1970

    state: str = "queued"
    error: str | None = None
    pictures: list[Picture] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    page: bool = False  # whether it has made an explanation
    step: int = 0  # of all steps of the job
    steps: int = 0
    picture: int = 0  # the number of the picture, or of the first of a batch, that is being made
    of: int = 0  # how many pictures it makes
    picture_step: int = 0
    picture_steps: int = 0
    preview: str | None = None  # the latest, as a data URL
    begun: float | None = None  # when the first step began

    def __post_init__(self):
        self._lock = threading.RLock()
        self._events: list[Event] = []
        self._next = 1
        self._listeners: list[Callable[[], object]] = []
        self._stop = self._skip = False

    # What the server's users ask of it

    def stop(self) -> None:
        """End at the next step. A job that waits does not begin; finished pictures are kept."""
        with self._lock:
            self._stop = True
            waits = self.state == "queued"
        if waits:
            self.end("stopped")

    def skip(self) -> None:
        """Leave out the picture that is being made, or the batch of them, and go on with the next one."""
        self._skip = True

    @property
    def over(self) -> bool:
        return self.state in LAST

    @property
    def seconds_left(self) -> float | None:
        """By the time that the steps took so far; None before the first."""
        if self.over or self.begun is None or not self.step:
            return None
        return round((time.monotonic() - self.begun) / self.step * max(0, self.steps - self.step), 1)

    def facts(self, position: int | None = None) -> dict[str, object]:
        """Its state for the API. position: how many jobs are before it, if it waits."""
        return {
            "id": self.id,
            "task": TASKS[self.request.task][0],
            "state": self.state,
            "made": self.made,
            "position": position,
            "step": self.step,
            "steps": self.steps,
            "picture": self.picture,
            "count": self.of,
            "picture_step": self.picture_step,
            "picture_steps": self.picture_steps,
            "seconds_left": self.seconds_left,
            "preview": self.preview,
            "pictures": [picture.facts() for picture in self.pictures],
            "page": f"/api/jobs/{self.id}/page" if self.page else None,
            "messages": list(self.messages),
            "error": self.error,
        }

    # Its events

    def add(self, name: str, data: Mapping[str, object]) -> None:
        """Note an event and tell all who listen. Only the latest step, or place in the queue, is kept."""
        with self._lock:
            if self._events and (self._events[-1].name == "step" or "position" in self._events[-1].data):
                self._events.pop()
            self._events.append(Event(self._next, name, data))
            self._next += 1
            listeners = list(self._listeners)
        for tell in listeners:
            tell()

    def since(self, number: int) -> list[Event]:
        """The events after that number which are kept."""
        with self._lock:
            return [event for event in self._events if event.id > number]

    def listen(self, tell: Callable[[], object]) -> Callable[[], None]:
        """Have a function called, in any thread, after each event; returns one that ends this."""
        with self._lock:
            self._listeners.append(tell)
        return lambda: self._listeners.remove(tell)

    # What the worker does with it

    def moved_up(self, position: int) -> None:
        """So many jobs are before it now."""
        if self.state == "queued":
            self.add("state", {"state": "queued", "position": position})

    def begin(self) -> bool:
        """Whether it can begin: not if it was stopped while it waited."""
        with self._lock:
            if self.state != "queued":
                return False
            self.state = "running"
        self.add("state", {"state": "running"})
        return True

    def check(self) -> None:
        """Raise StoppedError or SkippedError if that was asked for."""
        if self._stop:
            raise StoppedError
        if self._skip:
            self._skip = False
            raise SkippedError

    def message(self, level: str, text: str) -> None:
        """level: "note" or "warning" """
        self.messages.append({"level": level, "text": text})
        self.add("message", self.messages[-1])

    def end(self, state: str, error: str | None = None) -> None:
        """The last event. state: "done", "failed" with a sentence, or "stopped"."""
        with self._lock:
            if self.over:
                return
            if error and self.folder is not None:
                error = self.folder.without_paths(error)
            self.state, self.error, self.preview = state, error, None
        if self.folder is not None:
            self.folder.cleanup()
        names = [picture.sha256 for picture in self.pictures]
        self.add(state, {"state": state, "pictures": names, **({"error": error} if error else {})})
