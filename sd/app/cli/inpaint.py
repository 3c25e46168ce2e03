"""`sd inpaint`: repaint a part of a picture, or paint on beyond its edges."""

import argparse
from pathlib import Path

from sd.app.cli import like
from sd.app.cli import make_pictures as making
from sd.app.cli.flags import Parser
from sd.app.cli.img2img import add_input_flags, file_facts, prepare_steps, working_size
from sd.app.cli.picture_flags import add_making_flags
from sd.app.errors import UsageError
from sd.app.jobs.run import Beginning
from sd.pipeline.image.input_settings import RESIZE_NAMES, Expansion, InputSettings


def parser() -> Parser:
    parser = Parser(
        prog="sd inpaint",
        description="Repaint the white part of a mask, or paint on beyond the picture's edges. What is black\n"
        "in the mask stays as it is, to the bit. Inpainting checkpoints (9 channels) see what is\n"
        "kept; ordinary ones are led back to it at every step. The pictures' paths are printed,\n"
        "one a line.",
        epilog="examples:\n"
        '  sd inpaint "a blue star on a white background" --init picture.png --mask mask.png\n'
        '  sd inpaint "a beach" --init photo.jpg --expand left=128,right=128 -m model.ckpt',
    )
    add_making_flags(parser, size_default="the picture's, or near it")
    add_input_flags(parser, 1.0)
    group = parser.add_argument_group("what is repainted")
    group.add_argument("--mask", type=Path, metavar="IMAGE", help="white is repainted, black is kept, grey is mixed; "
                       "as large as the picture, or of its shape")  # fmt: skip
    group.add_argument("--invert-mask", "--invert_mask", action="store_true", help="repaint the black part instead")
    group.add_argument("--mask-threshold", "--mask_threshold", type=int, default=0, metavar="N",
                       help="make the mask black and white: white from this level on, 1 to 255 (default: 0, "
                       "greys stay)")  # fmt: skip
    group.add_argument("--mask-blur", "--mask_blur", type=float, default=4.0, metavar="PIXELS",
                       help="soften the mask's edge (default: 4)")  # fmt: skip
    group.add_argument("--only-masked", "--only_masked", action="store_true",
                       help="work on the surroundings of the mask alone, enlarged to the whole size")  # fmt: skip
    group.add_argument("--mask-padding", "--mask_padding", type=int, default=32, metavar="PIXELS",
                       help="how much of the surroundings --only-masked takes in (default: 32)")  # fmt: skip
    group.add_argument("--expand", metavar="SIDES", help="instead of a mask, new area around the picture: "
                       "left=128,right=64,top=0,bottom=0")  # fmt: skip
    group.add_argument("--overlap", type=int, default=32, metavar="PIXELS",
                       help="over how much of the old picture new area fades out (default: 32)")  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> int:
    from sd.pipeline.image.canvas import inpainting
    from sd.pipeline.image.masks import read_mask
    from sd.pipeline.image.reading import read_picture

    args = like.applied(args, parser())
    if (args.mask is None) == (args.expand is None):
        raise UsageError("give either --mask IMAGE, whose white part is repainted, or --expand left=128 and the like.")
    prepare_steps(args)
    size = working_size(args)
    settings = InputSettings(
        resize_mode=args.resize_mode,
        invert_mask=args.invert_mask,
        mask_threshold=args.mask_threshold,
        mask_blur=args.mask_blur,
        only_masked=args.only_masked,
        mask_padding=args.mask_padding,
        expand=None if args.expand is None else Expansion.parse(args.expand),
        overlap=args.overlap,
    )
    picture, _ = read_picture(args.init)
    mask = None if args.mask is None else read_mask(args.mask)
    beginning = Beginning(
        canvas=lambda native: inpainting(picture, mask, size, native, settings),
        labels=labels(settings, resized=size is not None),
        exact=exact(args, settings),
    )
    return making.run(args, parser(), "inpainting", beginning)


def labels(settings: InputSettings, *, resized: bool) -> dict[str, object]:
    """What a made picture says of its mask, by the names that other tools have for it."""
    found: dict[str, object] = {"Resize mode": RESIZE_NAMES[settings.resize_mode]} if resized else {}
    if settings.expand is not None:
        return found | {"Outpaint": str(settings.expand), "Outpaint overlap": settings.overlap}
    found["Mask blur"] = f"{settings.mask_blur:g}"
    if settings.invert_mask:
        found["Mask mode"] = "Inpaint not masked"
    if settings.mask_threshold:
        found["Mask threshold"] = settings.mask_threshold
    if settings.only_masked:
        found |= {"Inpaint area": "Only masked", "Masked area padding": settings.mask_padding}
    return found


def exact(args: argparse.Namespace, settings: InputSettings) -> dict:
    names = ["resize_mode", "only_masked", "mask_padding"]
    names += ["overlap"] if settings.expand else ["invert_mask", "mask_threshold", "mask_blur"]
    found = {"init": file_facts(args.init), **{name: getattr(settings, name) for name in names}}
    if settings.expand:
        return found | {"expand": str(settings.expand)}
    return found | {"mask": file_facts(args.mask)}
