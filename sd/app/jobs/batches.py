"""Pictures and their files, batch by batch."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from convert.errors import CheckpointError
from sd.app.errors import JobError, failure_of, failures_as
from sd.app.jobs import step_files
from sd.app.jobs.adapters import in_turn
from sd.app.jobs.plan import group
from sd.app.jobs.request import Events, JobRequest, SkippedError
from sd.pipeline.second_pass import steps_run
from sd.pipeline.settings import PROMPTS, Settings

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sd.app.jobs.run import Outputs, Planned
    from sd.pipeline.image.canvas import Canvas
    from sd.pipeline.stable_diffusion import StableDiffusion
    from sd.sampling.init_image import InitImage


def run_batches(
    run: "Planned", model: "StableDiffusion", outputs: "Outputs", events: Events
) -> "tuple[dict[int, Image.Image], int]":
    """Make and write the pictures, batch by batch. Returns those for the sheet by the numbers of their jobs, and how
    many could not be made.

    If one picture of a batch is missing, the whole batch is made again: in another batch, its pixels might be rounded
    differently.
    """
    from convert.files.hashing import compute_aside
    from sd.pipeline.image.tensors import save_png

    request, adapters, canvas = run.request, run.adapters, run.canvas
    jobs, paths, finished = outputs.jobs, outputs.paths, outputs.finished
    start, labels, exact = None, {}, {}
    if canvas is not None:
        with failures_as(JobError):
            start = model.start_of(canvas)
        labels, exact = run.inputs.labels(), run.inputs.exact()
        for steps, strength in dict.fromkeys((job.steps, job.strength) for job in jobs if job.strength < 1):
            events.note(f"running {steps_run(steps, strength)} of {steps} steps (strength {strength:g})")

    def length(job: Settings) -> tuple:
        if job.adapters and adapters.words:  # which count only once they are applied
            return tuple(getattr(job, name) for name in PROMPTS)
        return tuple(model.chunk_count(each) for each in job.passes())

    batches = group(jobs, request.batch_size, length)
    batches = [batch for batch in batches if not finished.keys() >= set(batch)]
    batches, sets, switches = in_turn(batches, jobs)
    if sets > 1:
        events.note(f"{sets} sets of adapters, {switches} {'switch' if switches == 1 else 'switches'}")
    passes = [each for batch in batches for each in jobs[batch[0]].passes()]
    total = sum(max(1, steps_run(each.steps, each.strength)) for each in passes)
    kept, failed = {}, 0  # by the number of the job
    files = model.source, model.source.vae, model.source.tiny_vae, model.refiner and model.refiner.source
    to_hash = [file.sha256 for file in files if file]  # takes seconds, beside the steps that follow the first

    with events.stage("denoising", total, "step") as advance:

        def on_step(_: object) -> None:
            advance()
            while to_hash:
                compute_aside(to_hash.pop())

        for batch in batches:
            started = time.perf_counter()
            try:
                events.batch(batch)
                adapters.apply(model, jobs[batch[0]])
                made = make_batch(request, model, [jobs[i] for i in batch], start, canvas, on_step, events)
            except SkippedError:
                continue
            except Exception as error:
                problem = failure_of(error) or (str(error) if isinstance(error, CheckpointError) else None)
                if problem is None or (isinstance(error, CheckpointError) and batch is batches[0]):
                    raise
                events.warn(f"seed {jobs[batch[0]].seed}: {problem}")
                events.failed(batch, error)
                failed += len(set(batch) - finished.keys())
                continue
            milliseconds = round(1000 * (time.perf_counter() - started) / len(batch))
            for i, (picture, frames) in zip(batch, made, strict=True):
                if outputs.sheet:
                    kept[i] = picture
                if i in finished:
                    continue
                if outputs.take is not None:
                    outputs.take(i, picture, model.texts(jobs[i], labels, exact), milliseconds)
                    continue
                try:
                    if frames:  # first, since a picture that exists stands for all that belongs to it
                        step_files.save_steps(frames, picture, paths[i], request.save_steps_as)
                    save_png(picture, paths[i], model.texts(jobs[i], labels, exact), force=request.force)
                except FileExistsError as error:  # written by another run since the check
                    events.warn(f"seed {jobs[i].seed}: {error}")
                    failed += 1
                    continue
                events.written(
                    "picture", paths[i], ms=milliseconds, model=model.source.name, **facts_of(jobs[i], picture)
                )
    if outputs.sheet:
        from sd.pipeline.image.reading import PictureError, read_picture

        for i in finished.keys() - kept.keys():
            try:
                kept[i], _ = read_picture(finished[i])
            except PictureError as error:
                events.warn(f"{error} The sheet is made without it.")
    return {i: kept[i] for i in sorted(kept)}, failed


def make_batch(
    request: JobRequest,
    model: "StableDiffusion",
    batch: Sequence[Settings],
    start: "InitImage | None",
    canvas: "Canvas | None",
    on_step: "Callable[[Tensor], None]",
    events: Events,
) -> "list[tuple[Image.Image, list[Image.Image]]]":
    """The pictures of a batch, each with those of its steps if they are asked for."""
    clean = [] if request.save_steps else None
    hooks = {"on_step": on_step, "on_retry": events.warn, "on_clean": events.predicted}
    made = []
    for nth, picture in enumerate(model.make(batch, start, clean=clean, **hooks)):
        frames = []
        if clean:
            from sd.pipeline.step_previews import step_pictures

            latents = [each[nth] for each in clean]
            frames = step_pictures(model, latents, picture, request.save_steps, batch[0].tile)
        if canvas is not None:
            picture, frames = canvas.finish(picture), [canvas.finish(frame) for frame in frames]
        made.append((picture, frames))
    return made


def facts_of(job: Settings, picture: "Image.Image") -> dict[str, object]:
    """What is reported of a picture, by the names of flags."""
    names = ("prompt", "negative_prompt", "seed", "steps", "sampler", "guidance_scale")
    facts = {name: getattr(job, name) for name in names}
    facts |= {name: text for name in ("prompt_2", "negative_prompt_2") if (text := getattr(job, name))}
    facts |= {"lora": [use.as_flag for use in job.adapters]} if job.adapters else {}
    return facts | {"width": picture.width, "height": picture.height}


def labels_of(jobs: Sequence[Settings]) -> list[str]:
    """What to write under the pictures of a sheet: the prompts if they differ, else the seeds."""
    prompts = [job.prompt for job in jobs]
    seeds = [f"variation {job.vary_seed}" if job.vary else f"seed {job.seed}" for job in jobs]
    if len(set(prompts)) == 1:
        return seeds
    if len(set(prompts)) == len(jobs):
        return prompts
    return [f"{seed}: {prompt}" for seed, prompt in zip(seeds, prompts, strict=True)]
