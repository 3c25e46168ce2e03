"""`sd explain`: a picture from text, and a page that shows how it was made."""

import argparse
import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli import make_pictures as making
from sd.app.cli import picture_flags as making_flags
from sd.app.cli.flags import Parser, add_output_flags, bar_hidden, say
from sd.app.errors import JobError, UsageError, failure_of
from sd.app.jobs.outputs import free_path
from sd.app.jobs.plan import Line, plan, read_lines
from sd.pipeline.settings import SettingError, Settings, nearest

if TYPE_CHECKING:
    from sd.pipeline.stable_diffusion import StableDiffusion
    from sd.study.explain.recording import Run
    from sd.study.explain.report import Comparison

DEFAULT_OUT = "outputs/explain-{seed}.html"
MOST_STEPS, MOST_RUNS = 100, 12
COMPARED = {  # what --compare can vary: the setting, how its values are read, and what stands between them
    "guidance": ("guidance_scale", float, ","),
    "seed": ("seed", int, ","),
    "steps": ("steps", int, ","),
    "sampler": ("sampler", str, ","),
    "schedule": ("schedule", str, ","),
    "prompt": ("prompt", str, "|"),
    "negative": ("negative_prompt", str, "|"),
}


def parser() -> Parser:
    parser = Parser(
        prog="sd explain",
        description="Make a picture from text, and write a page that shows how: every step, what the\n"
        "network saw and said, where it looked for each word. The picture is the one that\n"
        "sd txt2img makes. The page is one file that needs no network; its path is printed.",
        epilog="examples:\n"
        '  sd explain "a red circle on a blue background" --steps 20 -o report.html\n'
        '  sd explain "a lighthouse" -m model.ckpt --compare guidance=1,3,7.5 --compare sampler=ddim,euler\n'
        '  sd explain "a lighthouse" -m model.ckpt --compare "prompt=a castle|a lighthouse at night"',
    )
    making_flags.add_prompt_flags(parser)
    making_flags.add_model_flags(parser)
    making_flags.add_picture_flags(parser, size_default="the model's native size")
    making_flags.add_sampling_flags(parser)
    page = parser.add_argument_group("page")
    page.add_argument("--compare", action="append", default=[], metavar="NAME=A,B,...",
                      help=f"also show runs that differ in one setting: {', '.join(COMPARED)}; a | stands between "
                      "prompts; may be given several times")  # fmt: skip
    page.add_argument("--no-attention", action="store_true", help="no heat maps of the words, which saves time")
    output = add_output_flags(parser)
    output.add_argument("-o", "--out", default=DEFAULT_OUT, metavar="FILE",
                        help=f"an .html file, or a folder (default: {DEFAULT_OUT})")  # fmt: skip
    output.add_argument("--json", action="store_true", help="print one JSON object instead of the path")
    parser.set_defaults(from_file=None, count=1, batch_size=1, vary=None, vary_seed=None, tile="")
    return parser


@dataclass(frozen=True)
class Asked:
    """One --compare."""

    name: str
    field: str
    values: tuple


def run(args: argparse.Namespace) -> int:
    from convert.checkpoint import read_checkpoint
    from convert.files.reader import checksums_ahead, open_checkpoint

    if args.low_memory:
        raise UsageError("--low-memory takes the two predictions of a step apart, which are shown here. Leave it out.")
    making.choose_model(args)
    asked = [parse_comparison(text) for text in args.compare]
    lines = read_lines(args, {})
    given_seed, seed = args.seed, secrets.randbits(32) if args.seed is None else args.seed
    all_settings(args, lines, asked, seed, native=512)  # what is wrong with them shows before the file is opened
    path = page_path(args.out, seed, force=args.force)
    with open_checkpoint(args.model) as file:
        checkpoint = read_checkpoint(file, weights=args.weights)
        making.check_family(checkpoint, "text to picture")
        planned = all_settings(args, lines, asked, seed, native=checkpoint.config.native_size)
        jobs = [settings for _, settings in planned]
        making.check_clip_skip(checkpoint, jobs)
        for settings in jobs:
            settings.require_prediction(checkpoint.config.prediction)
        with checksums_ahead(file, checkpoint.tensors.values()):
            running = making.pick_device_and_precision(args, checkpoint)
            model = making.load_model(args, file, checkpoint, *running)
    if given_seed is None:
        say(f"seed {seed}", quiet=args.quiet)
    making.warn_of_unused(jobs, model.runner.options)
    milliseconds, page = make_page(model, planned, asked, args)
    from sd.files import written_whole

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
    """What --compare guidance=1,3,7.5 asks for. Raises UsageError for what cannot be compared."""
    name, equals, given = text.partition("=")
    name = name.strip()
    if name not in COMPARED:
        raise UsageError(f"--compare {name!r} {nearest(name, COMPARED)}")
    field, read, between = COMPARED[name]
    if not equals or (read is not str and not given.strip()):
        raise UsageError(f"--compare {text} names no values. Example: --compare guidance=1,3,7.5.")
    try:
        values = tuple(read(part.strip()) for part in given.split(between))
    except ValueError:
        raise UsageError(f"--compare {text}: {name} takes numbers, such as {name}=1,2.") from None
    return Asked(name, field, tuple(dict.fromkeys(values)))


def all_settings(
    args: argparse.Namespace, lines: Sequence[Line], asked: Sequence[Asked], seed: int, native: int
) -> list[tuple[Asked | None, Settings]]:
    """Those of the run itself, then those of every comparison, checked. A comparison with one value has the run, too.

    Raises UsageError or SettingError for what cannot be.
    """
    (own,) = plan(args, lines, seed, native)
    found: list[tuple[Asked | None, Settings]] = [(None, own)]
    for one in asked:
        if len(one.values) == 1:
            found.append((one, own))
        for value in one.values:
            changed = argparse.Namespace(**{**vars(args), one.field: value})
            prompt = [Line("", {"prompt": value})] if one.field == "prompt" else lines
            try:
                (settings,) = plan(changed, prompt, value if one.field == "seed" else seed, native)
            except SettingError as error:
                raise UsageError(f"--compare {one.name}={value}: {error}") from None
            found.append((one, settings))
    if max(settings.steps for _, settings in found) > MOST_STEPS:
        raise UsageError(f"a page has room for {MOST_STEPS} steps. Use --steps {MOST_STEPS} or fewer.")
    if len(found) > MOST_RUNS:
        raise UsageError(f"--compare asks for {len(found)} runs; a page has room for {MOST_RUNS}. Give fewer values.")
    return found


def page_path(out: str, seed: int, *, force: bool) -> Path:
    """Where the page goes; its folder exists afterwards. Raises UsageError where that cannot be."""
    path = Path(out.replace("{seed}", str(seed)))
    if path.is_dir() or out.endswith("/"):
        path = path / f"explain-{seed}.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: the page is an .html file. Give such a name, or a folder that exists.")
    return free_path(path, force=force)


def make_page(
    model: "StableDiffusion",
    planned: Sequence[tuple[Asked | None, Settings]],
    asked: Sequence[Asked],
    args: argparse.Namespace,
) -> tuple[float, bytes]:
    """The milliseconds that the run took, and the page."""
    from tqdm import tqdm

    from sd.study.explain.page import page
    from sd.study.explain.recording import explain
    from sd.study.explain.report import preview_count, report

    (_, own), *others = planned
    different = list(dict.fromkeys(settings for _, settings in others if settings != own))
    previews = preview_count(own.steps, own.guidance_scale != 1, [settings.steps for _, settings in others])
    total = own.steps + sum(settings.steps for settings in different) + previews
    with tqdm(desc="explaining", total=total, unit="step", disable=bar_hidden(args.quiet), leave=False) as bar:
        try:
            runs = {own: explain(model, own, attention=not args.no_attention, on_step=bar.update, on_retry=say)}
            for settings in different:
                runs[settings] = explain(model, settings, attention=False, on_step=bar.update, on_retry=say)
            comparisons = list(compared(others, asked, runs))
            whole = page(report(model, runs[own], comparisons, on_preview=bar.update))
        except Exception as error:
            problem = failure_of(error)
            if problem is None:
                raise
            raise JobError(problem) from None
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
