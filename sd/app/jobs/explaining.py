"""A page that shows how a picture was made, and how other settings would have made it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from sd.app.errors import JobError, failures_as
from sd.app.jobs.request import Events
from sd.pipeline.second_pass import steps_run
from sd.pipeline.settings import Settings

if TYPE_CHECKING:
    from sd.app.jobs.adapters import Adapters
    from sd.app.jobs.inputs import Inputs
    from sd.pipeline.image.canvas import Canvas
    from sd.pipeline.stable_diffusion import StableDiffusion

COMPARED = {  # what can be compared: the setting, the type of its values, and what separates them
    "guidance": ("guidance_scale", float, ","),
    "seed": ("seed", int, ","),
    "steps": ("steps", int, ","),
    "sampler": ("sampler", str, ","),
    "schedule": ("schedule", str, ","),
    "prompt": ("prompt", str, "|"),
    "negative": ("negative_prompt", str, "|"),
}


class Beginning(NamedTuple):
    """A picture as it was read, and at the working size."""

    inputs: "Inputs"
    canvas: "Canvas"


def make_page(
    model: "StableDiffusion",
    own: Settings,
    comparisons: Sequence[tuple[str, list[Settings]]],
    adapters: "Adapters",
    events: Events,
    beginning: Beginning | None = None,
    *,
    attention: bool,
    course: str | None = None,
) -> tuple[float, bytes]:
    """The milliseconds that the run took, and the page, which links the chapters in `course` if there is a prefix."""
    from sd.study.explain.page import page
    from sd.study.explain.recording import explain
    from sd.study.explain.report import Comparison, preview_count, report

    def length(settings: Settings) -> int:
        return steps_run(settings.steps, settings.strength)

    others = [settings for _, runs in comparisons for settings in runs]
    different = [settings for settings in dict.fromkeys(others) if settings != own]
    predictions = 3 if own.image_guidance not in (None, 1) else 2 if own.guidance_scale != 1 else 1
    total = length(own) + sum(map(length, different)) + preview_count(length(own), predictions, map(length, others))
    with events.stage("explaining", total, "step") as advance, failures_as(JobError):
        start, made = beginning and model.start_of(beginning.canvas), {}
        for settings in (own, *different):
            adapters.apply(model, settings)
            heats = attention and settings == own
            made[settings] = explain(model, settings, start, attention=heats, on_step=advance, on_retry=events.warn)
        compared = []
        for name, runs in comparisons:
            mine = list(dict.fromkeys(runs))
            values = [getattr(settings, COMPARED[name][0]) for settings in mine]
            labels = tuple(f"{v:g}" if isinstance(v, float) else str(v) or "(empty)" for v in values)
            compared.append(Comparison(name=name, labels=labels, runs=tuple(made[settings] for settings in mine)))
        run, texts = made[own], None
        if beginning:
            run = replace(run, picture=beginning.canvas.finish(run.picture))
            texts = model.texts(own, beginning.inputs.labels(), beginning.inputs.exact())
        whole = page(report(model, run, compared, texts=texts, on_preview=advance), course=course)
    return made[own].milliseconds, whole.encode()
