"""`sd txt2img`: a picture from text."""

import argparse
import hashlib
import json
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sd.cli.errors import JobError, UsageError
from sd.cli.flags import Parser, add_output_flags, bar_hidden, sampler_name, say
from sd.cli.outputs import DEFAULT_OUT, picture_paths
from sd.settings import SAMPLER_NAMES, SPACING_NAMES, Settings, nearest

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint
    from sd.pipeline import StableDiffusion

DEVICES = "auto, cuda, mps or cpu"


def parser() -> Parser:
    parser = Parser(
        prog="sd txt2img",
        description="Make pictures from text. Their paths are printed, one a line.",
        epilog="examples:\n"
        '  sd txt2img "a photograph of an astronaut riding a horse" -m v1-5-pruned-emaonly.ckpt --seed 42\n'
        '  sd txt2img "a lighthouse at dusk" -n "people" -m model.ckpt --count 2 -b 4 -o "dusk-{seed}.png"',
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help='what to show; "" gives what the model makes without a prompt')
    add("-p", "--prompt", dest="prompt_flag", metavar="PROMPT", help="the same as a flag")
    add("--from-file", "--from_file", metavar="FILE", help="prompts from a file, one a line or one JSON object a line "
        '({"prompt": "...", "seed": 7}); - is standard input')  # fmt: skip
    add("-n", "--negative-prompt", "--negative_prompt", default="", metavar="TEXT", help="what to move away from")

    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", "--ckpt", type=Path, metavar="FILE",
                       help="checkpoint: an original .ckpt or .safetensors, or one that sd convert wrote")  # fmt: skip
    model.add_argument("--weights", choices=["auto", "model", "ema"], default="auto",
                       help="which UNet weights, where the file has both (default: auto, the model's own)")  # fmt: skip
    model.add_argument("--device", default="auto", help=f"{DEVICES} (default: auto)")
    model.add_argument("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto",
                       help="of the networks (default: auto, the fastest that keeps the picture)")  # fmt: skip

    picture = parser.add_argument_group("picture")
    picture.add_argument("-W", "--width", "--W", type=int, metavar="PIXELS",
                         help="multiple of 8 (default: the model's native size)")  # fmt: skip
    picture.add_argument("-H", "--height", "--H", type=int, metavar="PIXELS",
                         help="multiple of 8 (default: the model's native size)")  # fmt: skip
    picture.add_argument("-s", "--seed", type=int, help="of the first picture, the next ones count on from it "
                         "(default: drawn, printed and stored)")  # fmt: skip
    picture.add_argument("--count", "--n_iter", type=int, default=1, metavar="N", help="batches to make of each prompt "
                         "(default: 1)")  # fmt: skip
    picture.add_argument("-b", "--batch-size", "--n_samples", type=int, default=1, metavar="N",
                         help="pictures made at the same time, in each batch (default: 1)")  # fmt: skip

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", "--ddim_steps", type=int, default=30, metavar="N", help="1 to 1000 (default: 30)")
    sampling.add_argument("--sampler", "--sampling-method", type=sampler_name, default="ddim", metavar="NAME",
                          help=f"{' or '.join(SAMPLER_NAMES)} (default: ddim)")  # fmt: skip
    sampling.add_argument("--schedule", dest="spacing", type=str.lower, default="leading", metavar="NAME",
                          help=f"which timesteps: {', '.join(SPACING_NAMES)} (default: leading)")  # fmt: skip
    sampling.add_argument("--eta", "--ddim_eta", type=float, default=0.0, metavar="X",
                          help="fresh noise in ddim: 0 none, 1 as much as ddpm (default: 0)")  # fmt: skip
    sampling.add_argument("-g", "--guidance-scale", "--scale", "--cfg-scale", type=float, default=7.5, metavar="X",
                          help="how much to follow the prompt; 1 turns guidance off and saves half the work "
                          "(default: 7.5)")  # fmt: skip

    add_output_flags(parser)
    parser.add_argument("-o", "--out", "--outdir", default=DEFAULT_OUT, metavar="OUT",
                        help=f"a .png file, a folder, or a template (default: {DEFAULT_OUT})")  # fmt: skip
    parser.add_argument("--grid", action="store_true", help="also write one sheet with all pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON object a picture instead of its path")
    return parser


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    from convert.checkpoint import read_checkpoint
    from convert.reader import open_checkpoint

    if args.model is None:
        raise UsageError("no model given. Give a checkpoint with -m FILE; the README says where to get one.")
    for flag, number in (("--count", args.count), ("--batch-size", args.batch_size)):
        if number < 1:
            raise UsageError(f"{flag} {number} is out of range: at least 1.")
    overrides = list(prompts(args))
    given_seed, seed = args.seed, secrets.randbits(32) if args.seed is None else args.seed
    plan_jobs(args, overrides, seed, native=512)  # what is wrong with the settings shows before the file is opened
    with open_checkpoint(args.model) as file:
        checkpoint = read_checkpoint(file, weights=args.weights)
        check_family(checkpoint)
        jobs = plan_jobs(args, overrides, seed, native=checkpoint.config.native_size)
        paths = picture_paths(args.out, jobs, force=args.force)
        model = load_model(args, file, checkpoint)
    threading.Thread(target=model.source.sha256, daemon=True).start()  # seconds, beside the first steps
    if given_seed is None:
        say(f"seed {seed}", quiet=args.quiet)
    warn_of_cuts(model, jobs)
    pictures = []
    for picture, job, path in make(model, jobs, paths, args, started):
        if args.grid:
            pictures.append(picture)
        report(args, "picture", path, seed=job.seed, ms=round(1000 * (time.perf_counter() - started)))
    if args.grid:
        write_grid(args, pictures, paths[0])
    return 0


def prompts(args: argparse.Namespace) -> Iterator[dict]:
    """The settings in which the jobs differ: those of a line of the file, or the prompt of the command line."""
    sources = [source for source in (args.prompt, args.prompt_flag, args.from_file) if source is not None]
    if len(sources) != 1:
        problem = "no prompt given" if not sources else "more than one of PROMPT, --prompt and --from-file given"
        raise UsageError(f'{problem}. Example: sd txt2img "a horse" -m model.ckpt.')
    if args.from_file is None:
        yield {"prompt": sources[0]}
        return
    text = sys.stdin.read() if args.from_file == "-" else Path(args.from_file).read_text(encoding="utf-8")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UsageError(f"--from-file {args.from_file} holds no prompts.")
    for number, line in lines:
        yield json_settings(f"{args.from_file}, line {number}", line) if line.startswith("{") else {"prompt": line}


def json_settings(where: str, line: str) -> dict:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is no JSON object: {error}.") from None
    spelled = {"schedule": "spacing", "scale": "guidance_scale"}
    given = {spelled.get(name := key.replace("-", "_"), name): value for key, value in given.items()}
    types = {"str": str, "int": int, "float": (int, float)}
    known = {field.name: types[field.type if isinstance(field.type, str) else field.type.__name__]
             for field in fields(Settings)}  # fmt: skip
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"{where}: {name!r} {nearest(name, known)}")
        if not isinstance(value, known[name]) or isinstance(value, bool):
            raise UsageError(f"{where}: {name} cannot be {json.dumps(value)}.")
    if "prompt" not in given:
        raise UsageError(f'{where} has no "prompt".')
    if "sampler" in given:
        given["sampler"] = sampler_name(given["sampler"])
    return given


def plan_jobs(args: argparse.Namespace, overrides: Sequence[dict], seed: int, native: int) -> list[Settings]:
    """One job for each picture, in order; picture i of the run has seed + i, unless its line of the file has a seed."""
    common = {
        "negative_prompt": args.negative_prompt,
        "width": native if args.width is None else args.width,
        "height": native if args.height is None else args.height,
        "steps": args.steps,
        "sampler": args.sampler,
        "spacing": args.spacing,
        "eta": args.eta,
        "guidance_scale": args.guidance_scale,
    }
    jobs: list[Settings] = []
    for override in overrides:
        first = Settings(**{**common, "seed": seed + len(jobs), **override})
        jobs += [replace(first, seed=first.seed + i) for i in range(args.count * args.batch_size)]
    return jobs


def check_family(checkpoint: "Checkpoint") -> None:
    channels = checkpoint.config.unet.in_channels
    if channels != checkpoint.config.vae.latent_channels:
        raise UsageError(
            f"this is an {checkpoint.config.family} checkpoint: its UNet takes {channels} channels, a picture to work "
            "on among them. Text to picture needs a plain one, which takes 4."
        )


def load_model(args: argparse.Namespace, file, checkpoint: "Checkpoint") -> "StableDiffusion":
    from tqdm import tqdm

    from sd.loading import from_checkpoint
    from sd.runtime import pick_device, pick_precision, precision_name

    try:
        device = pick_device(args.device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--device {args.device}: {error}") from None
    dtype = pick_precision(device, args.precision)
    total = sum(record.nbytes for record in checkpoint.tensors.values())
    with tqdm(
        desc="loading", total=total, unit="B", unit_scale=True, disable=bar_hidden(args.quiet), leave=False
    ) as bar:
        model = from_checkpoint(file, checkpoint, device, dtype, bar.update)
    ema = ""
    if checkpoint.has_ema:
        ema = f" (--weights {'model' if checkpoint.weights == 'ema' else 'ema'} takes the others)"
    say(
        f"{args.model.name}: {checkpoint.config.family}, {checkpoint.weights} weights{ema}, "
        f"{precision_name(dtype)} on {device.type}",
        quiet=args.quiet,
    )
    if checkpoint.unknown:
        some = ", ".join(checkpoint.unknown[:3])
        say(f"left aside: {len(checkpoint.unknown)} tensors that are no part of the model: {some}", quiet=args.quiet)
    return model


def warn_of_cuts(model: "StableDiffusion", jobs: Iterable[Settings]) -> None:
    for text in dict.fromkeys(text for job in jobs for text in (job.prompt, job.negative_prompt)):
        tokenized = model.tokenizer.tokenize(text)
        if tokenized.cut_tokens:
            room = model.tokenizer.context_length - 2
            say(f"the prompt has {room + tokenized.cut_tokens} tokens, {room} fit; cut off: {tokenized.cut!r}")


def make(model: "StableDiffusion", jobs: Sequence[Settings], paths: Sequence[Path], args, started: float):
    """Make and write the pictures, batch by batch; yields each as soon as it is on the disk."""
    from tqdm import tqdm

    from sd.image import save_png
    from sd.pipeline import NonFiniteError

    batches = list(group(jobs, args.batch_size))
    total = sum(batch[0].steps for batch in batches)
    done = 0
    with tqdm(desc="denoising", total=total, unit="step", disable=bar_hidden(args.quiet), leave=False) as bar:
        for batch in batches:
            for latents in model.sample(batch):  # noqa: B007 - the last ones are used below
                bar.update()
            try:
                pictures = model.decode(latents)
            except NonFiniteError as error:
                raise JobError(f"{error}, so there is no picture. Try --precision fp32, or other weights.") from error
            for picture, job in zip(pictures, batch, strict=True):
                save_png(picture, paths[done], model.texts(job), force=args.force)
                yield picture, job, paths[done]
                done += 1


def group(jobs: Sequence[Settings], batch_size: int) -> Iterator[list[Settings]]:
    """Neighbouring jobs that differ in prompts and seeds only, at most batch_size at a time."""
    batch: list[Settings] = []
    for job in jobs:
        alike = batch and job == replace(
            batch[0], prompt=job.prompt, negative_prompt=job.negative_prompt, seed=job.seed
        )
        if batch and (not alike or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(job)
    yield batch


def report(args: argparse.Namespace, event: str, path: Path, **values: object) -> None:
    """A result on stdout."""
    if args.json:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        print(json.dumps({"event": event, "path": str(path), "sha256": sha256, **values}), flush=True)
    else:
        print(path, flush=True)


def write_grid(args: argparse.Namespace, pictures: Sequence, first: Path) -> None:
    from sd.image import contact_sheet, save_png

    path = first.with_name(f"grid-{first.name}")
    save_png(contact_sheet(pictures), path, {}, force=args.force)
    report(args, "grid", path)
