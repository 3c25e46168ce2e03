"""`sd depth2img`: a picture from text and the depth of another picture."""

import argparse
from pathlib import Path

from sd.app.cli import making
from sd.app.cli.flags import OF_LIKE, add_making_flags
from sd.app.cli.img2img import add_input_flags, prepare_steps
from sd.app.cli.parser import Parser
from sd.app.errors import UsageError
from sd.app.jobs.tasks import USUAL

STRENGTH = USUAL["depth2img"]["strength"]


def parser() -> Parser:
    parser = Parser(
        prog="sd depth2img",
        description="Make pictures from text that keep the depth of a picture: how near each of its points is.\n"
        "Needs a depth checkpoint (5 channels), which estimates the depth, or reads a map of your own.\n"
        "Prints the paths of the new pictures, one a line.",
        epilog="examples:\n"
        '  sd depth2img "a marble statue of two tigers" --init tigers.jpg -m 512-depth-ema.ckpt\n'
        '  sd depth2img "a cave" --init room.png --depth map.png --strength 1 -m 512-depth-ema.ckpt',
    )
    add_input_flags(parser, STRENGTH)
    add = parser.group("its depth")
    add("--depth", type=Path, metavar="IMAGE",
        help="a map of the same shape, near is bright (default: the model estimates the depth)")  # fmt: skip
    add("--invert-depth", "--invert_depth", action="store_true", help="in the depth map, near is dark")
    add_making_flags(parser, model=OF_LIKE, size_default="the picture's, or near it")
    return parser


def check_depth_flags(depth: Path | None, invert_depth: bool) -> None:
    if invert_depth and depth is None:
        raise UsageError("--invert-depth is for a depth map of your own. Give one with --depth IMAGE, or leave it out.")


def run(args: argparse.Namespace) -> int:
    check_depth_flags(args.depth, args.invert_depth)
    prepare_steps(args)
    return making.run(args, "depth to image")
