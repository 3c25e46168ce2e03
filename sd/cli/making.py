"""What the commands that make pictures have in common: their flags, and the way from the flags to files."""

import argparse
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import counted
from sd.cli.errors import JobError, UsageError, failure_of
from sd.cli.flags import Parser, add_output_flags, add_schedule_flags, bar_hidden, describe_checkpoint, say
from sd.cli.jobs import FIELDS, group, plan, read_lines
from sd.cli.outputs import DEFAULT_OUT, PLACEHOLDERS, grid_path, picture_paths
from sd.embedded import embedded_model
from sd.settings import Settings

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from convert.checkpoint import Checkpoint
    from convert.reader import CheckpointFile
    from sd.canvas import Canvas
    from sd.pipeline import StableDiffusion

DEVICES = "auto, cuda, mps or cpu"
MOST_PICTURES = 100_000


def add_making_flags(parser: Parser, *, size_default: str) -> None:
    """The flags of every command that makes picture files."""
    add = parser.add_argument
    add_prompt_flags(parser)
    add("--from-file", "--from_file", metavar="FILE", help="prompts from a file, one a line or one JSON object a line "
        '({"prompt": "...", "seed": 7}); - is standard input')  # fmt: skip
    add_model_flags(parser)
    picture = add_picture_flags(parser, size_default=size_default)
    picture.add_argument("--count", "--n_iter", type=int, default=1, metavar="N",
                         help="batches of each prompt; makes N x batch size pictures (default: 1)")  # fmt: skip
    picture.add_argument("-b", "--batch-size", "--n_samples", type=int, default=1, metavar="N",
                         help="pictures made at the same time, in each batch (default: 1)")  # fmt: skip
    add_sampling_flags(parser)

    output = add_output_flags(parser)
    output.add_argument("-o", "--out", "--outdir", default=DEFAULT_OUT, metavar="OUT",
                        help="a .png file, a folder, or a template for names with "
                        f"{', '.join(PLACEHOLDERS)} in braces (default: {DEFAULT_OUT})")  # fmt: skip
    output.add_argument("--grid", action="store_true", help="also write one sheet with all pictures")
    output.add_argument("--grid-columns", type=int, metavar="N", help="pictures in a row of that sheet; implies --grid")
    output.add_argument("--json", action="store_true", help="print one JSON object a picture instead of its path")


def add_prompt_flags(parser: Parser) -> None:
    """One prompt, and what goes with it."""
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help='what to show; "" gives what the model makes without a prompt')
    add("-p", "--prompt", dest="prompt_flag", metavar="PROMPT", help="PROMPT, given as a flag")
    add("--prompt-file", "--prompt_file", metavar="FILE", help="one prompt, all of a file's text; - is standard input")
    add("-n", "--negative-prompt", "--negative_prompt", default="", metavar="TEXT", help="what to move away from")
    add("--plain-prompts", "--plain_prompts", action="store_true", help="brackets and BREAK in prompts are text, not "
        "weights and the like; sd tokens shows how a prompt is read")  # fmt: skip


def add_model_flags(parser: Parser) -> None:
    """Which weights, and how they are run."""
    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", "--ckpt", type=Path, metavar="FILE",
                       help="checkpoint: an original .ckpt or .safetensors, a diffusers folder, or what sd convert "
                       "wrote")  # fmt: skip
    model.add_argument("--weights", choices=["auto", "model", "ema"], default="auto",
                       help="which UNet weights, where the file has both (default: auto, the model's own)")  # fmt: skip
    model.add_argument("--device", default="auto", help=f"{DEVICES} (default: auto)")
    model.add_argument("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto",
                       help="of the networks (default: auto, the fastest that keeps the picture)")  # fmt: skip


def add_picture_flags(parser: Parser, *, size_default: str) -> argparse._ArgumentGroup:
    """Size, seed and layer of the text encoder."""
    picture = parser.add_argument_group("picture")
    picture.add_argument("-W", "--width", "--W", type=int, metavar="PIXELS",
                         help=f"multiple of 8 (default: {size_default})")  # fmt: skip
    picture.add_argument("-H", "--height", "--H", type=int, metavar="PIXELS",
                         help=f"multiple of 8 (default: {size_default})")  # fmt: skip
    picture.add_argument("-s", "--seed", type=int, help="seed of the first picture; the next ones count on from it "
                         "(default: drawn, printed and stored)")  # fmt: skip
    picture.add_argument("--clip-skip", "--clip_skip", type=int, default=1, metavar="N",
                         help="which of the text encoder's layers is used: 1 the last, 2 the one before it, as some "
                         "fine-tuned models expect (default: 1)")  # fmt: skip
    return picture


def add_sampling_flags(parser: Parser) -> None:
    """Noise levels, sampler and guidance."""
    sampling = parser.add_argument_group("sampling")
    add_schedule_flags(sampling)
    sampling.add_argument(
        "--plms", dest="sampler", action="store_const", const="plms", help="the same as --sampler plms"
    )
    sampling.add_argument("--eta", "--ddim_eta", type=float, metavar="X",
                          help="share of fresh noise, where the sampler has a choice: 0 none, 1 as much as ddpm "
                          "(default: 0 in ddim, 1 in others)")  # fmt: skip
    sampling.add_argument("-g", "--guidance-scale", "--scale", "--cfg-scale", type=float, default=7.5, metavar="X",
                          help="how much to follow the prompt; 1 turns guidance off and saves half the work "
                          "(default: 7.5)")  # fmt: skip
    sampling.add_argument("--guidance-rescale", type=float, default=0.0, metavar="X",
                          help="take back contrast that guidance adds: 0 none, 1 all of it (default: 0)")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The picture that a run begins with, for every command but txt2img.

    canvas  from the model's native size to the picture, made ready
    labels  what a made picture says of it, by other tools' names
    exact   the same, exactly
    """

    canvas: "Callable[[int], Canvas]"
    labels: dict[str, object]
    exact: dict


def run(args: argparse.Namespace, parser: Parser, job: str, beginning: Beginning | None = None) -> int:
    """Make what the flags ask for.

    parser  of the command, for the spellings that JSON lines may use
    job     "text to picture", "image to image" or "inpainting"
    """
    from convert.checkpoint import read_checkpoint
    from convert.reader import open_checkpoint

    choose_model(args)
    for flag, number in (
        ("--count", args.count),
        ("--batch-size", args.batch_size),
        ("--grid-columns", args.grid_columns),
    ):
        if number is not None and number < 1:
            raise UsageError(f"{flag} {number} is out of range: at least 1.")
    lines = read_lines(args, setting_spellings(parser))
    given_seed, seed = args.seed, secrets.randbits(32) if args.seed is None else args.seed
    number = len(lines) * args.count * args.batch_size
    if number > MOST_PICTURES:
        raise UsageError(
            f"--count x --batch-size asks for {number} pictures; at most {MOST_PICTURES} are made in a run."
        )
    plan(args, lines, seed, native=512, once=True)  # what is wrong with them shows before the file is opened
    canvas = None
    with open_checkpoint(args.model) as file:
        checkpoint = read_checkpoint(file, weights=args.weights)
        check_family(checkpoint, job)
        if beginning is not None:
            canvas = beginning.canvas(checkpoint.config.native_size)
            args.width, args.height = canvas.placement.working
        jobs = plan(args, lines, seed, native=checkpoint.config.native_size)
        if canvas is not None and any((each.width, each.height) != canvas.placement.working for each in jobs):
            raise UsageError("a line of --from-file has a size of its own; here all pictures have that of --init.")
        if canvas is None and any(each.strength != 1 for each in jobs):
            raise UsageError("strength does nothing without a picture to begin with. See sd img2img --help.")
        check_clip_skip(checkpoint, jobs)
        for each in jobs:
            each.require_prediction(checkpoint.config.prediction)
        device, dtype = pick_device_and_precision(args)
        paths = picture_paths(args.out, jobs, force=args.force)
        sheet = grid_path(paths, force=args.force) if args.grid or args.grid_columns else None
        model = load_model(args, file, checkpoint, device, dtype)
    threading.Thread(target=model.source.sha256, daemon=True).start()  # seconds, beside the first steps
    if given_seed is None:
        say(f"seed {seed}", quiet=args.quiet)
    warn_of_unused(jobs)
    pictures, failed = make(model, jobs, paths, args, beginning, canvas)
    if sheet and pictures:
        from sd.image import contact_sheet, save_png

        save_png(contact_sheet(pictures, args.grid_columns), sheet, {}, force=args.force)
        report(args, event="grid", path=sheet)
    if failed:
        raise JobError(f"{failed} of {counted(len(jobs), 'picture')} could not be made.")
    return 0


def choose_model(args: argparse.Namespace) -> None:
    """The embedded model where no other is given, if it is there."""
    if args.model is None:
        args.model = embedded_model()
        if not args.model.exists():
            raise UsageError("no model given. Give a checkpoint with -m FILE; the README says where to get one.")


def setting_spellings(parser: Parser) -> dict[str, str]:
    """Every spelling of a flag that is a setting of a picture, without its hyphens: what JSON lines may say."""
    return {
        spelling: action.dest
        for action in parser._actions
        if action.dest in FIELDS
        for flag in action.option_strings
        for spelling in (flag.lstrip("-"), flag.lstrip("-").replace("-", "_"))
    }


def check_family(checkpoint: "Checkpoint", job: str) -> None:
    config = checkpoint.config
    channels = config.unet.in_channels
    allowed = {config.vae.latent_channels} | ({9} if job == "inpainting" else set())
    if channels not in allowed:
        hint = "sd inpaint uses it. " if channels == 9 else ""
        raise UsageError(
            f"this is an {config.family} checkpoint: its UNet takes {channels} channels, a picture to work on among "
            f"them. {hint}{job[0].upper()}{job[1:]} needs a plain one, which takes 4."
        )


def check_clip_skip(checkpoint: "Checkpoint", jobs: Sequence[Settings]) -> None:
    layers, most = checkpoint.config.text_encoder.layers, max(job.clip_skip for job in jobs)
    if most > layers:
        raise UsageError(f"--clip-skip {most} is out of range: this checkpoint's text encoder has {layers} layers.")


def pick_device_and_precision(args: argparse.Namespace) -> "tuple[torch.device, torch.dtype]":
    from sd.runtime import pick_device, pick_precision

    try:
        device = pick_device(args.device)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from None
    return device, pick_precision(device, args.precision)


def load_model(
    args: argparse.Namespace,
    file: "CheckpointFile",
    checkpoint: "Checkpoint",
    device: "torch.device",
    dtype: "torch.dtype",
) -> "StableDiffusion":
    from tqdm import tqdm

    from sd.loading import from_checkpoint
    from sd.runtime import precision_name

    total = sum(record.nbytes for record in checkpoint.tensors.values())
    hidden = bar_hidden(args.quiet)
    with tqdm(desc="loading", total=total, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
        model = from_checkpoint(file, checkpoint, device, dtype, bar.update)
    running = f"{precision_name(dtype)} on {device.type}"
    describe_checkpoint(args.model, checkpoint, running, quiet=args.quiet)
    return model


def warn_of_unused(jobs: Sequence[Settings]) -> None:
    """Nothing that the user gave is dropped in silence."""
    if any(job.negative_prompt and job.guidance_scale == 1 for job in jobs):
        say("--guidance-scale 1 turns guidance off, and the negative prompt with it.")


def make(
    model: "StableDiffusion",
    jobs: Sequence[Settings],
    paths: Sequence[Path],
    args: argparse.Namespace,
    beginning: Beginning | None = None,
    canvas: "Canvas | None" = None,
) -> "tuple[list[Image.Image], int]":
    """Make and write the pictures, batch by batch. Returns those for the grid, and how many could not be made."""
    from tqdm import tqdm

    from sd.from_picture import steps_run
    from sd.image import save_png

    start = None
    if canvas is not None:
        from sd.image import start_from

        start = start_from(canvas.working_picture, canvas.working_mask)
        for steps, strength in dict.fromkeys((job.steps, job.strength) for job in jobs if job.strength < 1):
            say(f"running {steps_run(steps, strength)} of {steps} steps (strength {strength:g})", quiet=args.quiet)
    labels, exact = (beginning.labels, beginning.exact) if beginning else ({}, {})
    batches = list(group(jobs, args.batch_size, model.chunk_count))
    total = sum(max(1, steps_run(batch[0].steps, batch[0].strength)) for batch in batches)
    left = iter(paths)
    kept, failed = [], 0
    with tqdm(desc="denoising", total=total, unit="step", disable=bar_hidden(args.quiet), leave=False) as bar:
        for batch in batches:
            targets = [next(left) for _ in batch]
            started = time.perf_counter()
            try:
                pictures = model.make(batch, start, on_step=lambda _: bar.update(), on_retry=say)
                if canvas is not None:
                    pictures = [canvas.finish(picture) for picture in pictures]
            except Exception as error:
                problem = failure_of(error)
                if problem is None:
                    raise
                say(f"seed {batch[0].seed}: {problem}")
                failed += len(batch)
                continue
            milliseconds = round(1000 * (time.perf_counter() - started) / len(batch))
            for picture, job, path in zip(pictures, batch, targets, strict=True):
                try:
                    save_png(picture, path, model.texts(job, labels, exact), force=args.force)
                except FileExistsError as error:  # taken since we looked, by another run
                    say(f"seed {job.seed}: {error}")
                    failed += 1
                    continue
                bar.clear()
                report(args, event="picture", path=path, seed=job.seed, ms=milliseconds)
            if args.grid or args.grid_columns:
                kept += pictures
    return kept, failed


def report(args: argparse.Namespace, *, event: str, path: Path, **values: object) -> None:
    """A result on stdout."""
    if args.json:
        print(json.dumps({"event": event, "path": str(path), "sha256": picture_sha256(path), **values}), flush=True)
    else:
        print(path, flush=True)


def picture_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
