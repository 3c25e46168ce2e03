"""The record of a run as a page to watch: one self-contained HTML file that works offline.

`page.html` holds its style and script; it shows the report, which is embedded as JSON.
"""

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

from sd import __version__
from sd.pipeline.xl_settings import REFINER

PREDICTS = {
    "eps": "the noise (ε)",
    "v": "the velocity (v), shown here as noise",
    "edm": "the velocity (v) with the opposite sign, shown here as noise",
    "x0": "the clean latents (x₀), shown here as noise",
}
TEMPLATE_FILE = Path(__file__).with_name("page.html")
WIDTH, HEIGHT, MARGIN = 400, 200, 28  # of the drawing of the schedule


def page(report: dict) -> str:
    """The whole page, from the report of `sd.study.explain.report.report`."""
    settings, picture = report["settings"], report["picture"]
    negative, second = settings["negative_prompt"], settings["negative_prompt_2"]
    zeros = report["empty_prompt"] == "zeros" and not second.strip()
    empty = f"for {'zeros, which stand for ' * zeros}the empty prompt"
    picture_too = settings["image_guidance"] is not None
    return Template(TEMPLATE_FILE.read_text(encoding="utf-8")).substitute(
        title=escape(f"How a picture was made: {settings['prompt'][:80]}"),
        prompt=escape(settings["prompt"]) or "<i>without a prompt</i>",
        negative=(f"for the negative prompt “{escape(negative)}”" if negative.strip() else empty)
        + (f" (the second text encoder reads “{escape(second)}”)" if second.strip() else "")
        + (", with the picture to edit" if picture_too else ""),
        picture=picture["uri"],
        width=picture["width"],
        height=picture["height"],
        exact=exactness(picture["exact"]),
        given="\n".join(map(figure, report["given"])),
        facts="\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts(report)),
        steps=len(report["steps"]),
        curve=schedule_drawing(report["curve"], report["steps"]),
        layers=sum(resolution["layers"] for resolution in report["resolutions"]),
        version=__version__,
        data=embedded(report),
    )


def embedded(report: dict) -> str:
    """JSON that is safe inside a script element: no prompt can end the element."""
    text = json.dumps(report, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def exactness(exact: bool) -> str:
    return "The finished picture, as a PNG with its settings." if exact else "The finished picture, scaled down."


def figure(given: dict) -> str:
    """A picture that the run was given."""
    name = escape(given["name"])
    return (
        f'<figure><img src="{given["uri"]}" alt="{name[0].upper()}{name[1:]}">'
        f'<figcaption class="soft">{name[0].upper()}{name[1:]}.</figcaption></figure>'
    )


def facts(report: dict) -> Iterator[tuple[str, str]]:
    settings, model = report["settings"], report["model"]
    yield "model", f"{model['name']} ({model['family']})"
    if model["sha256"]:
        yield "sha256 of its file", model["sha256"]
    yield "network predicts", PREDICTS[report["prediction"]]
    yield "size", f"{settings['width']}x{settings['height']}"
    if settings["original_size"]:
        yield "original size that it is told", "x".join(map(str, settings["original_size"]))
    if settings["crop"]:
        yield "crop that it is told, left and top", ", ".join(map(str, settings["crop"]))
    if settings["prompt_2"]:
        yield "the second text encoder reads", settings["prompt_2"]
    if model["family"] == REFINER:
        scores = (settings[name] for name in ("aesthetic_score", "negative_aesthetic_score"))
        yield "aesthetic scores", " and ".join(f"{score:g}" for score in scores)
    yield "seed", str(settings["seed"])
    yield "sampler", f"{settings['sampler']}, {settings['schedule']} schedule, {settings['steps']} steps"
    if settings["eta"] is not None:
        yield "eta", f"{settings['eta']:g}"
    yield "guidance scale", f"{settings['guidance_scale']:g}" + (" (off)" if settings["guidance_scale"] == 1 else "")
    if settings["image_guidance"] is not None:
        yield (
            "image guidance",
            f"{settings['image_guidance']:g}" + (" (off)" if settings["image_guidance"] == 1 else ""),
        )
    if len(report["steps"]) < settings["steps"]:
        yield "strength", f"{settings['strength']:g}: {len(report['steps'])} of {settings['steps']} steps run"
    if settings["guidance_rescale"]:
        yield "guidance rescale", f"{settings['guidance_rescale']:g}"
    if settings["guidance_interval"]:
        yield "guidance at sigma", " to ".join(f"{sigma:g}" for sigma in settings["guidance_interval"])
    if settings["reuse_features"] > 1:
        yield "inner blocks computed", f"in at least one of {settings['reuse_features']} predictions"
    if settings["merge_tokens"]:
        yield "tokens merged before self-attention", f"{100 * settings['merge_tokens']:g} % at the largest resolution"
    yield "precision", ", ".join(f"{part} {dtype}" for part, dtype in report["precision"].items())
    yield "time", f"{report['milliseconds'] / 1000:.1f} s on {report['device']}, recording included"


def schedule_drawing(curve: Sequence[tuple[float, float]], steps: Sequence[dict]) -> str:
    """alpha_bar over the timestep, which falls from left to right as in the run, with a dot per step."""
    last = curve[-1][0]

    def place(timestep: float, alpha_bar: float) -> tuple[float, float]:
        x = MARGIN + (1 - timestep / last) * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - alpha_bar * (HEIGHT - 2 * MARGIN)

    path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in curve))
    dots = "".join(
        f'<circle data-step="{step["number"]}" r="4" cx="{x:.1f}" cy="{y:.1f}"/>'
        for step in steps
        for x, y in [place(step["timestep"], step["alpha_bar"])]
    )
    (left, bottom), (right, top) = place(last, 0), place(0, 1)
    words = (
        f'<text x="{left}" y="{HEIGHT - 10}">timestep {last:g}</text>'
        f'<text x="{right}" y="{HEIGHT - 10}" text-anchor="end">0</text>'
        f'<text x="{left - 6}" y="{top + 4}" text-anchor="end">1</text>'
        f'<text x="{left - 6}" y="{bottom + 4}" text-anchor="end">0</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Share of the picture over the timestep">'
        f'<line x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/><line x1="{left}" y1="{top}" x2="{left}" '
        f'y2="{bottom}"/><path d="{path}"/>{dots}{words}</svg>'
    )
