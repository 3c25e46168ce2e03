"""`sd bench`: how fast a model is on this machine, and where the time of a step goes."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli.arch import parse_size
from sd.app.cli.flags import Parser, add_compile_flag, add_model_flags, add_output_flags
from sd.app.cli.make_pictures import model_of
from sd.app.cli.terminal import Terminal
from sd.app.errors import UsageError, failure_of

if TYPE_CHECKING:
    import torch

    from convert.checkpoint import Checkpoint
    from sd.app.jobs.request import ModelRequest
    from sd.pipeline.stable_diffusion import StableDiffusion
    from sd.study.benchmark.measuring import Benchmark

STEPS, REPEAT = 10, 3
NOT_SEEN = "The profiled step runs the UNet uncompiled: the layers of a compiled one cannot be timed."


def parser() -> Parser:
    parser = Parser(
        prog="sd bench",
        description="Measure a model on this machine: loading, text encoding, one guided step, decoding,\n"
        "a whole picture, memory; and which kinds of layers take the time of a step.",
        epilog="examples:\n  sd bench\n"
        "  sd bench -m v1-5-pruned-emaonly.ckpt --sizes 512,768x512 --batch-sizes 1,4 -o bench.json",
    )
    add_compile_flag(add_model_flags(parser))
    group = parser.add_argument_group("what to measure")
    group.add_argument("--sizes", metavar="A,B,...",
                       help="of pictures in pixels: 512 or 768x512, multiples of 8 (default: the model's "
                       "native size)")  # fmt: skip
    group.add_argument("--batch-sizes", default="1", metavar="A,B,...", help="pictures at a time (default: 1)")
    group.add_argument("--steps", type=int, default=STEPS, metavar="N",
                       help=f"for each picture, 2 to 1000 (default: {STEPS})")  # fmt: skip
    group.add_argument("--repeat", type=int, default=REPEAT, metavar="N",
                       help=f"how often to measure each thing (default: {REPEAT})")  # fmt: skip
    output = add_output_flags(parser)
    output.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    output.add_argument("-o", "--out", type=Path, metavar="FILE", help="also write that object to a .json file")
    return parser


def run(args: argparse.Namespace) -> int:
    request = model_of(args)
    sizes = None if args.sizes is None else parse_sizes(args.sizes)
    batch_sizes = parse_batch_sizes(args.batch_sizes)
    check_counts(args)
    if args.out is not None:
        require_free(args.out, force=args.force)
    from convert.checkpoint import read_checkpoint
    from convert.files.reader import open_checkpoint
    from sd.app.jobs.model import check_family, pick_device_and_precision, run_options

    with open_checkpoint(request.file) as file:
        checkpoint = read_checkpoint(file, weights=request.weights)
    check_family(checkpoint, "text to picture")
    device, dtype = pick_device_and_precision(request, checkpoint)
    options = asdict(run_options(request, device, Terminal(quiet=args.quiet)))
    native = checkpoint.config.native_size
    found = measure(args, request, options, sizes or [(native, native)], batch_sizes, device, dtype)
    data = as_data(request, options, checkpoint, device, dtype, found)
    if args.out is not None:
        from sd.files import written_whole

        with written_whole(args.out, force=args.force) as file:
            file.write(json.dumps(data, indent=1).encode() + b"\n")
    if args.json:
        print(json.dumps(data))
        return 0
    from sd.study.benchmark.table import table

    print(table(found, *lines_about(data)))
    if args.compile:
        print(NOT_SEEN)
    if args.out is not None:
        print(args.out)
    return 0


def parse_sizes(text: str) -> list[tuple[int, int]]:
    return [parse_size(part if "x" in part else f"{part}x{part}", "--sizes") for part in distinct(text, "--sizes")]


def parse_batch_sizes(text: str) -> list[int]:
    parts = distinct(text, "--batch-sizes")
    for part in parts:
        if not (part.isascii() and part.isdecimal() and 1 <= int(part) <= 1000):
            raise UsageError(f"--batch-sizes {part!r} is out of range: whole numbers from 1 to 1000, such as 1,2,4.")
    return [int(part) for part in parts]


def distinct(text: str, flag: str) -> list[str]:
    """The parts between commas. Raises UsageError if one is given twice."""
    parts = [part.strip() for part in text.split(",")]
    twice = [part for part in parts if parts.count(part) > 1]
    if twice:
        raise UsageError(f"{flag} names {twice[0]!r} twice. Once is enough.")
    return parts


def check_counts(args: argparse.Namespace) -> None:
    if not 2 <= args.steps <= 1000:
        raise UsageError(f"--steps {args.steps} is out of range: 2 to 1000; the first one is a warm-up.")
    if not 1 <= args.repeat <= 999:
        raise UsageError(f"--repeat {args.repeat} is out of range: 1 to 999.")


def require_free(out: Path, *, force: bool) -> None:
    """Before any work: raise UsageError if the file cannot be written."""
    if out.suffix.lower() != ".json":
        raise UsageError(f"--out {out}: results are written as .json.")
    if out.is_dir() or not out.parent.is_dir():
        problem = "is a folder" if out.is_dir() else f"cannot be written: there is no folder {out.parent}"
        raise UsageError(f"--out {out} {problem}. Give the name of a file in a folder that exists.")
    if out.exists() and not force:
        raise UsageError(f"--out {out} exists already. Give another name, or --force to replace it.")


def measure(
    args: argparse.Namespace,
    request: "ModelRequest",
    options: dict[str, bool],
    sizes: list[tuple[int, int]],
    batch_sizes: list[int],
    device: "torch.device",
    dtype: "torch.dtype",
) -> "Benchmark":
    from sd.app.jobs.model import announce_compiling
    from sd.runtime.cpu.process_memory import keep_freed_memory
    from sd.runtime.device import precision_name
    from sd.runtime.loading import load
    from sd.study.benchmark.measuring import benchmark, units

    events = Terminal(quiet=args.quiet)
    wanted = {"device": str(device), "precision": precision_name(dtype), "weights": request.weights, **options}

    def load_model() -> "StableDiffusion":
        model = load(request.file, **wanted)
        announce_compiling(model, events)
        if device.type == "cpu" and not args.low_memory:
            keep_freed_memory()  # like the commands that make pictures
        return model

    total = units(len(sizes), len(batch_sizes), args.repeat)
    with events.stage("measuring", total, "run") as advance:
        try:
            return benchmark(
                load_model,
                device=device,
                dtype=dtype,
                sizes=sizes,
                batch_sizes=batch_sizes,
                steps=args.steps,
                repeat=args.repeat,
                on_unit=advance,
            )
        except (ArithmeticError, MemoryError, RuntimeError) as error:
            problem = failure_of(error)
            if problem is None:
                raise
            raise UsageError(f"this cannot be measured: {problem}") from None


def as_data(
    request: "ModelRequest",
    options: dict[str, bool],
    checkpoint: "Checkpoint",
    device: "torch.device",
    dtype: "torch.dtype",
    found: "Benchmark",
) -> dict:
    """Everything that was measured, and on what: seconds, bytes, operations."""
    from sd.runtime.device import precision_name
    from sd.study.benchmark.hardware import hardware

    model = {"name": request.file.name, "family": checkpoint.config.family, "precision": precision_name(dtype)}
    return {"event": "benchmark", "model": model, "run": options, "machine": hardware(device), **asdict(found)}


def lines_about(data: dict) -> tuple[str, str]:
    """The model and the machine, a line each."""
    model, machine = data["model"], data["machine"]
    on = (
        f"{machine['device_name']}, {machine['threads']} threads"
        if machine["device"] == "cpu"
        else machine["device_name"]
    )
    options = "".join(f", --{name.replace('_', '-')}" for name, on in data["run"].items() if on)
    return (
        f"{model['name']}: {model['family']}, {model['precision']} on {machine['device']}{options}",
        f"{on}; {machine['system']}; sd-zoo {machine['sd_zoo']}, torch {machine['torch']}, Python {machine['python']}",
    )
