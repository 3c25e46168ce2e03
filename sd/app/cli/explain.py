"""`sd explain`: a picture from text, and a page that shows how it was made."""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sd.app.cli import flags, say
from sd.app.cli.make_pictures import model_of, read_lines, settings_of
from sd.app.cli.terminal import Terminal
from sd.app.errors import JobError, UsageError, failures_as
from sd.app.jobs.outputs import file_in
from sd.app.jobs.request import Events, JobRequest, Line
from sd.pipeline.settings import SettingError, Settings, nearest

if TYPE_CHECKING:
    from sd.pipeline.stable_diffusion import StableDiffusion
    from sd.study.explain.recording import Run
    from sd.study.explain.report import Comparison

DEFAULT_OUT = "outputs/explain-{seed}.html"
MOST_STEPS, MOST_RUNS = 100, 12
COMPARED = {  # what --compare can vary: the setting, the type of its values, and what separates them
    "guidance": ("guidance_scale", float, ","),
    "seed": ("seed", int, ","),
    "steps": ("steps", int, ","),
    "sampler": ("sampler", str, ","),
    "schedule": ("schedule", str, ","),
    "prompt": ("prompt", str, "|"),
    "negative": ("negative_prompt", str, "|"),
}


def parser() -> flags.Parser:
    parser = flags.Parser(
        prog="sd explain",
        description="Make a picture from text, and write a page that shows how: every step, what the\n"
        "network saw and predicted, and what each word attends to. The picture is the one\n"
        "that sd txt2img makes. The page is one file that works offline; prints its path.",
        epilog="examples:\n"
        '  sd explain "a red circle on a blue background" --steps 20 -o report.html\n'
        '  sd explain "a lighthouse" -m model.ckpt --compare guidance=1,3,7.5 --compare sampler=ddim,euler\n'
        '  sd explain "a lighthouse" -m model.ckpt --compare "prompt=a castle|a lighthouse at night"',
    )
    flags.add_prompt_flags(parser)
    flags.add_model_flags(parser)
    flags.add_picture_flags(parser, size_default="the model's native size")
    flags.add_sampling_flags(parser)
    add = parser.group("page")
    add("--compare", action="append", default=[], metavar="NAME=A,B,...",
        help=f"also show runs that differ in one setting: {', '.join(COMPARED)}; prompts are separated by |; can be "
        "given several times")  # fmt: skip
    add("--no-attention", action="store_true", help="leave out the heat maps of the words, to save time")
    add = flags.add_output_flags(parser)
    add("-o", "--out", default=DEFAULT_OUT, metavar="FILE", help=f"an .html file or a folder (default: {DEFAULT_OUT})")
    add("--json", action="store_true", help="print one JSON object instead of the path")
    return parser


@dataclass(frozen=True)
class Asked:
    """One --compare."""

    name: str
    field: str
    values: tuple


def run(args: argparse.Namespace) -> int:
    from sd.app.jobs.model import opened
    from sd.app.jobs.plan import check_jobs, with_seeds
    from sd.app.jobs.run import warn_of_unused
    from sd.files import written_whole

    if args.low_memory:
        raise UsageError("--low-memory separates the two predictions of a step, which are shown here. Leave it out.")
    asked = [parse_comparison(text) for text in args.compare]
    lines, settings = read_lines(args), settings_of(args)
    request = with_seeds(
        JobRequest(task="text to picture", model=model_of(args), lines=lines, settings=settings, out=args.out)
    )
    seed, events = request.settings["seed"], Terminal(quiet=args.quiet)
    with opened(request.model, request.task) as (checkpoint, load):
        planned = all_settings(request, asked, checkpoint.config.native_size)
        jobs = [settings for _, settings in planned]
        check_jobs(request, jobs, checkpoint.config)
        out = args.out.replace("{seed}", str(seed))
        path = file_in(out, f"explain-{seed}.html", [".html", ".htm"], force=args.force)
        model = load(events)
    if args.seed is None:
        events.note(f"seed {seed}")
    warn_of_unused(request.model, jobs, model, events)
    milliseconds, page = make_page(model, planned, asked, events, attention=not args.no_attention)
    with written_whole(path, force=args.force) as file:
        file.write(page)
    if args.json:
        sha256 = hashlib.sha256(page).hexdigest()
        values = {"seed": seed, "sha256": sha256, "bytes": len(page), "ms": round(milliseconds)}
        print(json.dumps({"event": "explanation", "path": str(path), **values}))
    else:
        print(path)
    return 0


def parse_comparison(text: str) -> Asked:
    """The comparison that --compare guidance=1,3,7.5 asks for. Raises UsageError."""
    name, equals, given = text.partition("=")
    name = name.strip()
    if name not in COMPARED:
        raise UsageError(f"--compare {name!r} {nearest(name, COMPARED)}")
    field, read, between = COMPARED[name]
    if not equals or (read is not str and not given.strip()):
        raise UsageError(f"--compare {text} has no values. Example: --compare guidance=1,3,7.5.")
    try:
        values = tuple(read(part.strip()) for part in given.split(between))
    except ValueError:
        raise UsageError(f"--compare {text}: {name} takes numbers, such as {name}=1,2.") from None
    return Asked(name, field, tuple(dict.fromkeys(values)))


def all_settings(request: JobRequest, asked: Sequence[Asked], native: int) -> list[tuple[Asked | None, Settings]]:
    """The settings of the run itself, then of every comparison. A comparison with one value includes the run, too.

    Raises UsageError or SettingError for settings that are not allowed.
    """
    from sd.app.jobs.plan import plan, with_settings

    (own,) = plan(request, native)
    found: list[tuple[Asked | None, Settings]] = [(None, own)]
    for one in asked:
        if len(one.values) == 1:
            found.append((one, own))
        for value in one.values:
            if one.field == "prompt":
                changed = replace(request, lines=(Line({"prompt": value}),))
            else:
                changed = with_settings(request, **{one.field: value})
            try:
                (settings,) = plan(changed, native)
            except SettingError as error:
                raise UsageError(f"--compare {one.name}={value}: {error}") from None
            found.append((one, settings))
    if max(settings.steps for _, settings in found) > MOST_STEPS:
        raise UsageError(f"a page has room for {MOST_STEPS} steps. Use --steps {MOST_STEPS} or fewer.")
    if len(found) > MOST_RUNS:
        raise UsageError(f"--compare asks for {len(found)} runs; a page has room for {MOST_RUNS}. Give fewer values.")
    return found


def make_page(
    model: "StableDiffusion",
    planned: Sequence[tuple[Asked | None, Settings]],
    asked: Sequence[Asked],
    events: Events,
    *,
    attention: bool,
) -> tuple[float, bytes]:
    """The milliseconds that the run took, and the page."""
    from sd.study.explain.page import page
    from sd.study.explain.recording import explain
    from sd.study.explain.report import preview_count, report

    (_, own), *others = planned
    different = list(dict.fromkeys(settings for _, settings in others if settings != own))
    previews = preview_count(own.steps, own.guidance_scale != 1, [settings.steps for _, settings in others])
    total = own.steps + sum(settings.steps for settings in different) + previews
    with events.stage("explaining", total, "step") as advance, failures_as(JobError):
        runs = {own: explain(model, own, attention=attention, on_step=advance, on_retry=say)}
        for settings in different:
            runs[settings] = explain(model, settings, attention=False, on_step=advance, on_retry=say)
        comparisons = list(compared(others, asked, runs))
        whole = page(report(model, runs[own], comparisons, on_preview=advance))
    return runs[own].milliseconds, whole.encode()


def compared(
    others: Sequence[tuple[Asked | None, Settings]], asked: Sequence[Asked], runs: "dict[Settings, Run]"
) -> "Iterator[Comparison]":
    from sd.study.explain.report import Comparison

    for one in asked:
        mine = list(dict.fromkeys(settings for which, settings in others if which is one))
        labels = tuple(label(getattr(settings, one.field)) for settings in mine)
        yield Comparison(name=one.name, labels=labels, runs=tuple(runs[settings] for settings in mine))


def label(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or "(empty)"
