"""What the commands that make pictures have in common: the way from their flags to files."""

import argparse
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import counted
from sd.app.cli.flags import Parser, bar_hidden, describe_checkpoint, say
from sd.app.cli.picture_flags import setting_spellings
from sd.app.errors import JobError, UsageError
from sd.app.jobs import step_files
from sd.app.jobs.outputs import grid_path, name_pictures, picture_paths
from sd.app.jobs.plan import Line, pictures_each, plan, read_lines
from sd.app.jobs.resuming import pictures_there, same_facts, stopped_seed
from sd.app.jobs.run import Beginning, make, report
from sd.files import remove_leftovers
from sd.pipeline.settings import Settings
from sd.runtime.embedded import embedded_model

if TYPE_CHECKING:
    import torch

    from convert.checkpoint import Checkpoint
    from convert.files.reader import CheckpointFile
    from sd.pipeline.stable_diffusion import StableDiffusion
    from sd.runtime.device import RunOptions

MOST_PICTURES = 100_000


def run(args: argparse.Namespace, parser: Parser, job: str, beginning: Beginning | None = None) -> int:
    """Make what the flags ask for.

    parser  of the command, for the spellings that JSON lines may use
    job     "text to picture", "image to image" or "inpainting"
    """
    from convert.checkpoint import read_checkpoint
    from convert.files.reader import checksums_ahead, open_checkpoint

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
    varied = draw_variation_seed(args, lines)
    step_files.check(args)
    number = len(lines) * pictures_each(args)
    if number > MOST_PICTURES:
        raise UsageError(
            f"--count x --batch-size asks for {number} pictures; at most {MOST_PICTURES} are made in a run."
        )
    plan(args, lines, seed, native=512, once=True)  # what is wrong with them shows before the file is opened
    canvas = None
    with open_checkpoint(args.model) as file, ExitStack() as meanwhile:
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
        if canvas is not None and any(each.hires for each in jobs):
            raise UsageError("hires is for pictures from text alone; here, one is given to begin with.")
        check_clip_skip(checkpoint, jobs)
        for each in jobs:
            each.require_prediction(checkpoint.config.prediction)
        meanwhile.enter_context(checksums_ahead(file, checkpoint.tensors.values()))
        device, dtype = pick_device_and_precision(args, checkpoint)  # which imports PyTorch, a second or two
        names, there = name_pictures(args.out, jobs), None
        if (args.from_file is not None or len(jobs) > 1) and not args.force:
            same = same_facts(args.model, checkpoint, beginning.exact if beginning else {})
            if args.from_file is not None and given_seed is None:
                stopped = stopped_seed(
                    names, lambda seed: plan(args, lines, seed, native=checkpoint.config.native_size), same
                )
                seed = seed if stopped is None else stopped
                jobs = plan(args, lines, seed, native=checkpoint.config.native_size)
            there = pictures_there(names, jobs, same)
        paths = picture_paths(names, jobs, there, force=args.force)
        if there:
            say(f"{len(there)} of {counted(len(jobs), 'picture')} are there already", quiet=args.quiet)
            remove_leftovers(path for i, path in enumerate(paths) if i not in there)
        if args.save_steps and not there:
            step_files.require_free(args, jobs, paths)
        sheet = sheet_path(args, paths, there)
        if there and len(there) == len(jobs) and sheet is None:
            return 0
        model = load_model(args, file, checkpoint, device, dtype)
    tell_other_model(args, model)
    if given_seed is None:
        say(f"seed {seed}", quiet=args.quiet)
    if varied:
        say(f"variation seed {args.vary_seed}", quiet=args.quiet)
    warn_of_unused(jobs, model.runner.options)
    pictures, failed = make(model, jobs, paths, args, beginning, canvas, there=set(there or {}))
    if sheet and pictures:
        from sd.pipeline.image.tensors import contact_sheet, save_png

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


def draw_variation_seed(args: argparse.Namespace, lines: Sequence[Line]) -> bool:
    """Where variations are asked for without a seed of theirs, one is drawn; returns whether that was so."""
    asked = args.vary or any(line.own.get("vary") for line in lines)
    if args.vary_seed is None and asked:
        args.vary_seed = secrets.randbits(32)
        return True
    if args.vary_seed is not None and args.vary is None and not asked:
        raise UsageError("--vary-seed does nothing without --vary, which says how much to vary. Example: --vary 0.1.")
    return False


def sheet_path(args: argparse.Namespace, paths: Sequence[Path], there: "dict[int, Path] | None") -> Path | None:
    """Where the sheet with all pictures goes, None where there is none to make: not asked for, or made already."""
    if not args.grid and not args.grid_columns:
        return None
    if there and len(there) == len(paths) and (sheet := grid_path(paths, force=True)).exists():
        return sheet if args.force else None
    return grid_path(paths, force=args.force)


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


def pick_device_and_precision(args: argparse.Namespace, checkpoint: "Checkpoint") -> "tuple[torch.device, torch.dtype]":
    from sd.runtime.device import pick_device, pick_precision

    try:
        device = pick_device(args.device)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from None
    if args.precision == "auto" and getattr(args, "made_with", {}).get("device") == device.type:
        known = {name for name in made_with(args, "precision").values() if name in ("fp32", "fp16", "bf16")}
        if len(known) == 1:
            return device, pick_precision(device, known.pop())
    return device, pick_precision(device, args.precision, checkpoint.config.unet.width)


def made_with(args: argparse.Namespace, name: str) -> dict:
    """What the picture of --like was made with, by a name in its exact settings; {} without one."""
    value = getattr(args, "made_with", {}).get(name)
    return value if isinstance(value, dict) else {}


def run_options(args: argparse.Namespace, device: "torch.device") -> "RunOptions":
    """What is asked for, or what the picture of --like was made with: they change how sums are rounded.

    Raises SettingError for what does not go together, and where --compile cannot be.
    """
    from sd.runtime.device import RunOptions
    from sd.runtime.gpu.compile import problem_of, require_compiler

    given = {name for name in RunOptions.names() if getattr(args, name, False)}
    before = made_with(args, "run")
    taken = {name for name in RunOptions.names() if before.get(name) is True} - given
    if "compile" in given and "low_memory" in taken:
        taken.remove("low_memory")
        say(f"{args.like.name} was made with --low-memory, which is left out: it does not go with --compile.")
    elif "compile" in taken:
        other = "low_memory" in given | taken
        problem = "does not go with --low-memory." if other else problem_of(device)
        if problem:
            taken.remove("compile")
            say(f"{args.like.name} was made with --compile, which is left out: it {problem}")
    for name in sorted(taken):
        say(f"--{name.replace('_', '-')}, as {args.like.name} was made", quiet=args.quiet)
    options = RunOptions(**dict.fromkeys(given | taken, True))
    if options.compile:
        require_compiler(device)
    return options


def load_model(
    args: argparse.Namespace,
    file: "CheckpointFile",
    checkpoint: "Checkpoint",
    device: "torch.device",
    dtype: "torch.dtype",
) -> "StableDiffusion":
    from tqdm import tqdm

    from sd.runtime.cpu.process_memory import keep_freed_memory
    from sd.runtime.device import precision_name
    from sd.runtime.loading import from_checkpoint

    total = sum(record.nbytes for record in checkpoint.tensors.values())
    hidden = bar_hidden(args.quiet)
    options = run_options(args, device)
    if device.type == "cpu" and not options.low_memory:
        keep_freed_memory()
    with tqdm(desc="loading", total=total, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
        model = from_checkpoint(file, checkpoint, device, dtype, options, bar.update)
    tell_when_compiling(model, quiet=args.quiet)
    running = f"{precision_name(dtype)} on {device.type}"
    describe_checkpoint(args.model, checkpoint, running, quiet=args.quiet)
    return model


def tell_when_compiling(model: "StableDiffusion", *, quiet: bool) -> None:
    """Have the model say so before it compiles anything."""
    model.runner.on_compile = lambda shape: tell_compiling(model, shape, quiet=quiet)
    model.runner.on_build = lambda: tell_building(quiet=quiet)


def tell_compiling(model: "StableDiffusion", shape: "torch.Size", *, quiet: bool) -> None:
    """Before the step that takes so long, for latents of that shape (B, C, H, W)."""
    height, width = (side * model.config.vae.factor for side in shape[-2:])
    say(
        f"compiling for {width}x{height}, {counted(shape[0], 'prediction')} at a time: once for each such number, size "
        "and length of prompts; minutes where it was not done here before",
        quiet=quiet,
    )


def tell_building(*, quiet: bool) -> None:
    say("compiling faster code for this processor: once, a few seconds", quiet=quiet)


def tell_other_model(args: argparse.Namespace, model: "StableDiffusion") -> None:
    """Where --like names a picture of another model, its settings make another picture."""
    before = made_with(args, "model")
    if before.get("sha256") and before["sha256"] != model.source.sha256():
        say(f"{args.like.name} was made with another model: {before.get('name')}, {before['sha256']}")


def warn_of_unused(jobs: Sequence[Settings], options: "RunOptions") -> None:
    """Nothing that the user gave is dropped in silence."""
    inside = {"--reuse-features": any(job.reuse_features > 1 for job in jobs)}
    inside["--merge-tokens"] = any(job.merge_tokens for job in jobs)
    for flag, used in inside.items():
        if options.compile and used:
            say(f"--compile does nothing for pictures with {flag}, which acts inside of the network.")
    if any(job.negative_prompt and job.guidance_scale == 1 for job in jobs):
        say("--guidance-scale 1 turns guidance off, and the negative prompt with it.")
