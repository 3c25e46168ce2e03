"""`sd img2img`: a picture from a picture and text."""

import argparse
from pathlib import Path

from sd.app.cli import like
from sd.app.cli import make_pictures as making
from sd.app.cli.flags import Parser
from sd.app.cli.picture_flags import add_making_flags
from sd.app.errors import UsageError
from sd.app.jobs.run import Beginning, picture_sha256
from sd.pipeline.image.input_settings import RESIZE_NAMES, InputSettings
from sd.pipeline.settings import DEFAULT_STEPS
from sd.sampling.strength import steps_for

STRENGTH = 0.75  # the original's


def parser() -> Parser:
    parser = Parser(
        prog="sd img2img",
        description="Make pictures from a picture and text: the picture is made noisy, and from there on\n"
        "denoised towards the text. Their paths are printed, one a line.",
        epilog="examples:\n"
        '  sd img2img "an oil painting of a harbour" --init photo.jpg -m model.ckpt\n'
        '  sd img2img "a green star on a white background" --init circle.png --strength 0.8',
    )
    add_making_flags(parser, size_default="the picture's, or near it")
    add_input_flags(parser, STRENGTH)
    return parser


def add_input_flags(parser: Parser, strength: float) -> argparse._ArgumentGroup:
    """The flags of every command that begins with a picture."""
    group = parser.add_argument_group("the picture to begin with")
    group.add_argument("-i", "--init", "--init-img", "--init_img", required=True, type=Path, metavar="IMAGE",
                       help="a PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF file with one picture")  # fmt: skip
    group.add_argument("--strength", type=float, default=strength, metavar="X",
                       help="how much of it is changed, 0 to 1: the share of the steps that are run "
                       f"(default: {strength:g})")  # fmt: skip
    group.add_argument("--exact-steps", action="store_true", help="run all of --steps; the schedule gets longer for it")
    group.add_argument("--resize-mode", "--resize_mode", choices=sorted(RESIZE_NAMES), default="crop",
                       help="where --width and --height ask for another shape (default: crop)")  # fmt: skip
    return group


def prepare_steps(args: argparse.Namespace) -> None:
    """With --exact-steps, as many steps in all as it takes for that many to be run."""
    if not args.exact_steps:
        return
    if args.sigmas:
        raise UsageError("--exact-steps does nothing with --sigmas, which say every step. Leave one of them out.")
    wanted = DEFAULT_STEPS if args.steps is None else args.steps
    if not 0 < args.strength <= 1 or not 1 <= wanted <= 1000:
        raise UsageError("--exact-steps needs --strength above 0, up to 1, and --steps of 1 to 1000.")
    args.steps = steps_for(wanted, args.strength)
    if args.steps > 1000:
        raise UsageError(
            f"--exact-steps {wanted} at --strength {args.strength:g} would be a schedule of {args.steps} steps; at "
            "most 1000 can be had. Use fewer steps."
        )


def working_size(args: argparse.Namespace) -> tuple[int, int] | None:
    if (args.width is None) != (args.height is None):
        raise UsageError("--width and --height go together here. Give both, or none for the picture's own size.")
    return None if args.width is None else (args.width, args.height)


def file_facts(path: Path) -> dict[str, str]:
    """What a made picture says of a file that it was made from."""
    return {"name": path.name, "sha256": picture_sha256(path)}


def run(args: argparse.Namespace) -> int:
    from sd.pipeline.image.canvas import image_to_image
    from sd.pipeline.image.reading import read_picture

    args = like.applied(args, parser())
    prepare_steps(args)
    settings, size = InputSettings(resize_mode=args.resize_mode), working_size(args)
    picture, _ = read_picture(args.init)
    labels = {"Resize mode": RESIZE_NAMES[args.resize_mode]} if size else {}
    beginning = Beginning(
        canvas=lambda native: image_to_image(picture, size, native, settings),
        labels=labels,
        exact={"init": file_facts(args.init), "resize_mode": args.resize_mode},
    )
    return making.run(args, parser(), "image to image", beginning)
