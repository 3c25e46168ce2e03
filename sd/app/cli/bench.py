"""`sd bench`: how fast a model is on this machine, and where the time of a step goes."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli.arch import parse_size
from sd.app.cli.flags import add_compile_flag, add_lora_flag, add_model_flags, add_output_flags, whole_number
from sd.app.cli.make_pictures import model_of
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import Terminal
from sd.app.errors import UsageError, failures_as
from sd.app.jobs.outputs import require_free
from sd.files import written_whole
from sd.pipeline.settings import Settings

if TYPE_CHECKING:
    from sd.pipeline.stable_diffusion import StableDiffusion


def parser() -> Parser:
    parser = Parser(
        prog="sd bench",
        description="Measure a model on this machine: loading, text encoding, one guided step, decoding,\n"
        "a whole picture, memory; and which kinds of layers take the time of a step.",
        epilog="examples:\n  sd bench\n"
        "  sd bench -m v1-5-pruned-emaonly.ckpt --sizes 512,768x512 --batch-sizes 1,4 -o bench.json",
    )
    add = add_model_flags(parser)
    add_compile_flag(add)
    add_lora_flag(add)
    add = parser.group("what to measure")
    add("--sizes", metavar="A,B,...",
        help="of pictures in pixels: 512 or 768x512, multiples of 8 (default: the model's native size)")  # fmt: skip
    add("--batch-sizes", default="1", metavar="A,B,...", help="pictures at a time (default: 1)")
    add("--steps", type=whole_number(2, 1000, "; the first one is a warm-up"), default=10, metavar="N",
        help="for each picture, 2 to 1000 (default: 10)")  # fmt: skip
    add("--repeat", type=whole_number(1, 999), default=3, metavar="N",
        help="how often to measure each thing (default: 3)")  # fmt: skip
    add = add_output_flags(parser)
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("-o", "--out", type=Path, metavar="FILE", help="also write that object to a .json file")
    return parser


def run(args: argparse.Namespace) -> int:
    request, events = model_of(args), Terminal(quiet=args.quiet)
    sizes = None if args.sizes is None else parse_sizes(args.sizes)
    batch_sizes = parse_batch_sizes(args.batch_sizes)
    require_free(args.out, ".json", force=args.force)
    from sd.app.jobs.adapters import announce, find_adapters
    from sd.app.jobs.model import announce_compiling, opened, pick_device_and_precision, run_options
    from sd.pipeline.runner import precision_name
    from sd.runtime.cpu import attention, winograd
    from sd.runtime.cpu.process_memory import keep_freed_memory
    from sd.runtime.loading import load
    from sd.study.benchmark.hardware import hardware
    from sd.study.benchmark.measuring import benchmark, units
    from sd.study.benchmark.table import table

    with opened(request, task=None) as (checkpoint, _):
        config = checkpoint.config
        size = {"width": config.native_size, "height": config.native_size}
        (job,), adapters = find_adapters([Settings(prompt="", seed=0, lora=args.lora or (), **size)], config)
    sizes = sizes or [(config.native_size, config.native_size)]
    device, dtype = pick_device_and_precision(request, config)
    options = asdict(run_options(request, device, events))
    precision = "int8" if options.pop("int8") else precision_name(dtype)

    reading = {name: getattr(request, name) for name in ("weights", "prediction", "variant", "vae", "tiny_vae")}

    def load_model() -> "StableDiffusion":
        model = load(request.file, device=str(device), precision=precision, **reading, **options)
        announce_compiling(model, events)
        if device.type == "cpu" and not request.low_memory:
            keep_freed_memory()  # like the commands that make pictures
        adapters.apply(model, job)
        return model

    announce(adapters, [job], events)
    stage = events.stage("measuring", units(len(sizes), len(batch_sizes), args.repeat), "run")
    counts = {"sizes": sizes, "batch_sizes": batch_sizes, "steps": args.steps, "repeat": args.repeat}
    with stage as advance, failures_as(UsageError, "this cannot be measured: "):
        found = benchmark(load_model, device=device, dtype=dtype, **counts, on_unit=advance)
    for problem in {attention.KERNEL.problem, winograd.KERNEL.problem} - {None}:
        events.warn(f"measured without the code that is compiled for this processor: {problem}")
    about = {"name": request.file.name, "family": config.family, "precision": precision}
    about |= {"lora": list(job.lora)} if job.lora else {}
    about |= {"tiny_vae": request.tiny_vae.name} if request.tiny_vae else {}
    data = {"event": "benchmark", "model": about, "run": options, "machine": hardware(device), **asdict(found)}
    if args.out is not None:
        with written_whole(args.out, force=args.force) as file:
            file.write(json.dumps(data, indent=1).encode() + b"\n")
    if args.json:
        print(json.dumps(data))
        return 0
    print(table(found, *lines_about(data)))
    if args.compile:
        print("The profiled step runs the UNet uncompiled: the layers of a compiled one cannot be timed.")
    if args.out is not None:
        print(args.out)
    return 0


def parse_sizes(text: str) -> list[tuple[int, int]]:
    return [parse_size(part if "x" in part else f"{part}x{part}", "--sizes") for part in distinct(text, "--sizes")]


def parse_batch_sizes(text: str) -> list[int]:
    parts = distinct(text, "--batch-sizes")
    for part in parts:
        if not (part.isascii() and part.isdecimal() and len(part) < 9 and 1 <= int(part) <= 1000):
            raise UsageError(f"--batch-sizes {part!r} is out of range: whole numbers from 1 to 1000, such as 1,2,4.")
    return [int(part) for part in parts]


def distinct(text: str, flag: str) -> list[str]:
    """The parts between commas. Raises UsageError if one is given twice."""
    parts = [part.strip() for part in text.split(",")]
    twice = [part for part in parts if parts.count(part) > 1]
    if twice:
        raise UsageError(f"{flag} names {twice[0]!r} twice. Once is enough.")
    return parts


def lines_about(data: dict) -> tuple[str, str]:
    """The model and the machine, a line each."""
    model, machine = data["model"], data["machine"]
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    options = "".join(f", --{name.replace('_', '-')}" for name, on in data["run"].items() if on)
    adapters = f" with {', '.join(model['lora'])}" if "lora" in model else ""
    adapters += f" with the tiny VAE {model['tiny_vae']}" if "tiny_vae" in model else ""
    return (
        f"{model['name']}{adapters}: {model['family']}, {model['precision']} on {machine['device']}{options}",
        f"{machine['device_name']}{threads}; {machine['system']}; sd-zoo {machine['sd_zoo']}, "
        f"torch {machine['torch']}, Python {machine['python']}",
    )
