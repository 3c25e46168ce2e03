"""`sd inspect`: what is in a file."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from convert.actions.inspect import Report, inspect
from convert.actions.parts import Part
from convert.actions.tensor_set import tensors_of
from convert.errors import UnsafeFileError, counted, shown, shown_list, size_text
from convert.families.family import ALONE
from convert.files.reader import open_checkpoint
from convert.layouts.noise_schedule import prediction_text
from sd.app.cli import say
from sd.app.cli.inspect_adapter import adapter_lines, adapter_use, hash_lines
from sd.app.cli.inspect_list import broken_row, each, expanded, lines, name_of, reason, row, tiny_vae_use
from sd.app.cli.inspect_word import word_lines, word_use
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import aligned
from sd.app.jobs.model_folder import find
from sd.config import USUAL_GUIDANCE

CLEAN, DANGEROUS = 0, 1
MOST_LEFTOVERS = 20  # groups, the largest ones


def parser() -> Parser:
    parser = Parser(
        prog="sd inspect",
        description="Show what is in a checkpoint: which model, which networks, in which precision, what\n"
        "else, and whether it names code. Nothing in the file is executed. This takes a moment,\n"
        "whatever the file's size, unless a flag asks to read all of it.",
        epilog="examples:\n"
        "  sd inspect v1-5-pruned-emaonly.ckpt\n"
        "  sd inspect --deep merged.safetensors    # also: are all numbers finite?\n"
        "  sd inspect --scan download.ckpt         # only: is it safe? exit code 1 if not\n"
        "  sd inspect models loras/*.safetensors   # a line for each file: what it is, and its use\n\n"
        "exit codes: 0 described, or safe; 1 --scan found something dangerous, here or to programs\n"
        "that run pickles; 2 not a checkpoint, or too damaged to tell (of several: one of them)",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE",
        help="a .ckpt, .pt, .safetensors, ... or a folder of a model or of models; several: a line each")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object for each file")
    parser.add_argument("--variant", metavar="NAME", help="of the weights in a diffusers folder: fp16, non_ema, ...")
    parser.add_argument("--keys", action="store_true", help="list every tensor: name, shape, precision")
    parser.add_argument("--scan", action="store_true", help="only say whether the file is safe")
    add = parser.group("reading all of the file")
    add("--hash", action="store_true", help="its sha256, which is cached")
    add("--tensors-hash", action="store_true", help="the hash of its weights, the same in every container and layout")
    add("--deep", action="store_true",
        help="both, and check every number: NaN, infinity, tensors of zeros, damaged position ids")  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> int:
    paths = list(expanded(args.files))
    look = partial(scan, as_json=args.json, variant=args.variant) if args.scan else partial(describe, args)
    if paths == args.files and len(paths) == 1:
        return look(find(paths[0]))
    if args.scan:
        return scan_all(paths, partial(look, several=True), as_json=args.json)
    if args.json or args.keys or args.hash or args.tensors_hash or args.deep:

        def tell(path: Path, problem: str) -> None:
            print(json.dumps({"path": str(path), "error": problem}) if args.json else f"{shown(str(path))} {problem}")

        return each(paths, look, tell)
    rows = []
    code = each(
        paths,
        lambda path: rows.append(row(name_of(path, args.files), inspect(path, variant=args.variant))),
        lambda path, problem: rows.append(broken_row(name_of(path, args.files), path, problem)),
    )
    print("\n".join(lines(rows)))
    return code


def describe(args: argparse.Namespace, path: Path) -> int:
    """Print all that there is to say of one file."""
    if (args.hash or args.deep or args.tensors_hash) and path.is_file():
        say(f"reading {size_text(path.stat().st_size)}")
    report = inspect(path, hashed=args.hash, tensors_hashed=args.tensors_hash, deep=args.deep, variant=args.variant)
    tensors = {}
    if args.keys and report.safe:
        with open_checkpoint(path, variant=args.variant) as file:
            tensors = tensors_of(file.root)
    if args.json:
        keys = {name: {"dtype": r.dtype, "shape": list(r.shape)} for name, r in tensors.items()}
        print(json.dumps(asdict(report) | ({"tensors": keys} if args.keys else {})))
        return CLEAN
    print("\n".join(page(report)))
    if tensors:
        rows = [(shown(n), f"{r.dtype:<10}", "x".join(map(str, r.shape)) or "one number") for n, r in tensors.items()]
        print("", *aligned(rows, "<<<"), sep="\n")
    return CLEAN


def scan_all(paths: list[Path], look: Callable[[Path], int], *, as_json: bool) -> int:
    """Scan every file. DANGEROUS if any is, else whether all could be read."""
    codes = []

    def tell(path: Path, problem: str) -> None:
        unknown = {"path": str(path), "safe": None, "error": problem}
        print(json.dumps(unknown) if as_json else f"{shown(str(path))} could not be scanned: it {problem}")

    unreadable = each(paths, lambda path: codes.append(look(path)), tell)
    return DANGEROUS if DANGEROUS in codes else unreadable


def scan(path: Path, *, as_json: bool = False, variant: str | None = None, several: bool = False) -> int:
    """Say whether a file is safe, here and elsewhere. Raises for a file that is too damaged to tell.

    several  files are scanned, so each is called by its path, not by its name alone
    """
    try:
        with open_checkpoint(path, variant=variant) as file:
            safe, names, calls = not file.calls, file.foreign, file.calls
            text = f"{shown(str(path) if several else path.name)} is {safety(names, calls)}."
    except UnsafeFileError as error:
        safe, names, calls, text = False, error.names, (), str(error)
        if several:
            text = f"{shown(str(path))} is DANGEROUS: it {reason(error, path)}"
    print(json.dumps({"path": str(path), "safe": safe, "names": names, "calls": calls}) if as_json else text)
    return CLEAN if safe else DANGEROUS


def safety(foreign: tuple[str, ...], calls: tuple[str, ...]) -> str:
    if calls:
        return f"safe to read here; other programs would call {shown_list(calls)}"
    if not foreign:
        return "safe: it names no code"
    return f"safe: {counted(len(foreign), 'foreign name')}, kept as inert data: {shown_list(foreign)}"


def page(report: Report) -> Iterator[str]:
    """The report as lines for a reader."""
    yield shown(Path(report.path).name)
    for name, text in facts(report):
        yield f"  {name:<11}  {text}"
    if (report.components or report.leftovers) and not report.word:
        yield ""
        yield from table(report.components, report.leftovers)


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """Label and text of each line; a line that continues the one above has no label."""
    container = f", {report.container}" if report.container else ""
    size = size_text(report.bytes)
    yield "file", (size if size.endswith("bytes") else f"{size} ({report.bytes:,} bytes)") + container
    if not report.safe:
        yield "safety", "DANGEROUS: nothing in it was executed, and it will not be loaded"
        yield from labelled("because", report.problem.split("\n"))
        yield from labelled("it names", [shown(name) for name in report.dangerous], 20)
    else:
        family = f" ({report.family}, {report.layout} layout)" if report.family else ""
        yield "holds", f"{shown(report.kind)}{family}"
        because = () if report.word else report.evidence[:1] if report.adapter else report.evidence
        yield from labelled("because", [shown(line) for line in because])
        usable = "yes, judging by its names; shapes are checked on loading"
        if report.dropped:
            yield "names", f"read without the words that a framework put into them: {shown_list(report.dropped)}"
        if report.adapter:
            yield "usable", adapter_use(report.adapter, Path(report.path))
            yield from adapter_lines(report.adapter)
        elif report.word:
            yield "usable", word_use(report.word, Path(report.path))
            yield from word_lines(report.word, report.sha256)
        elif report.tiny_vae:
            yield "usable", tiny_vae_use(report.tiny_vae)
            yield "note", "nothing in the file tells whether it is for Stable Diffusion 1 and 2 or for XL"
        else:
            yield "usable", f"no: the file {shown(report.problem, 1000)}" if report.problem else usable
        if report.part:
            yield "part", f"{ALONE[report.part]}, complete ({report.layout} layout); sd convert --only takes it"
        if report.precision:
            yield "precision", report.precision
        yield from training(report)
        yield from labelled("warning", list(report.warnings))
        yield from labelled("note", list(report.notes))
        yield "safety", safety(report.foreign, report.calls)
        yield from labelled("ignored", [shown(what) for what in report.passed_over], 12)
        entries = (report.metadata or {}).items()
        yield from labelled("metadata", [f"{shown(key, 60)} = {shown(value, 60)}" for key, value in entries], 12)
    yield "sha256", report.sha256 or "not known yet; --hash computes it"
    short = [report.sha256[:10]] if report.sha256 else []
    old = [f"{report.old_hash} in older tools"] if report.old_hash else []
    yield "short hash", ", ".join(short + old) or "none"
    if report.adapter:
        yield from hash_lines(report.adapter)
    elif report.sha256 and not report.word:
        yield "published", report.known or "no, not one of the original checkpoints"
    if report.tensors_sha256:
        yield "tensors", report.tensors_sha256
    if report.everything_sha256:
        yield "all tensors", report.everything_sha256
    yield from values(report)


def training(report: Report) -> Iterator[tuple[str, str]]:
    step = [f"{report.global_step:,} steps"] if report.global_step is not None else []
    epoch = [f"epoch {report.epoch}"] if report.epoch is not None else []
    if report.prediction_because:
        yield "predicts", prediction_text(report.prediction, report.prediction_because)
    if report.native_size:
        yield "native size", f"{report.native_size}x{report.native_size} pixels"
    if report.guidance_scale not in (None, USUAL_GUIDANCE):
        yield "guidance", f"{report.guidance_scale:g}, where no other is asked for"
    if step or epoch:
        yield "training", ", ".join(step + epoch)
    if report.weights:
        own = {"model": "the model's own", "ema": "their average over the training (EMA)"}
        both = f"; {own[report.other_weights]} as well" if report.other_weights else ""
        yield "UNet", own[report.weights] + both
    if report.ema_decay is not None and report.ema_updates is not None:
        yield "EMA", f"decay {report.ema_decay:.6g}, {report.ema_updates:,} updates"


def values(report: Report) -> Iterator[tuple[str, str]]:
    found = report.values
    if found is None:
        return
    yield "numbers", "all finite" if not found.nan and not found.infinite else "NOT all finite"
    for label, names in (("NaN", found.nan), ("infinite", found.infinite)):
        for name, number in list(names.items())[:8]:
            yield "", f"{counted(number, 'number')} {label} in {shown(name)}"
    if found.damaged:
        yield "damaged", f"wrong checksum: {shown_list(found.damaged)}"
    if found.zero:
        yield "all zero", f"{counted(len(found.zero), 'tensor')}: {shown_list(found.zero)}"
    for name, number in found.position_ids.items():
        yield "positions", f"{number} of the position ids in {shown(name)} are damaged; loading does not use them"


def labelled(label: str, lines: list[str], most: int = 1000) -> Iterator[tuple[str, str]]:
    """A label beside the first of several lines, of which this many are shown."""
    more = [f"and {len(lines) - most} more; --json shows all"] if len(lines) > most else []
    for index, line in enumerate(lines[:most] + more):
        yield label if index == 0 else "", line


def table(components: tuple[Part, ...], leftovers: tuple[Part, ...]) -> Iterator[str]:
    """Networks and leftovers in aligned columns."""
    rows = [("networks", "tensors", "parameters", "size", "precision"), *map(columns, components)]
    if components:
        tensors, parameters = sum(part.tensors for part in components), sum(part.parameters for part in components)
        size = size_text(sum(part.bytes for part in components))
        rows.append(("together", f"{tensors:,}", f"{parameters:,}", size, ""))
    if leftovers:
        rows += [[""] * 5, ["other tensors", *[""] * 4], *map(columns, leftovers[:MOST_LEFTOVERS])]
        if len(leftovers) > MOST_LEFTOVERS:
            rows.append([f"and {len(leftovers) - MOST_LEFTOVERS} more; --json shows all", *[""] * 4])
    yield from (f"  {line}".rstrip() for line in aligned(rows, "<>>><"))


def columns(part: Part) -> tuple[str, str, str, str, str]:
    prefix = f" ({shown(part.prefix, 40)})" if part.prefix else ""
    dtypes = ", ".join(part.dtypes) if len(part.dtypes) == 1 else ", ".join(f"{n} {d}" for d, n in part.dtypes.items())
    return f"{part.name}{prefix}", f"{part.tensors:,}", f"{part.parameters:,}", size_text(part.bytes), dtypes
