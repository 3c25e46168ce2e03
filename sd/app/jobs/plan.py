"""From a request to the settings of each picture, checked before any weights are read."""

import math
import secrets
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from convert.families.few_steps import usual_settings, with_usual
from sd.app.errors import UsageError
from sd.app.jobs.request import JobRequest
from sd.config import ModelConfig
from sd.pipeline.second_pass import first_size
from sd.pipeline.settings import SettingError, Settings
from sd.pipeline.xl_settings import require_model_for, require_pair, require_readers

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint

MOST_PICTURES, LARGEST_SHEET = 100_000, 500 * 10**6  # the latter in pixels


def check_request(request: JobRequest) -> None:
    """Raise UsageError or SettingError for what is wrong whatever the model."""
    for name in ("count", "batch_size", "grid_columns"):
        number = getattr(request, name)
        if number is not None and number < 1:
            raise SettingError(name, f"{number} is out of range: at least 1.")
    if not request.max_megapixels > 0:
        raise SettingError("max_megapixels", f"{request.max_megapixels:g} is out of range: above 0.")
    number = len(request.lines) * request.count
    if number > MOST_PICTURES:
        raise UsageError(f"{number} pictures are asked for; a run makes at most {MOST_PICTURES}. Lower --count.")
    if request.save_steps_as and not request.save_steps:
        raise UsageError("--save-steps-as does nothing without --save-steps.")
    if "vary_seed" in request.settings and "vary" not in request.settings and not varies(request):
        raise UsageError("--vary-seed does nothing without --vary, which says how much to vary. Example: --vary 0.1.")
    for line in request.lines:
        guidance = {**request.settings, **line.settings}.get("image_guidance")
        if request.task == "editing" and guidance is None:
            raise UsageError(f"{line.where}image guidance must be a number for editing, such as 1.5.")
        if request.task != "editing" and guidance is not None:
            raise UsageError(f"{line.where}image guidance is for editing by instruction. See sd edit --help.")


def varies(request: JobRequest) -> bool:
    """Whether variations are asked for, by any line."""
    return any(settings.get("vary") for settings in (request.settings, *(line.settings for line in request.lines)))


def with_settings(request: JobRequest, **settings: object) -> JobRequest:
    """The same request with other settings for all lines."""
    return replace(request, settings={**request.settings, **settings})


def with_seeds(request: JobRequest) -> JobRequest:
    """The same request, with seeds drawn where it has none."""
    needed = ["seed", "vary_seed"] if varies(request) else ["seed"]
    return with_settings(request, **{name: secrets.randbits(32) for name in needed if name not in request.settings})


def for_model(request: JobRequest, checkpoint: "Checkpoint") -> JobRequest:
    """The same request with what the model was trained for, where the request does not say otherwise."""
    usual = {"zero_terminal_snr": checkpoint.said.begins_at_noise, **usual_settings(checkpoint.config)}
    if any(line.settings.get("sigmas") for line in request.lines):
        usual.pop("steps", None)
    return replace(request, settings=with_usual(usual, request.settings))


def plan(request: JobRequest, native: int) -> list[Settings]:
    """One job for each picture, in order; picture i of the run has seed + i, unless its line has a seed of its own.

    request  with seeds
    native   the model's native size

    Raises UsageError for a line of a file, else SettingError.
    """
    jobs: list[Settings] = []
    for line in request.lines:
        seeds = {name: request.settings[name] for name in ("seed", "vary_seed") if name in request.settings}
        counted = {name: seed + len(jobs) for name, seed in seeds.items()}
        settings = {**request.settings, **counted, **line.settings}
        try:
            first = Settings(**{**settings, **size_of(settings, native)})
            jobs += [first, *(first.counted_on(i) for i in range(1, request.count))]
        except SettingError as error:
            if not line.where:
                raise
            raise UsageError(f"{line.where}{error}") from None
    return jobs


def size_of(settings: Mapping[str, object], native: int) -> dict[str, int]:
    """Width and height as they are given, else the model's native ones; with a second pass, those of the first."""
    given = {name: settings[name] for name in ("width", "height") if name in settings}
    width, height = (native, native) if given else first_size(settings.get("hires"), native)
    return {"width": width, "height": height, **given}


def with_seed_moved(jobs: Sequence[Settings], counting: Sequence[bool], by: int) -> list[Settings]:
    """The jobs of a run whose seed is larger by that much."""
    return [replace(job, seed=job.seed + by) if counts else job for job, counts in zip(jobs, counting, strict=True)]


def check_jobs(
    request: JobRequest, jobs: Sequence[Settings], config: ModelConfig, refiner: ModelConfig | None = None
) -> None:
    """Raise UsageError or SettingError for what does not go with the models, or with a picture to begin with."""
    if request.init is None and any(job.strength != 1 for job in jobs):
        raise UsageError("strength does nothing without a picture to begin with. See sd img2img --help.")
    if request.init is not None and any(job.hires for job in jobs):
        raise UsageError("hires works only without an input image.")
    pixels = sum(math.prod(job.size) for job in jobs)
    if (request.grid or request.grid_columns) and pixels > LARGEST_SHEET:
        raise UsageError(
            f"a sheet of {len(jobs)} pictures would have {pixels / 1e6:.0f} million pixels; at most "
            f"{LARGEST_SHEET // 10**6} are possible. Leave --grid out, or ask for fewer pictures."
        )
    layers, most = config.text_encoder.layers, max(job.clip_skip for job in jobs)
    if most > layers:
        raise UsageError(f"--clip-skip {most} is out of range: this checkpoint's text encoder has {layers} layers.")
    if refiner:
        require_pair(config, refiner)
    for flag, given in (
        ("--switch-at", any(job.switch_at is not None for job in jobs)),
        ("--switch-by", any(job.switch_by != "time" for job in jobs)),
    ):
        if given and not refiner:
            raise UsageError(f"{flag} does nothing without a refiner. Give one with --refiner FILE.")
    for job in jobs:
        job.require_prediction(config.prediction)
        require_readers(job, config, refiner)
        require_model_for(job, config)


def check_switch(jobs: Sequence[Settings], config: ModelConfig) -> None:
    """Raise SettingError if the base model or its refiner gets no step of a picture. Imports PyTorch."""
    from sd.pipeline.latent_diffusion import table_and_steps
    from sd.pipeline.refining import first_refined

    for job in {replace(job, seed=0, vary=0, prompt="") for job in jobs}:
        first_refined(table_and_steps(config.schedule, job)[1], job)


def group(jobs: Sequence[Settings], batch_size: int, chunk_count: Callable[[Settings], Hashable]) -> list[list[int]]:
    """The numbers of the jobs in each batch, at most batch_size of them.

    Jobs of a batch differ only in prompts and seeds; they need not be neighbours. Batches come in the order of their
    first jobs.

    chunk_count  how many chunks a job's prompts take; the same in a batch
    """
    batches: list[list[int]] = []
    newest: dict[Hashable, list[int]] = {}
    for number, job in enumerate(jobs):
        kind = (job.shared, chunk_count(job))
        if len(newest.get(kind, ())) in (0, batch_size):
            newest[kind] = []
            batches.append(newest[kind])
        newest[kind].append(number)
    return batches
