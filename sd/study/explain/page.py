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
from sd.study.chapters import chapter, chapters, where

PREDICTS = {
    "eps": "the noise (ε)",
    "v": "the velocity (v), shown here as noise",
    "edm": "the velocity (v) with the opposite sign, shown here as noise",
    "x0": "the clean latents (x₀), shown here as noise",
}
TEMPLATE_FILE = Path(__file__).with_name("page.html")
TERM_SCRIPT = Path(__file__).parents[1] / "play" / "web" / "page_terms.js"  # there a module, here in the page
TERMS = {  # what the page calls it, what it means, and the chapter that says more
    "latents": (
        "latents",
        "The picture in the VAE’s compressed form: a few channels, at an eighth of the width and height. Every "
        "step works on latents; at the end, the decoder turns them into pixels.",
        2,
    ),
    "attention": (
        "cross-attention",
        "How the UNet reads the prompt: at every place of its features, it weighs the tokens by how well they fit "
        "that place, and mixes their vectors with these weights. The weights of a place sum to 1.",
        4,
    ),
    "timestep": (
        "timestep",
        "How noisy the latents are, as the network is told: 999 is almost pure noise, 0 almost none.",
        5,
    ),
    "eps": (
        "ε, epsilon",
        "The noise in the latents, as the network predicts it.",
        5,
    ),
    "x0": (
        "x̂₀, x-zero hat",
        "The predicted clean picture: what remains of the latents if all the predicted noise is taken away at "
        "once. Early in a run it is blurred, because many pictures are still possible.",
        5,
    ),
    "alpha_bar": (
        "ᾱ, alpha-bar",
        "The share of the clean picture in the latents’ power: near 0 is pure noise, 1 is clean. In formulas, a "
        "prime (ᾱ′) marks the value after the step.",
        5,
    ),
    "sigma": (
        "σ, sigma",
        "The noise level: the standard deviation of the noise beside a picture that is not scaled down. σ = √((1 "
        "− ᾱ)/ᾱ), and 0 is clean.",
        5,
    ),
    "sampler": (
        "sampler",
        "The algorithm that gets from one noise level to the next with the predicted noise.",
        5,
    ),
    "eta": (
        "η, eta",
        "How much of the noise a step replaces by fresh noise: 0 replaces none.",
        5,
    ),
    "h": (
        "h",
        "The length of a step in the logarithm of the noise level: h = ln(σ/σ′).",
        5,
    ),
    "fresh": (
        "z",
        "Fresh noise that a step adds.",
        5,
    ),
    "norm": (
        "norm",
        "The length of latents or noise as one long vector: the square root of the sum of the squares.",
        5,
    ),
    "guidance": (
        "guidance",
        "The network predicts with the prompt and without it. The difference is what the prompt asks for; the "
        "guidance scale says how far to go in that direction.",
        6,
    ),
    "dotted": (
        "dotted words",
        "Point at such a word, tap it, or reach it with the Tab key, and a note like this one appears. Escape "
        "closes it.",
        None,
    ),
}
MORE = {"words": (3,), "noise": (5,), "unet": (4, 6), "vae": (2,)}  # the chapters about parts of the machine
WIDTH, HEIGHT, MARGIN = 400, 200, 28  # of the drawing of the schedule


def page(report: dict, *, course: str | None = None) -> str:
    """The whole page, from the report of `sd.study.explain.report.report`.

    course  where the chapters are, for links: `course`/6-guidance.md. None names them only
    """
    settings, picture = report["settings"], report["picture"]
    negative, second = settings["negative_prompt"], settings["negative_prompt_2"]
    zeros = report["empty_prompt"] == "zeros" and not second.strip()
    empty = f"for {'zeros, which stand for ' * zeros}the empty prompt"
    picture_too, count, strip = settings["image_guidance"] is not None, len(report["steps"]), report["strips"][0]
    tokens = [column for column in strip["columns"] if column["kind"] == "token"]
    return Template(TEMPLATE_FILE.read_text(encoding="utf-8")).substitute(
        title=escape(f"How a picture was made: {settings['prompt'][:80]}"),
        prompt=f"“{escape(settings['prompt'])}”" if settings["prompt"].strip() else "<i>without a prompt</i>",
        negative=(f"for the negative prompt “{escape(negative)}”" if negative.strip() else empty)
        + (f" (the second text encoder reads “{escape(second)}”)" if second.strip() else "")
        + (", with the picture to edit" if picture_too else ""),
        picture=picture["uri"],
        width=picture["width"],
        height=picture["height"],
        exact=exactness(picture["exact"]),
        given="\n".join(map(figure, report["given"])),
        facts="\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts(report)),
        steps=count,
        steps_in_words="one step" if count == 1 else f"{count} steps",
        chips="".join(f"<i>{escape(column['text'].strip() or '…')}</i>" for column in tokens[:12]),
        token_count=f"{len(tokens)} in {77 * strip['rows']} places",
        vectors=report["vectors"],
        vector_size=f"{report['vector_width']} numbers each",
        noise=report["steps"][0]["pictures"]["x_t"],
        latents=report["latents"],
        seed=settings["seed"],
        beginning=beginning(settings, report["given"]),
        guidance=guidance(settings),
        terms="\n".join(term(name, course) for name in TERMS),
        **{f"more_{part}": chapters(numbers, course) for part, numbers in MORE.items()},
        where=where(course),
        curve=schedule_drawing(report["curve"], report["steps"]),
        version=__version__,
        term_script=TERM_SCRIPT.read_text(encoding="utf-8").replace("export ", ""),
        data=embedded(report),
    )


def embedded(report: dict) -> str:
    """JSON that is safe inside a script element: no prompt can end the element."""
    text = json.dumps(report, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def term(name: str, course: str | None) -> str:
    """An entry of the list of terms, from which the script takes its notes."""
    title, text, number = TERMS[name]
    more = "" if number is None else f' <span class="more">{chapter(number, course)}</span>'
    return f'<div id="term-{name}"><dt>{title}</dt><dd>{text}{more}</dd></div>'


def beginning(settings: dict, given: Sequence[dict]) -> str:
    if given and settings["image_guidance"] is None:
        return "The run begins with a picture, encoded into latents, with noise from the seed on top."
    also = " The UNet reads the picture to edit beside it." if given else ""
    return f"The run begins with pure noise: random numbers drawn from the seed. Another seed, another picture.{also}"


def guidance(settings: dict) -> str:
    """What the UNet predicts at each step, as a sentence."""
    scale, of_picture = settings["guidance_scale"], settings["image_guidance"]
    word = '<button type="button" class="term" data-term="guidance">guidance</button>'
    if of_picture not in (None, 1):
        return (
            "It predicts three times: with the prompt and the picture, with the picture alone, and with neither. "
            f"The {word} scales, {scale:g} and {of_picture:g}, say how far to go in each direction."
        )
    if scale == 1:
        return f"With {word} off, it predicts once, with the prompt."
    return (
        f"It predicts twice, with the prompt and without it; {word} goes {scale:g} times as far as the difference: "
        f"ε = ε without + {scale:g} · (ε with − ε without)."
    )


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
