"""`sd depth`: how near each point of a picture is, as a depth map and as a picture to look at."""

import argparse
import json
from pathlib import Path

from sd.app.cli.flags import add_model_flags, add_output_flags
from sd.app.cli.img2img import add_size_limit
from sd.app.cli.make_pictures import model_of
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import Terminal
from sd.app.errors import JobError, UsageError, failures_as
from sd.app.jobs.outputs import file_in


def parser() -> Parser:
    parser = Parser(
        prog="sd depth",
        description="Estimate how near each point of a picture is, with the depth network of a checkpoint. Writes the\n"
        "depth map, a grey PNG of 16 bits in which near is bright, and the same in colours; prints\n"
        "both paths. sd depth2img --depth takes the map.",
        epilog="examples:\n  sd depth photo.jpg -m 512-depth-ema.ckpt\n"
        "  sd depth photo.jpg -m 512-depth-ema.ckpt -o maps/photo.png",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF file")
    add_model_flags(parser, "none: it must have a depth network", decodes=False)
    add_size_limit(parser.group("picture"))
    add = add_output_flags(parser)
    add("-o", "--out", default="outputs/", metavar="OUT",
        help="a .png file for the depth map, or a folder (default: outputs/)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead")
    return parser


def run(args: argparse.Namespace) -> int:
    from sd.app.jobs.inputs import allow, file_facts
    from sd.app.jobs.model import opened
    from sd.pipeline.image.reading import read_picture

    request = model_of(args)
    allow(args.max_megapixels)
    picture, _ = read_picture(args.image, megapixels=args.max_megapixels)
    path = file_in(args.out, f"{args.image.stem}-depth.png", [".png"], force=args.force)
    coloured = file_in(str(path.with_name(f"{path.stem}-colours.png")), "", [".png"], force=args.force)
    with opened(request, task=None) as (checkpoint, prepare):
        if checkpoint.config.depth is None:
            raise UsageError(
                f"{request.file.name} has no depth network. Give -m a checkpoint that has one; sd models lists "
                "512-depth-ema.safetensors."
            )
        model = prepare()(Terminal(quiet=args.quiet))
    from sd.pipeline.image.depth_maps import colour_picture, grey_picture
    from sd.pipeline.image.tensors import save_png, to_tensor

    with failures_as(JobError):
        depth = model.estimate_depth(to_tensor(picture))
    texts = {"sd": json.dumps({"depth_of": file_facts(args.image), "model": model.source.facts()}, ensure_ascii=False)}
    save_png(grey_picture(depth, picture.size), path, texts, force=args.force)
    save_png(colour_picture(depth, picture.size), coloured, texts, force=args.force)
    if args.json:
        print(json.dumps({"event": "depth", "path": str(path), "colours": str(coloured), **json.loads(texts["sd"])}))
        return 0
    print(path)
    print(coloured)
    return 0
