"""From a request to picture files, batch by batch."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import CheckpointError, counted, shown
from convert.families.few_step_names import known_by_hash
from sd.app.errors import JobError, UsageError, failure_of, failures_as
from sd.app.jobs import step_files
from sd.app.jobs.adapters import (
    Adapters,
    announce,
    are_consistent,
    find_adapters,
    in_turn,
    misread,
    not_refined,
    objections,
    with_few_steps,
)
from sd.app.jobs.embeddings import find_words
from sd.app.jobs.model import made_with, opened, opened_refiner, teach_words
from sd.app.jobs.model_folder import difference
from sd.app.jobs.outputs import grid_path, name_pictures, picture_paths
from sd.app.jobs.plan import (
    check_jobs,
    check_request,
    check_switch,
    for_model,
    group,
    plan,
    with_seed_moved,
    with_seeds,
    with_settings,
)
from sd.app.jobs.request import Events, JobRequest, ModelRequest
from sd.app.jobs.vocabulary import embedded_model_knows
from sd.pipeline.second_pass import steps_run
from sd.pipeline.settings import PROMPTS, Settings
from sd.sampling.names import objection

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from convert.checkpoint import Checkpoint
    from sd.app.jobs.inputs import Inputs
    from sd.app.jobs.resuming import Noted
    from sd.pipeline.image.canvas import Canvas
    from sd.pipeline.stable_diffusion import StableDiffusion
    from sd.sampling.init_image import InitImage


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where each job's picture goes, and which of them exist."""

    jobs: list[Settings]
    seed_moved: int  # how much larger their seeds are than planned: those of a run that was stopped
    paths: list[Path]
    finished: Mapping[int, Path]  # by the number of the job
    sheet: Path | None  # with all pictures; None if it is not asked for, or complete


def make_pictures(request: JobRequest, events: Events) -> None:
    """Make what a request asks for; everything is checked before any weights are read.

    Raises UsageError and the errors of settings, pictures and checkpoints before work begins; JobError where some
    pictures could not be made.
    """
    check_request(request)
    seeded = with_seeds(request)
    inputs = canvas = None
    if request.init is not None:
        from sd.app.jobs.inputs import read_inputs

        inputs = read_inputs(request)
        for note in inputs.notes:
            events.note(note)
    with opened(request.model, request.task) as (checkpoint, prepare), opened_refiner(request.model) as refiner:
        native = checkpoint.config.native_size
        if inputs:
            inputs.check_depth(checkpoint.config)
            canvas = inputs.canvas(native)
            width, height = canvas.placement.working
            seeded = with_settings(seeded, width=width, height=height)
        seeded = for_model(seeded, checkpoint)
        jobs = plan(seeded, native)
        if canvas and any((job.width, job.height) != canvas.placement.working for job in jobs):
            raise UsageError("a line of --from-file has its own size; with --init, all pictures have the same size.")
        check_jobs(request, jobs, checkpoint.config, refiner and refiner[0].config)
        jobs, adapters = find_adapters(jobs, checkpoint.config, [line.where for line in request.lines])
        chosen = [{**request.settings, **line.settings} for line in request.lines]
        jobs = with_few_steps(adapters, jobs, chosen, events)
        learned = find_words(request.model, jobs, checkpoint.config, events, adapters.words)
        used = {"embeddings": learned, "adapters": adapters}
        load, load_refiner = prepare(), refiner and refiner[1]()
        if refiner:
            check_switch(jobs, checkpoint.config)
        outputs = find_outputs(request, jobs, checkpoint, used, inputs, events)
        if len(outputs.finished) == len(jobs) and outputs.sheet is None:
            return
        model = load(events)
        model.refiner = load_refiner and load_refiner(events)
        teach_words(model, learned)
    if "seed" not in request.settings:
        events.note(f"seed {seeded.settings['seed'] + outputs.seed_moved}")
    if "vary_seed" in seeded.settings and "vary_seed" not in request.settings:
        events.note(f"variation seed {seeded.settings['vary_seed']}")
    left = [job for i, job in enumerate(outputs.jobs) if i not in outputs.finished]
    announce(adapters, left, events)
    refined = [job for job in left if job.switch_at is not None]
    if said := not_refined(refined, [str(word["name"]) for job in refined for word in learned.noted(job)]):
        events.note(said)
    warn_of_unused(request.model, outputs.jobs, checkpoint, adapters, model, events)
    pictures, failed = run_batches(request, model, outputs, adapters, inputs, canvas, events)
    if outputs.sheet and pictures:
        from sd.pipeline.image.tensors import contact_sheet, save_png

        sheet = contact_sheet(
            list(pictures.values()), request.grid_columns, labels_of([outputs.jobs[i] for i in pictures])
        )
        save_png(sheet, outputs.sheet, {}, force=request.force)
        events.written("grid", outputs.sheet)
    if failed:
        raise JobError(f"{failed} of {counted(len(outputs.jobs), 'picture')} could not be made.")


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


def find_outputs(
    request: JobRequest,
    jobs: list[Settings],
    checkpoint: "Checkpoint",
    used: "Mapping[str, Noted]",
    inputs: "Inputs | None",
    events: Events,
) -> Outputs:
    """Where the pictures go. Pictures that an earlier run left are found; if it drew its seed, the jobs get it, too."""
    names, finished, moved = name_pictures(request.out, jobs), None, 0
    if (request.is_batch_file or len(jobs) > 1) and not request.force:
        from sd.app.jobs.resuming import finished_pictures, same_facts, stopped_seed

        same = same_facts(request.model, checkpoint, used, inputs.exact() if inputs else {})
        if request.is_batch_file and "seed" not in request.settings:
            counting = ["seed" not in line.settings for line in request.lines for _ in range(request.count)]
            moved = stopped_seed(names, jobs, counting, same) or 0
            jobs = with_seed_moved(jobs, counting, moved)
        finished = finished_pictures(names, jobs, same)
    paths = picture_paths(names, jobs, finished, force=request.force)
    if finished:
        from sd.files import remove_leftovers

        events.note(f"{len(finished)} of {counted(len(jobs), 'picture')} exist already")
        remove_leftovers(path for i, path in enumerate(paths) if i not in finished)
    if request.save_steps:
        force = request.force or bool(finished)
        step_files.require_free(request.save_steps_as, jobs, paths, force=force)
    finished, sheet = finished or {}, None
    if request.grid or request.grid_columns:
        complete = len(finished) == len(jobs)
        sheet = grid_path(paths, force=request.force or complete)
        sheet = None if complete and sheet.exists() else sheet
    return Outputs(jobs=jobs, seed_moved=moved, paths=paths, finished=finished, sheet=sheet)


def warn_of_unused(
    request: ModelRequest,
    jobs: Sequence[Settings],
    checkpoint: "Checkpoint",
    adapters: Adapters,
    model: "StableDiffusion",
    events: Events,
) -> None:
    """Say what is asked for and has no effect or no point, and what gives wrong colours."""
    if request.vae or model.config.unet.vector_width:
        from sd.runtime.vae_trial import vae_warning

        if problem := vae_warning(model):
            events.warn(f"{shown((request.vae or request.file).name)}: {problem}")
    if request.tiny_vae:
        from sd.runtime.vae_trial import tiny_vae_warning

        if problem := tiny_vae_warning(model):
            events.warn(f"{shown(request.tiny_vae.name)}: {problem}")
    if problem := embedded_model_knows(request.file, jobs, [word.name for word in model.words]):
        events.warn(problem)
    told = checkpoint.few_steps or known_by_hash(request.file, checkpoint.config)
    for problem in (*misread(jobs), *objections(adapters, jobs, told and (shown(request.file.name), told.kind))):
        events.warn(problem)
    if changed := difference(made_with(request, "model"), request.file, model.source.sha256):
        events.warn(f"{request.like} was {changed}")
    for part, used in (("vae", model.source.vae), ("tiny_vae", model.source.tiny_vae)):
        vae, kind = made_with(request, "model").get(part), part.replace("vae", "VAE").replace("_", " ")
        if isinstance(vae, dict) and (used is None or vae.get("sha256") != used.sha256()):
            what = f"{kind} {vae.get('name')}" + (f", {vae['sha256']}" if vae.get("sha256") else "")
            events.warn(f"{request.like} was made with the {what}: give it with --{part.replace('_', '-')} FILE")
    noise = made_with(request, "model").get("noise")
    if noise and noise != model.source.beside.get("noise"):
        events.warn(
            f"{request.like} was made with the noise levels {noise} of a .yaml beside its model, which is gone."
        )
    reuses, merges = any(job.reuse_features > 1 for job in jobs), any(job.merge_tokens for job in jobs)
    for flag, used in (("--reuse-features", reuses), ("--merge-tokens", merges)):
        if model.runner.options.compile and used:
            events.warn(f"--compile does nothing for pictures with {flag}, which changes the inside of the network.")
    negative = [job for job in jobs if job.negative_prompt or job.negative_prompt_2]
    if negative and model.config.unet.guidance_width:
        events.warn("the negative prompt is not used: this model takes the guidance scale as an input instead.")
    elif any(not job.guided for job in negative):
        events.warn("--guidance-scale 1 turns guidance off, and the negative prompt with it.")
    consistent = told is not None and told.kind.consistent
    distilled = [job for job in jobs if job.sampler in ("lcm", "tcd") and (consistent or are_consistent(adapters, job))]
    plain = [job for job in jobs if job not in distilled]
    for sampler, schedule in dict.fromkeys((job.sampler, job.schedule) for job in plain):
        if reason := objection(sampler, schedule):
            events.warn(f"--sampler {sampler} {reason}.")


def run_batches(
    request: JobRequest,
    model: "StableDiffusion",
    outputs: Outputs,
    adapters: Adapters,
    inputs: "Inputs | None",
    canvas: "Canvas | None",
    events: Events,
) -> "tuple[dict[int, Image.Image], int]":
    """Make and write the pictures, batch by batch. Returns those for the sheet by the numbers of their jobs, and how
    many could not be made.

    If one picture of a batch is missing, the whole batch is made again: in another batch, its pixels might be rounded
    differently.
    """
    from convert.files.hashing import compute_aside
    from sd.pipeline.image.tensors import save_png

    jobs, paths, finished = outputs.jobs, outputs.paths, outputs.finished
    start, labels, exact = None, {}, {}
    if canvas is not None:
        with failures_as(JobError):
            start = model.start_of(canvas)
        labels, exact = inputs.labels(), inputs.exact()
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
                adapters.apply(model, jobs[batch[0]])
                made = make_batch(request, model, [jobs[i] for i in batch], start, canvas, on_step, events.warn)
            except Exception as error:
                problem = failure_of(error) or (str(error) if isinstance(error, CheckpointError) else None)
                if problem is None or (isinstance(error, CheckpointError) and batch is batches[0]):
                    raise
                events.warn(f"seed {jobs[batch[0]].seed}: {problem}")
                failed += len(set(batch) - finished.keys())
                continue
            milliseconds = round(1000 * (time.perf_counter() - started) / len(batch))
            for i, (picture, frames) in zip(batch, made, strict=True):
                if outputs.sheet:
                    kept[i] = picture
                if i in finished:
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
    on_retry: Callable[[str], None],
) -> "list[tuple[Image.Image, list[Image.Image]]]":
    """The pictures of a batch, each with those of its steps if they are asked for."""
    clean = [] if request.save_steps else None
    made = []
    for nth, picture in enumerate(model.make(batch, start, on_step=on_step, on_retry=on_retry, clean=clean)):
        frames = []
        if clean:
            from sd.pipeline.step_previews import step_pictures

            latents = [each[nth] for each in clean]
            frames = step_pictures(model, latents, picture, request.save_steps, batch[0].tile)
        if canvas is not None:
            picture, frames = canvas.finish(picture), [canvas.finish(frame) for frame in frames]
        made.append((picture, frames))
    return made
