"""What a run reports, as events of its job: messages, steps with time left and a preview, pictures."""

import base64
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.jobs.request import Events
from sd.app.web.job import Job, Picture
from sd.app.web.memory import PictureMemory
from sd.pipeline.second_pass import steps_run
from sd.pipeline.settings import Settings

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SHARE = 0.1  # of the time that previews may take


class JobEvents(Events):
    """The events of one job. What its `check` raises ends the run at the next step.

    jobs     the settings of each of its pictures
    preview  clean latents (4, H/8, W/8) -> a small picture; None: no previews
    """

    def __init__(
        self,
        job: Job,
        jobs: Sequence[Settings],
        memory: PictureMemory,
        preview: "Callable[[Tensor], Image.Image] | None" = None,
    ):
        self.job, self.jobs, self.memory = job, jobs, memory
        self.preview = preview
        self._done = 0  # steps of the batches before this one
        self._not_before = 0.0

    def note(self, text: str) -> None:
        self.job.message("note", text)

    def warn(self, text: str) -> None:
        self.job.message("warning", text)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[..., object]]:
        if unit == "step":
            self.job.steps, self.job.begun = total, time.monotonic()
            yield self._advance
        else:
            self.job.add("state", {"state": "running", "stage": name})
            yield lambda amount=1: self.job.check()

    def batch(self, numbers: Sequence[int]) -> None:
        job = self.job
        self._done += job.picture_step
        job.steps -= job.picture_steps - job.picture_step  # those that a skipped batch left out
        job.picture, job.picture_step = numbers[0], 0
        passes = self.jobs[numbers[0]].passes() if self.jobs else ()
        job.picture_steps = sum(max(1, steps_run(each.steps, each.strength)) for each in passes)
        job._skip = False
        job.check()

    def predicted(self, clean: "Tensor") -> None:
        now = time.monotonic()
        if self.preview is None or now < self._not_before:
            return
        self.job.preview = data_url(self.preview(clean[0]))
        spent = time.monotonic() - now
        self._not_before = now + spent / SHARE

    def _advance(self, amount: int = 1) -> None:
        job = self.job
        job.picture_step += amount
        job.step = self._done + job.picture_step
        names = ("picture", "step", "steps", "picture_step", "picture_steps", "seconds_left", "preview")
        job.add("step", {name: getattr(job, name) for name in names})
        job.check()

    def written(self, event: str, path: Path, **facts: object) -> None:
        data = path.read_bytes()
        picture = picture_of(data, path, ms=int(facts.get("ms", 0)), task=self.job.request.task)
        self.memory.keep(picture.sha256, data)
        self.job.pictures.append(picture)
        self.job.add("picture", picture.facts())


def picture_of(data: bytes, path: Path, *, ms: int, task: str) -> Picture:
    """A picture of ours from the bytes of its file."""
    from PIL import Image

    from convert.families.table import TASKS
    from sd.app.jobs.settings_again import settings_again

    with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
        size, texts = opened.size, opened.info
    return Picture(
        sha256=hashlib.sha256(data).hexdigest(),
        path=path,
        seed=json.loads(texts["sd"])["seed"],
        width=size[0],
        height=size[1],
        settings={"task": TASKS[task][0], **settings_again(texts)},
        infotext=texts["parameters"],
        ms=ms,
    )


def data_url(picture: "Image.Image") -> str:
    """A picture as the text that a page can show."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
