"""`sd explain`: a picture, and a page that shows how it was made."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from sd.app.cli import flags
from sd.app.cli.explain_start import add_start_flags, with_start
from sd.app.cli.make_pictures import model_of, read_lines, settings_of
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import Terminal
from sd.app.errors import UsageError
from sd.app.jobs.course import course_beside
from sd.app.jobs.explaining import COMPARED, make_page
from sd.app.jobs.outputs import file_in
from sd.app.jobs.request import JobRequest, Line
from sd.pipeline.image.input_settings import InputSettings
from sd.pipeline.second_pass import steps_run
from sd.pipeline.settings import SettingError, Settings, nearest

DEFAULT_OUT = "outputs/explain-{seed}.html"
MOST_STEPS, MOST_RUNS = 100, 12


def parser() -> Parser:
    parser = Parser(
        prog="sd explain",
        description="Make a picture, and write a page that shows how: every step, what the network saw and\n"
        "predicted, and what each word attends to. The picture is the one that sd txt2img makes;\n"
        "with --init, that of sd img2img, or of sd depth2img or sd edit if the model is made for\n"
        "them. The page is one file that works offline; prints its path.",
        epilog="examples:\n"
        '  sd explain "a red circle on a blue background" --steps 20 -o report.html\n'
        '  sd explain "a lighthouse" -m model.ckpt --compare guidance=1,3,7.5 --compare sampler=ddim,euler\n'
        '  sd explain "a lighthouse" -m model.ckpt --compare "prompt=a castle|a lighthouse at night"\n'
        '  sd explain "a marble statue" --init tigers.jpg -m 512-depth-ema.ckpt\n'
        '  sd explain "make it snow" --init photo.jpg -m instruct-pix2pix.ckpt --image-guidance 1.2',
    )
    flags.add_prompt_flags(parser)
    flags.add_model_flags(parser)
    flags.add_picture_flags(parser, size_default="the model's native size", seed="of the picture's noise")
    flags.add_sampling_flags(parser)
    flags.add_xl_flags(parser, refiner=False)
    add_start_flags(parser)
    add = parser.group("page")
    add("--compare", action="append", default=[], metavar="NAME=A,B,...",
        help=f"also show runs that differ in one setting: {', '.join(COMPARED)}; prompts are separated by |; can be "
        "given several times")  # fmt: skip
    add("--no-attention", action="store_true", help="leave out the heat maps of the words, to save time")
    add = flags.add_output_flags(parser)
    add("-o", "--out", default=DEFAULT_OUT, metavar="FILE", help=f"an .html file or a folder (default: {DEFAULT_OUT})")
    add("--json", action="store_true", help="print one JSON object instead of the path")
    return parser


def run(args: argparse.Namespace) -> int:
    from sd.app.jobs.adapters import announce, find_adapters
    from sd.app.jobs.embeddings import find_words
    from sd.app.jobs.model import opened, teach_words
    from sd.app.jobs.plan import check_jobs, for_model, with_seeds
    from sd.app.jobs.unused import warn_of_unused
    from sd.files import written_whole

    if args.low_memory:
        raise UsageError("--low-memory separates the two predictions of a step, which are shown here. Leave it out.")
    asked = [parse_comparison(text) for text in args.compare]
    lines, settings = read_lines(args), settings_of(args)
    task = "text to picture" if args.init is None else "image to image"
    given = {"settings": settings, "init": args.init, "depth": args.depth, "max_megapixels": args.max_megapixels}
    given |= {"inputs": InputSettings(resize_mode=args.resize_mode, invert_depth=args.invert_depth)}
    request = with_seeds(JobRequest(task=task, model=model_of(args), lines=lines, out=args.out, **given))
    seed, events = request.settings["seed"], Terminal(quiet=args.quiet)
    with opened(request.model, task=None) as (checkpoint, prepare):
        request, beginning = with_start(request, checkpoint.config)
        for note in beginning.inputs.notes if beginning else ():
            events.note(note)
        request = for_model(request, checkpoint)
        own, comparisons = all_settings(request, asked, checkpoint.config.native_size)
        jobs = [own, *(settings for _, runs in comparisons for settings in runs)]
        check_jobs(request, jobs, checkpoint.config)
        jobs, adapters = find_adapters(jobs, checkpoint.config)
        own, *others = jobs
        comparisons = [(name, [others.pop(0) for _ in runs]) for name, runs in comparisons]
        learned = find_words(request.model, jobs, checkpoint.config, events, adapters.words)
        out = args.out.replace("{seed}", str(seed))
        path = file_in(out, f"explain-{seed}.html", [".html", ".htm"], force=args.force)
        model = prepare()(events)
        teach_words(model, learned)
    if args.seed in (None, -1):
        events.note(f"seed {seed}")
    announce(adapters, jobs, events)
    warn_of_unused(request.model, jobs, checkpoint, adapters, model, events)
    attention = not args.no_attention
    milliseconds, page = make_page(
        model, own, comparisons, adapters, events, beginning, attention=attention, course=course_beside(path)
    )
    with written_whole(path, force=args.force) as file:
        file.write(page)
    if args.json:
        sha256 = hashlib.sha256(page).hexdigest()
        values = {"seed": seed, "sha256": sha256, "bytes": len(page), "ms": round(milliseconds)}
        print(json.dumps({"event": "explanation", "path": str(path), **values}))
    else:
        print(path)
    return 0


def parse_comparison(text: str) -> tuple[str, tuple]:
    """The name and the values that --compare guidance=1,3,7.5 asks for. Raises UsageError."""
    name, equals, given = text.partition("=")
    name = name.strip()
    if name not in COMPARED:
        raise UsageError(f"--compare {name!r} {nearest(name, COMPARED)}")
    _, read, between = COMPARED[name]
    if not equals or (read is not str and not given.strip()):
        raise UsageError(f"--compare {text} has no values. Example: --compare guidance=1,3,7.5.")
    try:
        return name, tuple(dict.fromkeys(read(part.strip()) for part in given.split(between)))
    except ValueError:
        raise UsageError(f"--compare {text}: {name} takes numbers, such as {name}=1,2.") from None


def all_settings(
    request: JobRequest, asked: Sequence[tuple[str, tuple]], native: int
) -> tuple[Settings, list[tuple[str, list[Settings]]]]:
    """The settings of the run itself, and of every comparison. A comparison with one value includes the run, too.

    Raises UsageError or SettingError for settings that are not allowed.
    """
    from sd.app.jobs.plan import plan

    (own,) = plan(request, native)
    comparisons = []
    for name, values in asked:
        runs = [own] if len(values) == 1 else []
        for value in values:
            line = Line({**request.lines[0].settings, COMPARED[name][0]: value})
            try:
                runs += plan(replace(request, lines=(line,)), native)
            except SettingError as error:
                raise UsageError(f"--compare {name}={value}: {error}") from None
        comparisons.append((name, runs))
    runs = [own, *(settings for _, some in comparisons for settings in some)]
    if max(settings.steps for settings in runs) > MOST_STEPS:
        raise UsageError(f"a page has room for {MOST_STEPS} steps. Use --steps {MOST_STEPS} or fewer.")
    if not all(steps_run(settings.steps, settings.strength) for settings in runs):
        raise UsageError(f"--strength {own.strength:g} runs no step, so there is nothing to explain. Raise it.")
    if len(runs) > MOST_RUNS:
        raise UsageError(f"--compare asks for {len(runs)} runs; a page has room for {MOST_RUNS}. Give fewer values.")
    return own, comparisons
