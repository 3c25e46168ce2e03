"""`sd img2img`: a picture from a picture and text."""

import argparse
from pathlib import Path

from sd.app.cli import making
from sd.app.cli.flags import add_making_flags
from sd.app.cli.parser import Add, Parser
from sd.app.errors import UsageError
from sd.app.jobs.tasks import USUAL
from sd.pipeline.image.input_settings import MEGAPIXELS, RESIZE_NAMES
from sd.pipeline.second_pass import steps_for
from sd.pipeline.settings import DEFAULT_STEPS

STRENGTH = USUAL["img2img"]["strength"]


def parser() -> Parser:
    parser = Parser(
        prog="sd img2img",
        description="Make pictures from a picture and text: noise is added to the picture, which is then\n"
        "denoised towards the text. Prints the paths of the new pictures, one a line.",
        epilog="examples:\n"
        '  sd img2img "an oil painting of a harbour" --init photo.jpg -m model.ckpt\n'
        '  sd img2img "a green star on a white background" --init circle.png --strength 0.8',
    )
    add_input_flags(parser, STRENGTH)
    add_making_flags(parser, size_default="the picture's, or near it")
    return parser


def add_input_flags(parser: Parser, strength: float) -> None:
    """The flags of every command that begins with a noisy picture."""
    add = parser.group("the picture to begin with")
    add_init_flags(add)
    add("--strength", type=float, default=strength, metavar="X",
        help=f"how much of it changes, 0 to 1: the share of the steps to run (default: {strength:g})")  # fmt: skip
    add("--exact-steps", action="store_true", help="run all of --steps, with a longer schedule")


def add_init_flags(add: Add, *, required: bool = True) -> None:
    """The picture, and how it is read and brought to size."""
    add("-i", "--init", "--init-img", "--init_img", required=required, type=Path, metavar="IMAGE",
        help="a PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF file with one picture")  # fmt: skip
    add("--resize-mode", "--resize_mode", choices=sorted(RESIZE_NAMES), default="crop",
        help="if --width and --height have another shape (default: crop)")  # fmt: skip
    add_size_limit(add)


def add_size_limit(add: Add) -> None:
    """The flag of every command that reads pictures."""
    add("--max-megapixels", "--max_megapixels", type=float, default=MEGAPIXELS, metavar="N",
        help=f"the largest picture to read, in millions of pixels (default: {MEGAPIXELS})")  # fmt: skip


def prepare_steps(args: argparse.Namespace) -> None:
    """With --exact-steps, raise --steps until as many steps are run as were asked for."""
    if not args.exact_steps:
        return
    if args.sigmas:
        raise UsageError("--exact-steps does nothing with --sigmas, which give every step. Leave one of them out.")
    wanted = DEFAULT_STEPS if args.steps is None else args.steps
    if not 0 < args.strength <= 1 or not 1 <= wanted <= 1000:
        raise UsageError("--exact-steps needs --strength above 0, up to 1, and --steps of 1 to 1000.")
    args.steps = steps_for(wanted, args.strength)
    if args.steps > 1000:
        raise UsageError(
            f"--exact-steps {wanted} at --strength {args.strength:g} needs a schedule of {args.steps} steps; "
            "1000 is the limit. Use fewer steps."
        )


def run(args: argparse.Namespace) -> int:
    prepare_steps(args)
    return making.run(args, "image to image")
