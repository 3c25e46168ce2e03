"""`sd inpaint`: repaint a part of a picture, or extend it beyond its edges."""

import argparse
from pathlib import Path

from sd.app.cli import making
from sd.app.cli.flags import add_making_flags
from sd.app.cli.img2img import add_input_flags, prepare_steps
from sd.app.cli.parser import Parser
from sd.app.errors import UsageError
from sd.app.jobs.tasks import USUAL
from sd.pipeline.image.input_settings import MASKED_CONTENTS, Expansion


def parser() -> Parser:
    parser = Parser(
        prog="sd inpaint",
        description="Repaint the white part of a mask, or extend the picture beyond its edges. Where the mask\n"
        "is black, no bit changes. Works with inpainting checkpoints (9 channels) and with ordinary\n"
        "ones. Prints the paths of the new pictures, one a line.",
        epilog="examples:\n"
        '  sd inpaint "a blue star on a white background" --init picture.png --mask mask.png\n'
        '  sd inpaint "a beach" --init photo.jpg --expand left=128,right=128 -m model.ckpt',
    )
    add_input_flags(parser, USUAL["inpaint"]["strength"])
    add = parser.group("what is repainted")
    add("--mask", type=Path, metavar="IMAGE",
        help="white is repainted, black is kept, grey is mixed; same size as the picture, or at least the same "
        "shape")  # fmt: skip
    add("--invert-mask", "--invert_mask", action="store_true", help="repaint the black part instead")
    add("--mask-threshold", "--mask_threshold", type=int, default=0, metavar="N",
        help="make the mask black and white: white from this level on, 1 to 255 (default: 0, keep greys)")  # fmt: skip
    add("--mask-blur", "--mask_blur", type=float, default=4.0, metavar="PIXELS",
        help="soften the mask's edge (default: 4)")  # fmt: skip
    add("--only-masked", "--only_masked", action="store_true",
        help="work only on the area around the mask, enlarged to the full size")  # fmt: skip
    add("--mask-padding", "--mask_padding", type=int, default=32, metavar="PIXELS",
        help="how much around the mask --only-masked includes (default: 32)")  # fmt: skip
    add("--masked-content", "--masked_content", choices=MASKED_CONTENTS, default="original",
        help="what the masked part begins with at a --strength below 1: its original content, or fill, the colours "
        "around it (default: original)")  # fmt: skip
    add("--expand", metavar="SIDES",
        help="instead of a mask: new area around the picture, left=128,right=64,top=0,bottom=0")  # fmt: skip
    add("--overlap", type=int, default=32, metavar="PIXELS",
        help="how far the new area fades into the old picture (default: 32)")  # fmt: skip
    size = "size to work at, a multiple of 8; the result keeps the picture's"
    add_making_flags(parser, size_default="the picture's, or near it", size=size)
    return parser


def run(args: argparse.Namespace) -> int:
    if (args.mask is None) == (args.expand is None):
        raise UsageError(
            "give either --mask IMAGE, whose white part is repainted, or --expand left=128 and the like."
            + (hint_of_hole(args.init, args.max_megapixels) if args.mask is None else "")
        )
    prepare_steps(args)
    if args.expand is not None:
        args.expand = Expansion.parse(args.expand)
    return making.run(args, "inpainting")


def hint_of_hole(init: Path, megapixels: float) -> str:
    """What to do if the picture to begin with has a transparent part; nothing if it has none."""
    from sd.pipeline.image.masks import has_hole
    from sd.pipeline.image.reading import read_rgba

    if not has_hole(read_rgba(init, megapixels=megapixels)):
        return ""
    return f" {init} has a transparent part: --mask {init} repaints that."
