"""From settings to picture files, batch by batch."""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli.flags import bar_hidden, say
from sd.app.errors import failure_of
from sd.app.jobs import step_files
from sd.app.jobs.plan import group
from sd.pipeline.settings import Settings
from sd.sampling.strength import steps_run

if TYPE_CHECKING:
    from PIL import Image

    from sd.pipeline.image.canvas import Canvas
    from sd.pipeline.stable_diffusion import StableDiffusion


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The picture that a run begins with, for every command but txt2img.

    canvas  from the model's native size to the picture, made ready
    labels  what a made picture says of it, by other tools' names
    exact   the same, exactly
    """

    canvas: "Callable[[int], Canvas]"
    labels: dict[str, object]
    exact: dict


def make(
    model: "StableDiffusion",
    jobs: Sequence[Settings],
    paths: Sequence[Path],
    args: argparse.Namespace,
    beginning: Beginning | None = None,
    canvas: "Canvas | None" = None,
    *,
    there: Set[int] = frozenset(),
) -> "tuple[list[Image.Image], int]":
    """Make and write the pictures, batch by batch. Returns those for the grid, and how many could not be made.

    there  numbers of the jobs whose pictures there are already. A batch of which one is missing is made again as a
           whole: in another batch, its pixels might be rounded in another way
    """
    from PIL import Image
    from tqdm import tqdm

    from convert.files.hashing import compute_aside
    from sd.pipeline.image.tensors import save_png
    from sd.pipeline.step_previews import step_pictures

    start = None
    if canvas is not None:
        from sd.pipeline.image.tensors import init_image_from

        start = init_image_from(canvas.working_picture, canvas.working_mask)
        for steps, strength in dict.fromkeys((job.steps, job.strength) for job in jobs if job.strength < 1):
            say(f"running {steps_run(steps, strength)} of {steps} steps (strength {strength:g})", quiet=args.quiet)
    labels, exact = (beginning.labels, beginning.exact) if beginning else ({}, {})

    def chunks(job: Settings) -> tuple[int, ...]:
        return tuple(model.chunk_count(each) for each in job.passes())

    batches = [([jobs[i] for i in mine], mine) for mine in group(jobs, args.batch_size, chunks)]
    passes = [each for batch, mine in batches if not there.issuperset(mine) for each in batch[0].passes()]
    total = sum(max(1, steps_run(each.steps, each.strength)) for each in passes)
    sheet = args.grid or args.grid_columns
    kept, failed = {}, 0  # by the number of the job
    to_hash = [model.source.sha256]  # seconds, beside the steps that follow the first

    def stepped(_: object) -> None:
        bar.update()
        while to_hash:
            compute_aside(to_hash.pop())

    with tqdm(desc="denoising", total=total, unit="step", disable=bar_hidden(args.quiet), leave=False) as bar:
        for batch, mine in batches:
            if there.issuperset(mine):
                kept |= {i: Image.open(paths[i]).convert("RGB") for i in mine} if sheet else {}
                continue
            started = time.perf_counter()
            clean = [] if args.save_steps else None
            try:
                pictures = model.make(batch, start, on_step=stepped, on_retry=say, clean=clean)
                frames = [
                    step_pictures(model, [each[nth] for each in clean], picture, args.save_steps, batch[0].tile)
                    for nth, picture in enumerate(pictures if clean else [])
                ]
                if canvas is not None:
                    pictures = [canvas.finish(picture) for picture in pictures]
                    frames = [[canvas.finish(frame) for frame in each] for each in frames]
            except Exception as error:
                problem = failure_of(error)
                if problem is None:
                    raise
                say(f"seed {batch[0].seed}: {problem}")
                failed += len(set(mine) - there)
                continue
            milliseconds = round(1000 * (time.perf_counter() - started) / len(batch))
            for nth, (picture, job, i) in enumerate(zip(pictures, batch, mine, strict=True)):
                path = paths[i]
                if i in there:
                    continue
                try:
                    if frames:  # first, since a picture that is there stands for all that belongs to it
                        step_files.save_steps(frames[nth], picture, path, args.save_steps_as or "files")
                    save_png(picture, path, model.texts(job, labels, exact), force=args.force)
                except FileExistsError as error:  # taken since we looked, by another run
                    say(f"seed {job.seed}: {error}")
                    failed += 1
                    continue
                bar.clear()
                report(args, event="picture", path=path, seed=job.seed, ms=milliseconds)
            kept |= dict(zip(mine, pictures, strict=True)) if sheet else {}
    return [kept[i] for i in sorted(kept)], failed


def report(args: argparse.Namespace, *, event: str, path: Path, **values: object) -> None:
    """A result on stdout."""
    if args.json:
        print(json.dumps({"event": event, "path": str(path), "sha256": picture_sha256(path), **values}), flush=True)
    else:
        print(path, flush=True)


def picture_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
