"""`sd arch`: what a model consists of, as a table or a page to explore."""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli.flags import add_output_flags
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import Terminal
from sd.app.errors import UsageError, failures_as
from sd.app.jobs.course import course_beside
from sd.app.jobs.outputs import require_free
from sd.app.jobs.request import ModelRequest
from sd.config import SD_V1
from sd.pipeline.settings import SettingError, Settings

if TYPE_CHECKING:
    from sd.config import ModelConfig
    from sd.study.architecture.description import Architecture


def parser() -> Parser:
    parser = Parser(
        prog="sd arch",
        description="Show what the networks of a model consist of: blocks, shapes, skip connections,\n"
        "parameters, operations, and where original files keep each weight. No weights\n"
        "are read, and nothing is computed unless --measure is given.",
        epilog="examples:\n  sd arch\n  sd arch -m v1-5-pruned-emaonly.ckpt --size 768x512 --html architecture.html",
    )
    add = parser.add_argument
    add("-m", "--model", "--ckpt", type=Path, metavar="FILE",
        help="a checkpoint whose model to show (default: Stable Diffusion v1)")  # fmt: skip
    add("--size", metavar="WxH", help="of the picture in pixels, multiples of 8 (default: the model's native size)")
    add("--measure", action="store_true",
        help="also time each module; builds the networks with random weights and runs each three times")  # fmt: skip
    add("--device", default="auto", help="for --measure: auto, cuda, mps or cpu (default: auto)")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto",
        help="for --measure (default: auto, as for pictures)")  # fmt: skip
    add = add_output_flags(parser)
    add("--html", type=Path, metavar="FILE",
        help="write a page to explore, one file that works offline; prints its path, not the table")  # fmt: skip
    add("--source-url", metavar="PREFIX", help="link source lines in the page: PREFIX/sd/networks/unet.py#L58")
    add("--json", action="store_true", help="print everything as one JSON object instead of the table")
    return parser


def as_data(architecture: "Architecture") -> dict[str, object]:
    return asdict(architecture) | {"config": architecture.config.to_dict()}


def run(args: argparse.Namespace) -> int:
    if args.source_url is not None and args.html is None:
        raise UsageError("--source-url needs a page. Give --html FILE as well.")
    if not args.measure and (args.device, args.precision) != ("auto", "auto"):
        raise UsageError("--device and --precision need measured times. Give --measure as well.")
    size = parse_size(args.size) if args.size is not None else None
    require_free(args.html, flag="--html", force=args.force)
    config = config_of(args.model)
    architecture = look_at(config, *(size or (config.native_size, config.native_size)), args)
    written = {"page": str(args.html)} if args.html is not None else {}
    if written:
        from sd.files import written_whole
        from sd.study.architecture.page import page

        with written_whole(args.html, force=args.force) as file:
            file.write(page(architecture, source_url=args.source_url, course=course_beside(args.html)).encode())
    if args.json:
        print(json.dumps({"event": "architecture", **written, **as_data(architecture)}))
    elif written:
        print(args.html)
    else:
        from sd.study.architecture.table import table

        print(table(architecture))
    return 0


def parse_size(text: str, flag: str = "--size") -> tuple[int, int]:
    """Width and height from 768x512. Raises UsageError for a size that is not allowed."""
    match = re.fullmatch(r"([0-9]{1,9})[xX×]([0-9]{1,9})", text)
    if not match:
        raise UsageError(f"{flag} {text} is not a size. Give width and height in pixels, such as 768x512.")
    width, height = int(match[1]), int(match[2])
    try:
        Settings(prompt="", width=width, height=height, seed=0)
    except SettingError as error:
        raise UsageError(f"{flag} {text}: {error}") from None
    return width, height


def config_of(model: Path | None) -> "ModelConfig":
    """The config of the model in a file, whose weights are not read; without a file, that of Stable Diffusion v1."""
    if model is None:
        return SD_V1
    from convert.checkpoint import match_shapes, read_checkpoint
    from convert.files.reader import open_checkpoint
    from convert.layouts.names import parameter_shapes
    from sd.app.jobs.model_folder import find

    with open_checkpoint(find(model)) as file:
        checkpoint = read_checkpoint(file)
        match_shapes(checkpoint, parameter_shapes(checkpoint.config))
    return checkpoint.config


def look_at(config: "ModelConfig", width: int, height: int, args: argparse.Namespace) -> "Architecture":
    from convert.layouts.joined import keys_in_files
    from sd.study.architecture.description import describe

    times, on = None, ""
    if args.measure:
        from sd.app.jobs.model import pick_device_and_precision
        from sd.pipeline.runner import precision_name
        from sd.study.architecture.timing import ROUNDS, measure

        request = ModelRequest(file=Path(), device=args.device, precision=args.precision)
        device, dtype = pick_device_and_precision(request, config)
        stage = Terminal(quiet=args.quiet).stage("measuring", 3 * ROUNDS, "round")
        with stage as advance, failures_as(UsageError, "--measure: "):
            times = measure(config, width=width, height=height, device=device, dtype=dtype, on_round=advance)
        on = f"{device.type}, {precision_name(dtype)}"
    return describe(config, keys_in_files(config), width=width, height=height, milliseconds=times, measured_on=on)
