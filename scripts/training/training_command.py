"""What the training and scoring scripts share: flags, processes, progress bars, and errors as one sentence."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from sd.files import written_whole
from sd.pipeline.image.tensors import contact_sheet
from sd.runtime.cpu.process_memory import keep_freed_memory
from sd.runtime.device import pick_device
from sd.training.loop import TrainingOptions, TrainingRun


def parser_of(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def run(main: Callable[[], None]) -> None:
    """Run a script; invalid files, changed options and a loss that is not finite end it with a sentence and code 2."""
    try:
        main()
    except (ValueError, ArithmeticError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)


def training_parser(
    description: str, *, batch_size: int | None = None, seed: int = 0, save_every: int
) -> argparse.ArgumentParser:
    """With the flags that all trainings have; the numbers are their defaults. Without one, there is no --batch-size."""
    parser = parser_of(description)
    add = parser.add_argument
    if batch_size:
        add("--batch-size", type=int, default=batch_size, help="over all processes (default: %(default)s)")
    add("--seed", type=int, default=seed, help="(default: %(default)s)")
    add("--device", default="auto", help="(default: %(default)s)")
    add("--autocast", action="store_true", help="bfloat16 in the forward pass, for devices that are fast at it")
    add("--save-every", type=int, default=save_every, help="steps (default: %(default)s)")
    return parser


def prepare(args: argparse.Namespace) -> torch.device:
    """Join the other processes of torchrun, if there are any; returns the device of this one.

    NVIDIA GPUs may round the factors of float32 products to TF32: the error vanishes in the noise of a batch.
    """
    device = pick_device(args.device)
    keep_freed_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def options(
    args: argparse.Namespace,
    steps: int,
    learning_rate: float,
    *,
    warmup: int,
    final_learning_rate: float,
    ema_decay: float,
    muon: bool = False,
) -> TrainingOptions:
    return TrainingOptions(
        steps=steps,
        learning_rate=learning_rate,
        warmup=warmup,
        final_learning_rate=final_learning_rate,
        weight_decay=0.01,
        gradient_clip=1.0,
        ema_decay=ema_decay,
        autocast=args.autocast,
        save_every=args.save_every,
        muon=muon,
    )


def train(run: TrainingRun, name: str, every: int = 0, show: Callable[[int], None] | None = None) -> None:
    """Train to the end with a progress bar; the first process calls `show` every so many steps and after the last."""
    with tqdm(desc=name, total=run.options.steps, initial=run.step, disable=not run.is_first) as bar:
        for row in run.run():
            bar.update()
            if show and run.is_first and (row["step"] % every == 0 or row["step"] == run.options.steps):
                show(row["step"])


def save_sheet(path: Path, pictures: Sequence[Image.Image], columns: int | None = None, **options: object) -> None:
    with written_whole(path, force=True) as file:
        contact_sheet(pictures, columns).save(file, "PNG", **options)
