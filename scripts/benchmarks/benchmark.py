"""Compare the speed and memory of sd-zoo with other programs: same weights, same steps, same precision.

    python scripts/benchmarks/benchmark.py --folder files              # 512x512, one picture; full-size made-up weights
    python scripts/benchmarks/benchmark.py --folder files --sizes 256,512,768,1024 --json x.json
    python scripts/benchmarks/benchmark.py --contenders sd-zoo,diffusers,diffusers-tuned,diffusers-compiled,openvino
    python scripts/benchmarks/benchmark.py --family sd-v2 --sizes 512,768
    python scripts/benchmarks/benchmark.py --family sdxl --file-precision fp16 --sizes 1024 --contenders sd-zoo,openvino
    python scripts/benchmarks/benchmark.py --device cuda --contenders sd-zoo-compiled,diffusers-compiled --start-at-once

Each contender is a process that loads the same weights and then waits for requests: a step, a decoding, a whole
picture. They take turns, so all see the same state of the machine, and only one works at any moment. First, their
latents after the same two steps from the same noise are compared: if they differ by more than the precision explains,
there is no report and the exit code is 1.

With guidance and the full VAE:

    sd-zoo              this project
    sd-zoo-uncaptured   the same, without CUDA graphs
    sd-zoo-compiled     the same, with the UNet compiled by torch.compile, as --compile does
    diffusers           with its defaults: float32
    diffusers-plain     in the precision of the others, otherwise with its defaults
    diffusers-tuned     in the precision of the others, channels_last; on CUDA with fused projections
    diffusers-compiled  the same, with the UNet compiled by torch.compile; on CUDA in the mode of --compile-mode
    openvino            the networks compiled by OpenVINO, for CPUs
    sd.cpp              stable-diffusion.cpp, for CPUs; gives no latents, so nothing of it is compared

With 8-bit weights and activations in the UNet, in a table of their own:

    sd-zoo-int8         this project, with --precision int8
    openvino-int8       openvino, quantised by NNCF, which takes minutes the first time

With few steps (--few-steps), no guidance and a tiny VAE, compared with each other only:

    sd-zoo-few          this project; sd-zoo-few-int8 with 8 bits
    fastsd              openvino with FastSD CPU's settings; fastsd-int8 with 8 bits

Full-size files take 4.3 to 5.2 GB of disk per layout, XL's 6.9 in fp16; each contender takes the memory of one model.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import benchmark_report as reports
from benchmark_comparing import Case, Wrong
from benchmark_contender import FEW, GUIDED, Options
from benchmark_contest import measure
from benchmark_files import SPACE, make_files, space_for

from sd.app.cli.bench import parse_batch_sizes, parse_sizes
from sd.app.errors import UsageError
from sd.files import written_whole
from sd.pipeline.runner import PRECISIONS, precision_name
from sd.runtime.device import pick_device, pick_precision

DIFFUSERS = (("diffusers", "transformers"), "pip install diffusers transformers accelerate")
OPENVINO = (("openvino", "diffusers", "transformers"), "pip install openvino diffusers transformers")
NEEDS = {  # contender -> modules, and what installs them
    **dict.fromkeys(("sd-zoo", "sd-zoo-uncaptured", "sd-zoo-compiled"), ((), "")),
    **dict.fromkeys(("diffusers", "diffusers-plain", "diffusers-tuned", "diffusers-compiled"), DIFFUSERS),
    **dict.fromkeys(("sd-zoo-int8", "sd-zoo-few", "sd-zoo-few-int8"), ((), "")),
    **dict.fromkeys(("openvino", "fastsd"), OPENVINO),
    **dict.fromkeys(("openvino-int8", "fastsd-int8"), ((*OPENVINO[0], "nncf"), f"{OPENVINO[1]} nncf")),
    "sd.cpp": (("stable_diffusion_cpp",), "pip install stable-diffusion-cpp-python"),
}
DEFAULT = "sd-zoo,diffusers,diffusers-tuned"
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def missing(contender: str) -> str:
    """Why a contender cannot take part, with the command that helps; empty if it can."""
    modules, command = NEEDS[contender]
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{' and '.join(absent)} not installed. {command}" if absent else ""


def count_to(most: int) -> Callable[[str], int]:
    """For the `type` of an argument: 1 to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is out of range: 1 to {most}")
        return int(text)

    return parse


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--contenders", default=DEFAULT, help="in the order of their turns (default: %(default)s)")
    add("--sizes", help="in pixels, 512 or 768x512 (default: 512)")
    add("--batch-sizes", default="1", help="pictures at a time (default: 1)")
    add("--precision", choices=["auto", *PRECISIONS], default="auto", help="(default: as sd-zoo chooses)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    add("--steps", type=count_to(1000), default=10, help="of a whole picture (default: 10)")
    add("--repeat", type=count_to(400), default=5, help="number of measurements (default: 5)")
    add("--few-steps", type=count_to(FEW.endless), default=4,
        help="of a whole picture of the contenders without guidance (default: 4)")  # fmt: skip
    add("--psnr", action="store_true", help="compare pictures with those of float32, which are made first")
    add("--starts", type=count_to(400), help="number of cold starts (default: --repeat)")
    add("--whole", type=count_to(1000), metavar="STEPS",
        help="finally time new processes, from start to a picture of the first size with this many steps")  # fmt: skip
    add("--start-at-once", action="store_true",
        help="start all at the same time: saves compilation time, but cold starts are not comparable")  # fmt: skip
    add(
        "--together",
        type=count_to(GUIDED.endless),
        help="steps per request, averaged (default: 20 on a GPU, otherwise 1)",
    )
    add("--compile-mode", choices=COMPILE_MODES, default="max-autotune",
        help="of diffusers-compiled on CUDA (default: %(default)s)")  # fmt: skip
    add("--threads", type=count_to(1024), help="of the CPU (default: each program's choice)")
    add("--folder", type=Path, help="folder for the weights (default: a new one, removed at the end)")
    add("--file-precision", choices=PRECISIONS, default="fp32", help="of the weights there (default: %(default)s)")
    add(
        "--family",
        choices=("sd-v1", "sd-v2", "sdxl"),
        default="sd-v1",
        help="of the made-up model (default: %(default)s)",
    )
    add("--tiny", action="store_true", help="a narrow model, 64x64: to try the script")
    add("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    add("--logs", type=Path, metavar="FOLDER", help="also keep the contenders' standard error")
    add("--force", action="store_true", help="replace FILE if it exists")
    args = parser.parse_args(arguments)
    try:
        check(args)
    except (UsageError, ValueError) as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Find all errors before any work begins. Raises UsageError or ValueError."""
    args.contenders = [name.strip() for name in args.contenders.split(",")]
    for name in args.contenders:
        if name not in NEEDS:
            raise UsageError(f"--contenders {name!r} is not known. There are: {', '.join(NEEDS)}.")
    if len(set(args.contenders)) < len(args.contenders):
        raise UsageError("--contenders names one twice. Once is enough.")
    sizes, batch_sizes = parse_sizes(args.sizes or ("64" if args.tiny else "512")), parse_batch_sizes(args.batch_sizes)
    args.cases = [Case(width=w, height=h, batch_size=count) for w, h in sizes for count in batch_sizes]
    args.device = str(pick_device(args.device))
    args.starts = args.repeat if args.starts is None else args.starts
    if args.together is None:
        args.together = 1 if args.device == "cpu" else 20
    args.precision = precision_name(pick_precision(pick_device(args.device), args.precision))
    if args.json is not None and (args.json.suffix != ".json" or not args.json.parent.is_dir()):
        raise UsageError(f"--json {args.json} cannot be written: give a .json file in a folder that exists.")
    if args.json is not None and args.json.exists() and not args.force:
        raise UsageError(f"--json {args.json} exists already. Give another name, or --force to replace it.")
    for flag, folder in (("--folder", args.folder), ("--logs", args.logs)):
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{flag} {folder} is not a folder. Create it first.")


def write_json(report: reports.Report, args: argparse.Namespace) -> None:
    """Write the results so far, if --json asks for them: a long comparison may be interrupted."""
    if args.json:
        with written_whole(args.json, force=args.force or report.written) as file:
            file.write(json.dumps(report.to_dict(), indent=1).encode() + b"\n")
        report.written = True


def main(arguments: Sequence[str] | None = None) -> int:
    args = arguments_of(arguments)
    absent = {name: missing(name) for name in args.contenders if missing(name)}
    for name, reason in absent.items():
        print(f"skipped: {name}: {reason}", file=sys.stderr)
    names = [name for name in args.contenders if name not in absent]
    if not names:
        print("none of the contenders is installed", file=sys.stderr)
        return 2
    size = "tiny" if args.tiny else "full"
    temporary = None if args.folder else tempfile.TemporaryDirectory(prefix="benchmark-", dir=os.getcwd())
    try:
        folder = Path(temporary.name) if temporary else args.folder.resolve()
        name = f"made-up-{size}" + ("" if args.file_precision == "fp32" else f"-{args.file_precision}")
        name += "" if args.family == "sd-v1" else f"-{args.family}"
        options = Options(
            checkpoint=str(folder / f"{name}.ckpt"),
            folder=str(folder / f"{name}-diffusers"),
            openvino=str(folder / f"{name}-openvino"),
            tiny_vae=str(folder / "made-up-taesd.safetensors"),
            device=args.device,
            precision=args.precision,
            file_precision=args.file_precision,
            threads=args.threads,
            compile_mode=args.compile_mode,
            logs=args.logs and str(args.logs.resolve()),
        )
        layout = 1e8 if args.tiny else SPACE[args.family] / (1 if args.file_precision == "fp32" else 2)
        needed, free = space_for(options, names, layout), shutil.disk_usage(folder).free
        if free < needed:
            print(f"{folder} has {free / 1e9:.1f} GB free, but needs {needed / 1e9:.1f} GB", file=sys.stderr)
            return 2
        make_files(options, names, args.family, size)
        report = measure(names, options, args, lambda report: write_json(report, args))
    except Wrong as wrong:
        print(wrong, file=sys.stderr)
        return 1
    finally:
        if temporary:
            temporary.cleanup()
    report.left_out = {**absent, **report.left_out}
    print(reports.text(report))
    write_json(report, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
