"""`sd convert`: a checkpoint from one layout to another."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from convert.actions.convert import convert
from convert.actions.target import LAYOUTS, MismatchError
from convert.actions.writing import PRECISIONS
from convert.adapters.adapter import summary
from convert.adapters.spellings import SPELLINGS
from convert.errors import counted, joined, shown
from convert.families.family import ALONE, COMPONENTS
from sd.app.cli import say
from sd.app.cli.flags import add_output_flags, add_reading_flags
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import progress_bar
from sd.app.errors import UsageError
from sd.app.jobs.adapter_folder import find_adapter
from sd.app.jobs.model import describe
from sd.app.jobs.model_folder import find
from sd.config import USUAL_GUIDANCE
from sd.text.prompt_adapters import from_flag

if TYPE_CHECKING:
    from torch import Tensor

    from convert.actions.bake import Baking, Strengths
    from convert.actions.convert import Conversion
    from convert.actions.verify import Verified

WRITTEN, MISMATCH = 0, 1


def parser() -> Parser:
    parser = Parser(
        prog="sd convert",
        description="Write the model of a checkpoint in another layout. Weights are copied bit for bit unless\n"
        "--precision is given; other tensors are left out without --keep-all. Nothing in the file\n"
        "is executed.",
        epilog="examples:\n"
        "  sd convert v1-5-pruned-emaonly.ckpt v1-5.safetensors --precision fp16\n"
        "  sd convert model.ckpt folder --to diffusers --verify\n"
        "  sd convert model.ckpt baked.ckpt --vae vae-ft-mse-840000-ema-pruned.ckpt\n"
        "  sd convert model.ckpt baked.safetensors --lora detail.safetensors:0.8\n"
        "  sd convert model.ckpt vae.safetensors --only vae --to original\n\n"
        "exit codes: 0 written; 1 --verify found a difference, and removed the file;\n"
        "2 the source cannot be read, or the target cannot be written",
    )
    # fmt: off
    add = parser.add_argument
    add("source", type=Path, metavar="IN",
        help="an original .ckpt or .safetensors, one of ours, or a diffusers folder")
    add("target", type=Path, metavar="OUT",
        help=".safetensors; .ckpt, a pickle in the original layout; or, with --to diffusers, a folder")
    add_layout_flag(parser, "IN")
    add("--precision", choices=["keep", *PRECISIONS], default="keep", help="convert all tensors to it (default: keep)")
    add("--weights", choices=["auto", "model", "ema"], default="auto",
        help="which UNet weights, if there are both: the model's own, or their average over the training "
        "(default: auto, the model's own unless there are only averaged ones, or the model is for editing)")
    add_reading_flags(add)
    add("--only", choices=ALONE, help="write only this network; IN may be a file of that network alone")
    add("--vae", type=Path, metavar="FILE",
        help="use the VAE in FILE, of any layout, in place of the model's own, or if it has none")
    add("--lora", action="append", default=[], metavar="FILE[:S[:T]]",
        help="add a LoRA, or a relative of it, to the weights, at strength S (default: 1) for the UNet and T (default: "
        "as S) for the text encoder; may be given several times")
    add("--spelling", choices=SPELLINGS,
        help="IN is a LoRA, or a relative of it: write it as OUT with the names that kohya's scripts (read by most "
        "programs), diffusers or PEFT give its tensors. For PEFT, OUT is a folder")
    add("--keep-all", action="store_true",
        help="also keep what is not part of the model: the other kind of UNet weights, schedule tables, counters, "
        "leftovers of the training (only tensors, no optimiser). Our layout stores them under extra.*; the original "
        "layout restores them")
    add("--verify", action="store_true",
        help="read OUT back and compare every number with IN; then print the hash of its tensors, the same in every "
        "layout, as sd inspect --tensors-hash does")
    add("--no-hash", action="store_true",
        help="do not read all of IN for its sha256, which our layout and the README.md of a folder state; the first "
        "conversion of a file is then twice as fast. A sha256 that is known already is stored anyway")
    # fmt: on
    add_output_flags(parser)
    return parser


def add_layout_flag(parser: Parser, source: str) -> None:
    """The flag of commands that write a model. source: what the help calls the model that it is made from."""
    parser.add_argument("--to", choices=LAYOUTS,
        help="layout of OUT: ours, that of the original files, or that of the diffusers library, a folder "
        f"(default: original for a .ckpt; otherwise ours, or original if {source} is ours)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.spelling:
        return run_respelling(args)
    args.source = find(args.source)
    baking = baking_of(args.lora)
    done = converted(
        args,
        args.source,
        args.target,
        "writing",
        weights=args.weights,
        prediction=args.prediction,
        variant=args.variant,
        part=args.only,
        changing=baking,
        keep_all=args.keep_all,
    )
    if not done:
        return MISMATCH
    lines = added_lines(baking, done) if baking else ()
    report(done, args.source, lines, left_out=" (--keep-all keeps them)", quiet=args.quiet)
    print(args.target)
    return WRITTEN


def converted(
    args: argparse.Namespace, source: Path, target: Path, doing: str, **options: object
) -> "Conversion | None":
    """Write a model, by the flags that all such commands have; None if --verify found a difference, which is said.

    doing    what the progress bar says
    options  further ones of `convert.actions.convert.convert`
    """
    with progress_bar(doing, args.quiet) as bar:
        try:
            return convert(
                source,
                target,
                layout=args.to,
                precision=args.precision,
                vae=args.vae and find(args.vae, "vae"),
                verify=args.verify,
                hash_source=not args.no_hash,
                force=args.force,
                on_start=bar.reset,
                on_bytes=bar.update,
                **options,
            )
        except MismatchError as error:
            say(f"{target}: {error}")
            return None


def report(done: "Conversion", source: Path, lines: Iterable[str], *, left_out: str = "", quiet: bool) -> None:
    """Say what was written.

    lines     what else is said of it
    left_out  what is said behind the number of tensors that were not
    """
    for warning in done.checkpoint.said.warnings:
        say(f"{shown(source.name)}: {warning}")
    numbers = f"{done.tensors} tensors, {done.parameters:,} parameters, {done.nbytes / 1e9:.2f} GB"
    for line in (*describe(source, done.checkpoint, f"{numbers}, {done.layout} layout"), *lines):
        say(line, quiet=quiet)
    config = done.checkpoint.config
    if done.layout == "diffusers" and not done.checkpoint.part and config.guidance_scale != USUAL_GUIDANCE:
        scale = f"{config.guidance_scale:g}"
        say(f"a diffusers folder cannot hold the model's guidance scale, {scale}: give it with every prompt.")
    if done.left_out:
        say(f"left out: {counted(done.left_out, 'tensor')} outside the model{left_out}", quiet=quiet)
    if done.verified:
        say(verified(done.verified), quiet=quiet)


def run_respelling(args: argparse.Namespace) -> int:
    """An adapter with the names of another program."""
    from convert.actions.respell import respell

    kept = {"source", "target", "spelling", "force", "quiet", "debug"}
    for name, value in vars(args).items():
        if name in args.parser.parse_args(["x", "y"]) and name not in kept and value != args.parser.get_default(name):
            raise UsageError(f"--spelling rewrites the names of an adapter: leave out --{name.replace('_', '-')}.")
    args.source = find_adapter(str(args.source))
    done = respell(args.source, args.target, args.spelling, force=args.force)
    for problem in done.adapter.problems:
        say(f"{shown(args.source.name)} {problem}")
    for note in done.adapter.notes:
        say(f"{shown(args.source.name)} {note}", quiet=args.quiet)
    kind = summary(done.adapter.changes)
    number = counted(len(done.adapter.changes), "module")
    written = f"{counted(done.tensors, 'tensor')} in the spelling of {args.spelling}"
    say(f"{shown(args.source.name)}: {kind} for {number} of {done.adapter.title}, {written}", quiet=args.quiet)
    print(args.target)
    return WRITTEN


def baking_of(given: list[str]) -> "Baking | None":
    """The adapters that are to be added to the weights."""
    if not given:
        return None
    from convert.actions.bake import Baking

    def weight_change(*values: object, **options: object) -> "Tensor":
        from sd.networks.adapters.weight_change import weight_change  # imports torch

        return weight_change(*values, **options)

    return Baking([strengths_of(text) for text in given], weight_change)


def strengths_of(text: str) -> "Strengths":
    """FILE, FILE:S or FILE:S:T; the file may be a name in the folder for LoRAs. Raises UsageError."""
    from convert.actions.bake import Strengths

    try:
        use = from_flag(text)
    except ValueError as error:
        raise UsageError(f"--lora {error}") from None
    return Strengths(find_adapter(use.name), use.unet, use.text)


def added_lines(baking: "Baking", done: "Conversion") -> Iterator[str]:
    """What each adapter changed, and what of it did not match; problems are said even if quiet."""
    for added in baking.added:
        name = shown(added.strengths.path.name)
        for problem in added.problems:
            say(f"{name} {problem}")
        for note in added.adapter.notes:
            yield f"{name} {note}"
        unet, text = added.strengths.unet, added.strengths.text_encoder
        strength = f"strength {unet:g}" if unet == text else f"strength {unet:g}, {text:g} for the text encoder"
        found = {part: words for part, words in COMPONENTS.items() if part in added.modules}
        modules = joined([f"{added.modules[part]} of the {words}" for part, words in found.items()])
        number = counted(sum(added.modules.values()), "module")
        changed = f"{counted(added.tensors, 'tensor')} changed at {strength}"
        yield f"{name}: {summary(added.adapter.changes)} for {number} ({modules}), {changed}"
    kinds = {"model": "own weights", "ema": "averaged weights (EMA)"}
    other = done.checkpoint.other_weights
    if other and any("unet" in added.modules for added in baking.added):
        which = kinds[done.checkpoint.weights]
        kept = ", which are kept unchanged" if done.checkpoint.extras else ""
        yield f"changed: the UNet's {which}, not its {kinds[other]}{kept}"


def verified(found: "Verified") -> str:
    """What was compared, in one line."""
    exact = [f"{counted(found.same, 'tensor')} bit for bit"] if found.same else []
    cast = [f"{counted(found.rounded, 'tensor')} rounded from the source"] if found.rounded else []
    new = [f"{counted(found.changed, 'tensor')} changed as computed anew"] if found.changed else []
    beside = f"; all tensors {found.everything_sha256}" if found.everything_sha256 else ""
    return f"verified: read back {joined(exact + cast + new)}; weights {found.tensors_sha256}{beside}"
