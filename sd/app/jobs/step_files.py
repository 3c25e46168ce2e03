"""The picture at each step, as files beside the finished one or as one animation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.errors import UsageError
from sd.files import name_problem, written_whole
from sd.pipeline.second_pass import steps_run
from sd.pipeline.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

FORMS = ("files", "webp", "apng")
STEP_MS, LAST_MS = 100, 1500  # how long an animation shows a step, and the finished picture


def step_paths(path: Path, form: str | None, steps: int) -> list[Path]:
    """Where the steps of the picture with this path go; without a form, to files."""
    if form in (None, "files"):
        return [path.with_name(f"{path.stem}-step{number:03}.png") for number in range(1, steps + 1)]
    return [path.with_name(f"{path.stem}-steps.{'webp' if form == 'webp' else 'png'}")]


def require_free(form: str | None, jobs: Sequence[Settings], paths: Sequence[Path], *, force: bool) -> None:
    """Before any work: every step can be written, and unless forced, none replaces a file. Raises UsageError."""
    for job, path in zip(jobs, paths, strict=True):
        steps = sum(steps_run(each.steps, each.strength) for each in job.passes())
        for target in step_paths(path, form, steps):
            if problem := name_problem(target, force=force, other="another --out"):
                raise UsageError(f"{target} {problem}")


def save_steps(frames: "Sequence[Image.Image]", picture: "Image.Image", path: Path, form: str | None) -> None:
    """Write the steps of a picture; an animation ends with the picture itself."""
    paths = step_paths(path, form, len(frames))
    if form in (None, "files"):
        for frame, target in zip(frames, paths, strict=True):
            with written_whole(target, force=True) as file:
                frame.save(file, "PNG")
        return
    durations = [STEP_MS] * len(frames) + [LAST_MS]
    first, *others = [*frames, picture]
    options = {"quality": 90} if form == "webp" else {}
    with written_whole(paths[0], force=True) as file:
        first.save(file, "WEBP" if form == "webp" else "PNG", save_all=True, append_images=others, duration=durations,
                   loop=0, **options)  # fmt: skip
