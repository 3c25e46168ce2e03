"""From the flags of a command that makes pictures to a request, and from there to files."""

import argparse
from typing import TYPE_CHECKING

from sd.app.cli.prompt_files import read_batch_file, read_prompt
from sd.app.cli.terminal import Terminal
from sd.app.errors import UsageError
from sd.app.jobs.request import JobRequest, Line, ModelRequest
from sd.files import embedded_model
from sd.pipeline.settings import FIELDS

if TYPE_CHECKING:
    from sd.pipeline.image.input_settings import InputSettings


def run(args: argparse.Namespace, task: str, inputs: "InputSettings | None" = None) -> int:
    """Make the pictures that the flags ask for.

    task    "text to picture", "image to image" or "inpainting"
    inputs  how --init and --mask are prepared
    """
    from sd.app.jobs.run import make_pictures

    make_pictures(request_of(args, task, inputs), Terminal(quiet=args.quiet, as_json=args.json))
    return 0


def request_of(args: argparse.Namespace, task: str, inputs: "InputSettings | None" = None) -> JobRequest:
    """The request that the flags of a command mean. Raises UsageError where there is no model, or not one prompt."""
    is_batch_file = args.from_file is not None
    pictures = {"init": args.init, "mask": getattr(args, "mask", None), "inputs": inputs} if inputs else {}
    return JobRequest(
        task=task,
        model=model_of(args),
        lines=read_lines(args),
        settings=settings_of(args),
        count=args.count if is_batch_file else args.count * args.batch_size,
        batch_size=args.batch_size,
        is_batch_file=is_batch_file,
        out=args.out,
        force=args.force,
        grid=args.grid,
        grid_columns=args.grid_columns,
        save_steps=args.save_steps,
        save_steps_as=args.save_steps_as,
        **pictures,
    )


def read_lines(args: argparse.Namespace) -> tuple[Line, ...]:
    """The one prompt that is given, or all lines of --from-file. Raises UsageError."""
    from_file = getattr(args, "from_file", None)
    sources = [given for given in (args.prompt, args.prompt_flag, args.prompt_file, from_file) if given is not None]
    if len(sources) != 1:
        flags = "PROMPT, --prompt, --prompt-file and --from-file"
        problem = "no prompt given" if not sources else f"more than one of {flags} given"
        raise UsageError(f'{problem}. Example: sd txt2img "a horse" -m model.ckpt.')
    if from_file is not None:
        return read_batch_file(from_file, args.parser)
    return (Line({"prompt": sources[0] if args.prompt_file is None else read_prompt(args.prompt_file)}),)


def model_of(args: argparse.Namespace) -> ModelRequest:
    """The model that the flags name; without -m, the embedded one, if it is installed."""
    file = embedded_model() if args.model is None else args.model
    if args.model is None and not file.exists():
        raise UsageError("no model given. Give a checkpoint with -m FILE; the README says where to get one.")
    return ModelRequest(
        file=file,
        weights=args.weights,
        device=args.device,
        precision=args.precision,
        low_memory=args.low_memory,
        tiled_vae=args.tiled_vae,
        compile=getattr(args, "compile", False),
        like=args.like.name if getattr(args, "like", None) else "",
        made_with=getattr(args, "made_with", {}),
    )


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """The settings that flags give to every picture; a flag that is absent leaves the default to `Settings`."""
    given = {name: getattr(args, name, None) for name in FIELDS if name != "prompt"}
    return {name: value for name, value in given.items() if value is not None}
