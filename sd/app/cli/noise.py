"""`sd noise`: what noise does to a picture, and what the VAE preserves."""

import argparse
import json
import math
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli import say
from sd.app.cli.flags import add_model_flags, add_output_flags
from sd.app.cli.img2img import add_size_limit
from sd.app.cli.make_pictures import model_of
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import Terminal
from sd.app.errors import JobError, failures_as
from sd.app.jobs.outputs import file_in
from sd.pipeline.settings import Settings

if TYPE_CHECKING:
    from sd.study.forward_process import NoiseLevel, RoundTrip

TIMESTEPS = "0,100,250,500,750,999"


def parser() -> Parser:
    parser = Parser(
        prog="sd noise",
        description="Show what training does to a picture: the VAE encodes it, and noise is added to the\n"
        "latents until only noise is left. Writes one sheet as a PNG; prints the numbers, then\n"
        "its path.",
        epilog="examples:\n  sd noise photo.jpg -m model.ckpt\n"
        "  sd noise photo.jpg -o sheets/ --timesteps 0,200,400,600,800,999",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF file")
    add_model_flags(parser)
    add = parser.group("picture")
    add("-W", "--width", "--W", type=int, metavar="PIXELS",
        help="multiple of 8 (default: the picture's, or near it)")  # fmt: skip
    add("-H", "--height", "--H", type=int, metavar="PIXELS", help="the same, together with --width")
    add_size_limit(add)
    add("-s", "--seed", type=int, default=0, help="of the noise; -1 draws one (default: 0)")
    add("--timesteps", type=timesteps, default=timesteps(TIMESTEPS), metavar="T,T,...",
        help=f"which timesteps to show, 0 to 999, at most 12 (default: {TIMESTEPS})")  # fmt: skip
    add = add_output_flags(parser)
    add("-o", "--out", default="outputs/", metavar="OUT", help="a .png file or a folder (default: outputs/)")
    add("--json", action="store_true", help="print one JSON object instead")
    return parser


def timesteps(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as {TIMESTEPS}") from None
    if len(found) > 12 or any(not 0 <= timestep <= 999 for timestep in found):
        raise argparse.ArgumentTypeError(f"{text} is out of range: at most 12 timesteps of 0 to 999")
    return found


def run(args: argparse.Namespace) -> int:
    from sd.app.jobs.inputs import allow, file_facts, working_size
    from sd.app.jobs.model import opened
    from sd.pipeline.image.canvas import image_to_image
    from sd.pipeline.image.input_settings import InputSettings
    from sd.pipeline.image.reading import read_picture

    request = model_of(args)
    if args.seed == -1:
        args.seed = secrets.randbits(32)
        say(f"seed {args.seed}", quiet=args.quiet)
    size = working_size({"width": args.width, "height": args.height})
    width, height = size or (512, 512)
    Settings(prompt="", width=width, height=height, seed=args.seed)  # raises SettingError for a wrong size or seed
    allow(args.max_megapixels)
    picture, _ = read_picture(args.image, megapixels=args.max_megapixels)
    path = file_in(args.out, f"{args.image.stem}-noise.png", [".png"], force=args.force)
    with opened(request, task=None) as (checkpoint, prepare):
        canvas = image_to_image(picture, size, checkpoint.config.native_size, InputSettings())
        model = prepare()(Terminal(quiet=args.quiet))
    from sd.pipeline.image.tensors import save_png
    from sd.study.forward_process import forward_process, round_trip
    from sd.study.noise_sheet import arithmetic, sheet

    with failures_as(JobError):
        trip = round_trip(model, canvas.working_picture)
        levels = forward_process(model, trip.latents, args.timesteps, seed=args.seed)
    save_png(sheet(levels, trip), path, {}, force=args.force)
    if args.json:
        facts = {"init": file_facts(args.image), **as_data(levels, trip)}
        print(json.dumps({"event": "noise", "path": str(path), "seed": args.seed, **facts}))
        return 0
    for line in (*table(levels), arithmetic(trip), f"PSNR of the reconstruction: {trip.psnr:.2f} dB"):
        print(line)
    print(path)
    return 0


def as_data(levels: "list[NoiseLevel]", trip: "RoundTrip") -> dict:
    """The numbers, for JSON; infinity becomes null."""
    ratios = [None if level.signal_to_noise == math.inf else level.signal_to_noise for level in levels]
    return {
        "levels": [
            {"timestep": level.timestep, "alpha_bar": level.alpha_bar, "signal_to_noise": ratio}
            for level, ratio in zip(levels, ratios, strict=True)
        ],
        "psnr": None if trip.psnr == math.inf else trip.psnr,
        "size": list(trip.picture.size),
        "latents": list(trip.latents.shape[1:]),
        "numbers": list(trip.numbers),
        "positions": list(trip.positions),
    }


def table(levels: "list[NoiseLevel]") -> list[str]:
    rows = [f"{'timestep':>8} {'alpha_bar':>10} {'signal to noise':>16}"]
    for level in levels:
        name = "x_0" if level.timestep is None else str(level.timestep)
        rows.append(f"{name:>8} {level.alpha_bar:>10.6f} {level.signal_to_noise:>16.6g}")
    return rows
