"""`sd convert`: a checkpoint from one layout to another."""

import argparse
from pathlib import Path

from convert.convert import LAYOUTS, PRECISIONS, convert
from sd.cli.flags import Parser, add_output_flags, bar_hidden, say


def parser() -> Parser:
    parser = Parser(
        prog="sd convert",
        description="Write the model of a checkpoint in another layout. Values are copied bit for bit unless a\n"
        "precision is asked for. Nothing in the file is executed.",
        epilog="example:\n  sd convert v1-5-pruned-emaonly.ckpt v1-5.safetensors --precision fp16",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="an original .ckpt or .safetensors, or one of ours")
    parser.add_argument("target", type=Path, metavar="OUT", help=".safetensors, or .ckpt for the original layout")
    parser.add_argument("--to", choices=LAYOUTS, help="layout of OUT (default: the other one than that of IN)")
    parser.add_argument(
        "--precision", choices=["keep", *PRECISIONS], default="keep", help="of all tensors (default: keep)"
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

    with tqdm(unit="B", unit_scale=True, disable=bar_hidden(args.quiet), leave=False) as bar:
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
    checkpoint = done.checkpoint
    say(
        f"{checkpoint.config.family}, {checkpoint.weights} weights, {done.tensors} tensors, "
        f"{done.parameters:,} parameters, {done.nbytes / 1e9:.2f} GB, {done.layout} layout.",
        quiet=args.quiet,
    )
    if checkpoint.has_ema:
        other = "model" if checkpoint.weights == "ema" else "ema"
        say(f"left aside: the {other} weights, which --weights {other} takes instead.", quiet=args.quiet)
    if checkpoint.unknown:
        names = ", ".join(checkpoint.unknown[:3])
        say(f"left aside: {len(checkpoint.unknown)} tensors that are no part of the model: {names}.", quiet=args.quiet)
    print(args.target)
    return 0
