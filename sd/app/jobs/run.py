"""From a request to picture files, batch by batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import counted
from sd.app.errors import JobError, UsageError
from sd.app.jobs import step_files
from sd.app.jobs.adapters import Adapters, announce, find_adapters, not_refined, with_few_steps
from sd.app.jobs.batches import labels_of, run_batches
from sd.app.jobs.embeddings import Learned, find_words
from sd.app.jobs.model import opened, opened_refiner, teach_words
from sd.app.jobs.outputs import grid_path, name_pictures, picture_paths
from sd.app.jobs.plan import (
    check_jobs,
    check_request,
    check_switch,
    for_model,
    plan,
    with_seed_moved,
    with_seeds,
    with_settings,
)
from sd.app.jobs.request import Events, JobRequest
from sd.app.jobs.unused import warn_of_unused
from sd.pipeline.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

    from convert.checkpoint import Checkpoint
    from sd.app.jobs.inputs import Inputs
    from sd.config import ModelConfig
    from sd.pipeline.image.canvas import Canvas
    from sd.pipeline.stable_diffusion import StableDiffusion


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run that was checked against the header of its model's file, before any weights are read.

    jobs   the settings of each picture
    seeds  "seed" and, for variations, "vary_seed": those that were asked for, or drawn
    """

    request: JobRequest
    checkpoint: "Checkpoint"
    jobs: list[Settings]
    seeds: Mapping[str, int]
    adapters: Adapters
    learned: Learned
    inputs: "Inputs | None"
    canvas: "Canvas | None"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where each job's picture goes, and which of them exist."""

    jobs: list[Settings]
    seed_moved: int  # how much larger their seeds are than planned: those of a run that was stopped
    paths: list[Path]
    finished: Mapping[int, Path]  # by the number of the job
    sheet: Path | None  # with all pictures; None if it is not asked for, or complete
    # is given each picture, with the job's number, its texts and milliseconds, in place of a file
    take: "Callable[[int, Image.Image, Mapping[str, str], int], None] | None" = None


def make_pictures(request: JobRequest, events: Events) -> None:
    """Make what a request asks for; everything is checked before any weights are read.

    Raises UsageError and the errors of settings, pictures and checkpoints before work begins; JobError where some
    pictures could not be made.
    """
    check_request(request)
    inputs = inputs_of(request, events)
    with opened(request.model, request.task) as (checkpoint, prepare), opened_refiner(request.model) as refiner:
        run = planned(request, checkpoint, refiner and refiner[0].config, inputs, events)
        load, load_refiner = prepare(), refiner and refiner[1]()
        if refiner:
            check_switch(run.jobs, checkpoint.config)
        outputs = find_outputs(run, events)
        if len(outputs.finished) == len(run.jobs) and outputs.sheet is None:
            return
        model = load(events)
        model.refiner = load_refiner and load_refiner(events)
    make_planned(run, model, outputs, events)


def inputs_of(request: JobRequest, events: Events) -> "Inputs | None":
    """The picture to begin with, and what belongs to it. Raises as `read_inputs`."""
    if request.init is None:
        return None
    from sd.app.jobs.inputs import read_inputs

    inputs = read_inputs(request)
    for note in inputs.notes:
        events.note(note)
    return inputs


def planned(
    request: JobRequest,
    checkpoint: "Checkpoint",
    refiner: "ModelConfig | None",
    inputs: "Inputs | None",
    events: Events,
) -> Planned:
    """The run that a request asks of a model, checked against what the header of its file says.

    Raises UsageError and the errors of settings and of the files that prompts name.
    """
    seeded, canvas, native = with_seeds(request), None, checkpoint.config.native_size
    if inputs:
        inputs.check_depth(checkpoint.config)
        canvas = inputs.canvas(native)
        width, height = canvas.placement.working
        seeded = with_settings(seeded, width=width, height=height)
    seeded = for_model(seeded, checkpoint)
    jobs = plan(seeded, native)
    if canvas and any((job.width, job.height) != canvas.placement.working for job in jobs):
        raise UsageError("a line of --from-file has its own size; with --init, all pictures have the same size.")
    check_jobs(request, jobs, checkpoint.config, refiner)
    jobs, adapters = find_adapters(
        jobs, checkpoint.config, [line.where for line in request.lines], names_only=request.names_only
    )
    chosen = [{**request.settings, **line.settings} for line in request.lines]
    jobs = with_few_steps(adapters, jobs, chosen, events)
    learned = find_words(request.model, jobs, checkpoint.config, events, adapters.words)
    drawn = {name: seed for name, seed in seeded.settings.items() if name in ("seed", "vary_seed")}
    return Planned(
        request=request,
        checkpoint=checkpoint,
        jobs=jobs,
        seeds=drawn,
        adapters=adapters,
        learned=learned,
        inputs=inputs,
        canvas=canvas,
    )


def make_planned(
    run: Planned, model: "StableDiffusion", outputs: Outputs, events: Events, vaes: Sequence[str] | None = None
) -> None:
    """Make the pictures of a run with its model, which is loaded. Raises JobError where some could not be made.

    vaes  as in `warn_of_unused`
    """
    request = run.request
    teach_words(model, run.learned)
    if "seed" not in request.settings:
        events.note(f"seed {run.seeds['seed'] + outputs.seed_moved}")
    if "vary_seed" in run.seeds and "vary_seed" not in request.settings:
        events.note(f"variation seed {run.seeds['vary_seed']}")
    left = [job for i, job in enumerate(outputs.jobs) if i not in outputs.finished]
    announce(run.adapters, left, events)
    refined = [job for job in left if job.switch_at is not None]
    if said := not_refined(refined, [str(word["name"]) for job in refined for word in run.learned.noted(job)]):
        events.note(said)
    warn_of_unused(request.model, outputs.jobs, run.checkpoint, run.adapters, model, events, vaes)
    pictures, failed = run_batches(run, model, outputs, events)
    if outputs.sheet and pictures:
        from sd.pipeline.image.tensors import contact_sheet, save_png

        sheet = contact_sheet(
            list(pictures.values()), request.grid_columns, labels_of([outputs.jobs[i] for i in pictures])
        )
        save_png(sheet, outputs.sheet, {}, force=request.force)
        events.written("grid", outputs.sheet)
    if failed:
        raise JobError(f"{failed} of {counted(len(outputs.jobs), 'picture')} could not be made.")


def find_outputs(run: Planned, events: Events) -> Outputs:
    """Where the pictures go. Pictures that an earlier run left are found; if it drew its seed, the jobs get it, too."""
    request, jobs = run.request, run.jobs
    names, finished, moved = name_pictures(request.out, jobs), None, 0
    if (request.is_batch_file or len(jobs) > 1) and not request.force:
        from sd.app.jobs.resuming import finished_pictures, same_facts, stopped_seed

        used = {"embeddings": run.learned, "adapters": run.adapters}
        same = same_facts(request.model, run.checkpoint, used, run.inputs.exact() if run.inputs else {})
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
