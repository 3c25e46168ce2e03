"""Compare sd-zoo's speed and memory with those of other programs: same weights, same steps, same precision.

    python scripts/benchmarks/benchmark.py --folder files              # 512x512, one picture; full-size made-up weights
    python scripts/benchmarks/benchmark.py --folder files --sizes 256,512,768,1024 --json x.json --plot x.png
    python scripts/benchmarks/benchmark.py --contenders sd-zoo,diffusers,diffusers-tuned,diffusers-compiled,openvino
    python scripts/benchmarks/benchmark.py --device cuda --contenders sd-zoo-compiled,diffusers-compiled --start-at-once

Every contender is a process of its own, which loads the same weights and then waits to be asked for one unit of work at
a time: a step, a decoding, a whole picture. They are asked in turn, so all of them see the same state of the machine,
and only one works at any moment. Before anything is reported, the latents of all after the same two steps from the same
noise are compared: where they differ by more than the precision explains, there is no report, and the exit code is 1.

    sd-zoo              this project
    sd-zoo-uncaptured   the same, without CUDA graphs
    sd-zoo-compiled     the same, with the UNet compiled by torch.compile, as --compile does
    sd-zoo-autotuned    the same, where on CUDA the compiler also tries kernels of its own, which takes minutes
    diffusers           as it comes: float32
    diffusers-plain     in the precision of the others, otherwise as it comes
    diffusers-tuned     in the precision of the others, channels_last; on CUDA with joined projections
    diffusers-compiled  the same, with the UNet compiled by torch.compile; on CUDA in the mode of --compile-mode
    openvino            the networks compiled by OpenVINO, for processors

Full-size files take 4.3 GB each of disk, once for each layout; each contender takes the memory of a model.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import benchmark_report as reports
from benchmark_contender import ENDLESS, Options
from benchmark_contest import Case, Wrong, measure
from benchmark_process import ROOT, WORKERS, environment

from sd.app.cli.bench import parse_batch_sizes, parse_sizes
from sd.app.errors import UsageError
from sd.files import folder_written_whole, written_whole
from sd.runtime.device import PRECISIONS, pick_device, pick_precision, precision_name
from sd.study.benchmark.process import read_once

NEEDS = {  # contender -> modules, and what installs them
    "sd-zoo": ((), ""),
    "sd-zoo-uncaptured": ((), ""),
    "sd-zoo-compiled": ((), ""),
    "sd-zoo-autotuned": ((), ""),
    "diffusers": (("diffusers", "transformers"), "pip install diffusers transformers accelerate"),
    "diffusers-plain": (("diffusers", "transformers"), "pip install diffusers transformers accelerate"),
    "diffusers-tuned": (("diffusers", "transformers"), "pip install diffusers transformers accelerate"),
    "diffusers-compiled": (("diffusers", "transformers"), "pip install diffusers transformers accelerate"),
    "openvino": (("openvino", "diffusers", "transformers"), "pip install openvino diffusers transformers"),
}
DEFAULT = "sd-zoo,diffusers,diffusers-tuned"
SPACE = {"full": 4.4e9, "tiny": 1e8}  # bytes of one layout in float32
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def missing(contender: str) -> str:
    """Why a contender cannot take part, with the command that helps; empty if it can."""
    modules, command = NEEDS[contender]
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{' and '.join(absent)} not installed. {command}" if absent else ""


def missing_files(options: Options, contenders: Sequence[str]) -> list[Path]:
    """Which layouts of the weights the contenders need that are not there yet."""
    needed = [options.checkpoint]
    needed += [options.folder] * any(not name.startswith("sd-zoo") for name in contenders)
    needed += [options.openvino] * ("openvino" in contenders)
    return [Path(path) for path in needed if not Path(path).exists()]


def make_files(options: Options, contenders: Sequence[str], size: str, precision: str) -> None:
    """The same made-up weights for everybody, written where they are not there yet; all in the page cache."""
    for path in missing_files(options, contenders):
        if path == Path(options.checkpoint):
            run("scripts/benchmarks/make_checkpoint.py", options.checkpoint, "--size", size, "--precision", precision)
        elif path == Path(options.folder):
            run("-m", "sd", "convert", options.checkpoint, options.folder, "--to", "diffusers", "--no-hash", "-q")
        else:
            with folder_written_whole(path) as target:
                run(str(WORKERS), "export", options.folder, str(target))
    for path in [Path(options.checkpoint), *Path(options.folder).rglob("*.safetensors")]:
        read_once(path)


def run(*command: str) -> None:
    """Do what belongs to no measurement in a process whose memory goes with it."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--contenders", default=DEFAULT, help="in the order of their turns (default: %(default)s)")
    add("--sizes", help="in pixels, 512 or 768x512 (default: 512)")
    add("--batch-sizes", default="1", help="pictures at a time (default: 1)")
    add("--precision", choices=["auto", *PRECISIONS], default="auto", help="(default: what sd-zoo would choose)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    add("--steps", type=int, default=10, help="of a whole picture (default: 10)")
    add("--repeat", type=int, default=5, help="how often everything is measured (default: 5)")
    add("--starts", type=int, help="how many cold starts of each (default: as --repeat says)")
    add("--whole", type=int, metavar="STEPS",
        help="at the end, also new processes, from start to a picture of so many steps, of the first size")  # fmt: skip
    add("--start-at-once", action="store_true",
        help="all at the same time: cold starts are then no measure, but compiling takes less time")  # fmt: skip
    add("--together", type=int, help="steps at a time, of which the mean is taken (default: 20 on a GPU, otherwise 1)")
    add("--compile-mode", choices=COMPILE_MODES, default="max-autotune",
        help="of diffusers-compiled on CUDA (default: %(default)s)")  # fmt: skip
    add("--threads", type=int, help="of the processor (default: what each program chooses)")
    add(
        "--folder", type=Path, help="where the files with the weights are kept (default: a new one, removed at the end)"
    )
    add("--file-precision", choices=PRECISIONS, default="fp32", help="of the weights there (default: %(default)s)")
    add("--tiny", action="store_true", help="a narrow model, 64x64: to try the script")
    add("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    add("--plot", type=Path, metavar="FILE", help="also draw it into a .png file")
    add("--logs", type=Path, metavar="FOLDER", help="also keep what the contenders say on standard error")
    add("--force", action="store_true", help="replace files that exist")
    args = parser.parse_args(arguments)
    try:
        check(args)
    except (UsageError, ValueError) as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before any work. Raises UsageError or ValueError."""
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
    for flag, number, most in (
        ("--steps", args.steps, 1000),
        ("--repeat", args.repeat, 400),
        ("--starts", args.starts, 400),
        ("--whole", 1 if args.whole is None else args.whole, 1000),
        ("--together", args.together, ENDLESS),
    ):
        if not 1 <= number <= most:
            raise UsageError(f"{flag} {number} is out of range: 1 to {most}.")
    if args.threads is not None and not 1 <= args.threads <= 1024:
        raise UsageError(f"--threads {args.threads} is out of range: 1 to 1024.")
    args.precision = precision_name(pick_precision(pick_device(args.device), args.precision))
    for flag, path, suffix in (("--json", args.json, ".json"), ("--plot", args.plot, ".png")):
        if path is not None and (path.suffix != suffix or not path.parent.is_dir()):
            raise UsageError(f"{flag} {path} cannot be written: give a {suffix} file in a folder that exists.")
        if path is not None and path.exists() and not args.force:
            raise UsageError(f"{flag} {path} exists already. Give another name, or --force to replace it.")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib to draw. Install it: pip install matplotlib.")
    for flag, folder in (("--folder", args.folder), ("--logs", args.logs)):
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{flag} {folder} is no folder. Make it first.")


def write_json(report: reports.Report, args: argparse.Namespace) -> None:
    """What is known so far, if it is wanted: a long comparison may be ended on the way."""
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
        options = Options(
            checkpoint=str(folder / f"{name}.ckpt"),
            folder=str(folder / f"{name}-diffusers"),
            openvino=str(folder / f"{name}-openvino"),
            device=args.device,
            precision=args.precision,
            threads=args.threads,
            compile_mode=args.compile_mode,
            logs=args.logs and str(args.logs.resolve()),
        )
        needed, free = SPACE[size] * len(missing_files(options, names)), shutil.disk_usage(folder).free
        if free < needed:
            print(f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed", file=sys.stderr)
            return 2
        make_files(options, names, size, args.file_precision)
        report = measure(
            names,
            options,
            args.cases,
            args.steps,
            args.repeat,
            starts=args.starts,
            together=args.together,
            at_once=args.start_at_once,
            whole=args.whole,
            on_case=lambda report: write_json(report, args),
        )
    except Wrong as wrong:
        print(wrong, file=sys.stderr)
        return 1
    finally:
        if temporary:
            temporary.cleanup()
    report.left_out = {**absent, **report.left_out}
    print(reports.text(report))
    write_json(report, args)
    if args.plot:
        with written_whole(args.plot, force=args.force) as file:
            reports.plot(report).savefig(file, format="png", dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
