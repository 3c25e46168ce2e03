"""`sd convert`: a checkpoint from one layout to another."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from convert.actions.convert import convert
from convert.actions.target import LAYOUTS, MismatchError
from convert.actions.writing import PRECISIONS
from convert.errors import counted
from convert.families.family import PARTS
from sd.app.cli.flags import Parser, add_output_flags, bar_hidden, describe_checkpoint, say
from sd.app.errors import complain

if TYPE_CHECKING:
    from convert.actions.verify import Verified

WRITTEN, MISMATCH = 0, 1


def parser() -> Parser:
    parser = Parser(
        prog="sd convert",
        description="Write the model of a checkpoint in another layout. Values are copied bit for\n"
        "bit unless a precision is asked for. Nothing in the file is executed. Only the\n"
        "weights are copied, unless --keep-all is given: schedule tables, counters and\n"
        "position ids follow from the model.",
        epilog="examples:\n"
        "  sd convert v1-5-pruned-emaonly.ckpt v1-5.safetensors --precision fp16\n"
        "  sd convert model.ckpt folder --to diffusers --verify\n"
        "  sd convert model.ckpt baked.ckpt --vae vae-ft-mse-840000-ema-pruned.ckpt\n"
        "  sd convert model.ckpt vae.safetensors --only vae --to original\n\n"
        "exit codes: 0 written; 1 --verify found it to be something else, and removed it;\n"
        "2 the source cannot be read, or the target not be written",
    )
    parser.add_argument(
        "source", type=Path, metavar="IN", help="an original .ckpt or .safetensors, one of ours, or a diffusers folder"
    )
    parser.add_argument(
        "target",
        type=Path,
        metavar="OUT",
        help=".safetensors; or .ckpt, a pickle in the original layout; or, with --to diffusers, a folder",
    )
    parser.add_argument(
        "--to",
        choices=LAYOUTS,
        help="layout of OUT: ours, that of the original files, or that of the diffusers library, a folder "
        "(default: original for a .ckpt, else the one that IN has not)",
    )
    parser.add_argument(
        "--precision", choices=["keep", *PRECISIONS], default="keep", help="change all tensors to it (default: keep)"
    )
    parser.add_argument(
        "--weights",
        choices=["auto", "model", "ema"],
        default="auto",
        help="which UNet weights, where there are both: the model's own, or their average over the training (default: "
        "auto, the model's own unless there are only averaged ones)",
    )
    parser.add_argument("--only", choices=PARTS, help="write this network alone; IN may hold no more than it")
    parser.add_argument(
        "--vae",
        type=Path,
        metavar="FILE",
        help="put the VAE of FILE, of any layout, in the place of the model's own; also where it has none",
    )
    parser.add_argument(
        "--keep-all",
        action="store_true",
        help="keep what lies beside the model, too: the other kind of UNet weights, schedule tables, counters, "
        "leftovers of the training (tensors only: no optimiser). In our layout it is kept under extra.*, and it comes "
        "back in the original layout",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all of OUT back and compare it with IN, number by number; then print the hash of its tensors, the "
        "same in every layout: that of sd inspect --tensors-hash",
    )
    parser.add_argument(
        "--no-hash",
        action="store_true",
        help="do not read all of IN for its sha256, which our layout notes; the first conversion of a file is then "
        "twice as fast. A sha256 that is known is noted all the same",
    )
    add_output_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    with tqdm(desc="writing", unit="B", unit_scale=True, disable=bar_hidden(args.quiet), leave=False) as bar:
        try:
            done = convert(
                args.source,
                args.target,
                layout=args.to,
                precision=args.precision,
                weights=args.weights,
                part=args.only,
                vae=args.vae,
                keep_all=args.keep_all,
                verify=args.verify,
                hash_source=not args.no_hash,
                force=args.force,
                on_start=bar.reset,
                on_bytes=bar.update,
            )
        except MismatchError as error:
            complain(f"{args.target}: {error}")
            return MISMATCH
    written = (
        f"{done.tensors} tensors, {done.parameters:,} parameters, {done.nbytes / 1e9:.2f} GB, {done.layout} layout"
    )
    describe_checkpoint(args.source, done.checkpoint, written, quiet=args.quiet)
    if done.left_out:
        say(f"left out: {counted(done.left_out, 'tensor')} beside the model (--keep-all keeps them)", quiet=args.quiet)
    if done.verified:
        say(verified(done.verified), quiet=args.quiet)
    print(args.target)
    return WRITTEN


def verified(found: "Verified") -> str:
    """What was compared, in one line."""
    exact = [f"{counted(found.same, 'tensor')} bit for bit"] if found.same else []
    cast = [f"{counted(found.rounded, 'tensor')} rounded from the source"] if found.rounded else []
    beside = f"; all tensors {found.everything_sha256}" if found.everything_sha256 else ""
    return f"verified: read back {' and '.join(exact + cast)}; weights {found.tensors_sha256}{beside}"
