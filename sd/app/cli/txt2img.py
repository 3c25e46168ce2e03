"""`sd txt2img`: a picture from text."""

import argparse

from sd.app.cli import making
from sd.app.cli.flags import add_making_flags, add_second_pass_flags
from sd.app.cli.parser import Parser


def parser() -> Parser:
    parser = Parser(
        prog="sd txt2img",
        description="Make pictures from text. Prints their paths, one a line.",
        epilog="examples:\n"
        '  sd txt2img "an astronaut riding a horse" -m v1-5-pruned-emaonly.ckpt -s 42\n'
        '  sd txt2img "a lighthouse" -n "people" -m model.ckpt --count 4 -b 2 -o "dusk-{seed}.png"',
    )
    add_making_flags(parser, size_default="the model's native size")
    add_second_pass_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    return making.run(args, "text to picture")
