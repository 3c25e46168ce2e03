"""`sd export`: the networks of a model for another runtime."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli import say
from sd.app.cli.flags import PACKAGED, add_output_flags, add_reading_flags, whole_number
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import aligned, progress_bar
from sd.app.jobs.extras import require
from sd.app.jobs.model import describe
from sd.app.jobs.model_folder import find
from sd.files import embedded_model

if TYPE_CHECKING:
    from sd.runtime.onnx.export import Written

WRITTEN, DIFFERS = 0, 1


def parser() -> Parser:
    parser = Parser(
        prog="sd export",
        usual=("--precision", "--clip-skip"),
        description="Write the networks of a model as ONNX files, with the tokenizer and the settings that a program\n"
        "needs to use them. Batch, picture size and prompt length stay free. Each file is run by\n"
        "onnxruntime and compared with its network before the folder gets its name.",
        epilog="examples:\n"
        "  sd export --onnx shapes-onnx                (the small model of the package)\n"
        "  sd export --onnx v1-5-onnx -m v1-5-pruned-emaonly.ckpt --precision fp16\n\n"
        "exit codes: 0 written; 1 a file does not compute what its network does, and nothing was written;\n"
        "2 the model cannot be read or exported, or the folder cannot be written",
    )
    # fmt: off
    add = parser.add_argument
    add("--onnx", type=Path, required=True, metavar="DIR", help="the folder to write; it must not exist yet")
    add("-m", "--model", "--ckpt", type=Path, metavar="FILE",
        help="checkpoint: an original .ckpt or .safetensors, a diffusers folder, or a file that sd convert wrote; or "
        f"the name of one in your models folder (default: {PACKAGED})")
    add("--precision", choices=["fp32", "fp16"], default="fp32",
        help="of the weights in the files. fp16 takes half the space; the networks still compute in fp32 "
        "(default: fp32)")
    add("--clip-skip", "--clip_skip", type=whole_number(1), default=1, metavar="N",
        help="which layer of the text encoder to export: 1 the last, 2 the one before it, as some fine-tuned models "
        "expect (default: 1)")
    add("--vae", type=Path, metavar="FILE", help="use the VAE of another file or folder, in place of the model's own")
    add("--weights", choices=["auto", "model", "ema"], default="auto",
        help="which UNet weights, if the file has both (default: auto, the model's own; the averaged ones if it edits)")
    add_reading_flags(add)
    # fmt: on
    add = add_output_flags(parser)
    add("--json", action="store_true", help="print one JSON object with sizes and differences instead of the path")
    return parser


def run(args: argparse.Namespace) -> int:
    require("onnx", "sd export")
    path = embedded_model() if args.model is None else find(args.model)
    from sd.runtime.onnx.export import ExportError, export_onnx  # imports torch

    with progress_bar("exporting", args.quiet, unit="network") as bar:
        try:
            done = export_onnx(
                path,
                args.onnx,
                precision=args.precision,
                clip_skip=args.clip_skip,
                weights=args.weights,
                prediction=args.prediction,
                variant=args.variant,
                vae=args.vae and find(args.vae, "vae"),
                force=args.force,
                on_start=bar.reset,
                on_file=lambda _: bar.update(),
            )
        except ExportError as error:
            bar.close()
            say(str(error))
            return DIFFERS
    for warning in done.checkpoint.said.warnings:
        say(f"{path.name}: {warning}")
    for line in (*describe(path, done.checkpoint, f"weights stored in {args.precision}"), *table(done.files)):
        say(line, quiet=args.quiet)
    print(json.dumps(as_data(args, done.files)) if args.json else args.onnx)
    return WRITTEN


def table(files: "list[Written]") -> list[str]:
    """The size of each file, and how far it is from its network."""
    rows = [("", "size", "largest difference")]
    rows += [(f"{each.name}.onnx", f"{each.nbytes / 1e6:.1f} MB", f"{each.difference:.1e}") for each in files]
    return [f"  {line}" for line in aligned(rows, "<>>")]


def as_data(args: argparse.Namespace, files: "list[Written]") -> dict[str, object]:
    return {
        "event": "export",
        "path": str(args.onnx),
        "precision": args.precision,
        "networks": [asdict(each) for each in files],
    }
