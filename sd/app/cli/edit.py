"""`sd edit`: a picture changed by an instruction."""

import argparse

from sd.app.cli import making
from sd.app.cli.flags import OF_LIKE, add_making_flags
from sd.app.cli.img2img import add_init_flags
from sd.app.cli.parser import Parser
from sd.pipeline.settings import IMAGE_GUIDANCE


def parser() -> Parser:
    parser = Parser(
        prog="sd edit",
        description="Change a picture by an instruction, with a model trained for it: InstructPix2Pix and others\n"
        "whose UNet takes 8 channels. Prints the paths of the new pictures, one a line.",
        epilog="examples:\n"
        '  sd edit "make it snow" --init photo.jpg -m instruct-pix2pix.ckpt\n'
        '  sd edit "turn him into a cyborg" --init photo.jpg -m instruct-pix2pix.ckpt --image-guidance 1.2\n\n'
        "If too little changes, lower --image-guidance or raise --guidance-scale; if too much, the other way round.",
    )
    add = parser.group("the picture to edit")
    add_init_flags(add)
    add("--image-guidance", "--cfg-image", "--image-cfg-scale", type=float, metavar="X",
        help="how much to keep to the picture, against the prediction without it; 1 turns this off and saves a third "
        f"of the work (default: {IMAGE_GUIDANCE:g})")  # fmt: skip
    add_making_flags(
        parser,
        ("INSTRUCTION", 'what to change, such as "make it snow"'),
        model=OF_LIKE,
        guidance="how much to follow the instruction",
        size_default="the picture's, or near it",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    if args.image_guidance is None:  # also if the picture of --like was not edited
        args.image_guidance = IMAGE_GUIDANCE
    return making.run(args, "editing")
