"""`sd convert`: a checkpoint from one layout to another."""

import argparse
from pathlib import Path

from convert.convert import convert
from convert.target import LAYOUTS
from convert.writing import PRECISIONS
from sd.cli.flags import Parser, add_output_flags, bar_hidden, describe_checkpoint


def parser() -> Parser:
    parser = Parser(
        prog="sd convert",
        description="Write the model of a checkpoint in another layout. Values are copied bit for\n"
        "bit unless a precision is asked for. Nothing in the file is executed. Only the\n"
        "weights are copied: schedule tables, counters and position ids follow from the\n"
        "model.",
        epilog="example:\n  sd convert v1-5-pruned-emaonly.ckpt v1-5.safetensors --precision fp16",
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
    add_output_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    with tqdm(desc="writing", unit="B", unit_scale=True, disable=bar_hidden(args.quiet), leave=False) as bar:
        done = convert(
            args.source,
            args.target,
            layout=args.to,
            precision=args.precision,
            weights=args.weights,
            force=args.force,
            on_start=bar.reset,
            on_bytes=bar.update,
        )
    written = (
        f"{done.tensors} tensors, {done.parameters:,} parameters, {done.nbytes / 1e9:.2f} GB, {done.layout} layout"
    )
    describe_checkpoint(args.source, done.checkpoint, written, quiet=args.quiet)
    print(args.target)
    return 0
