"""From the flags of a command that makes pictures to a request."""

import argparse
import secrets
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from convert.errors import shown
from convert.families.table import row_named
from sd.app.cli import say
from sd.app.cli.batch_files import read_batch_file, seed_of_file
from sd.app.cli.like import given_flags
from sd.app.cli.prompt_files import read_prompt
from sd.app.errors import UsageError
from sd.app.jobs.expanding import Expansion
from sd.app.jobs.model_folder import find, find_again, folders, has_hash
from sd.app.jobs.prompt_choices import Wildcards
from sd.app.jobs.request import JobRequest, Line, ModelRequest
from sd.files import embedded_model
from sd.pipeline.image.input_settings import InputSettings
from sd.pipeline.settings import DEFAULT_SWITCH, Settings


def request_of(args: argparse.Namespace, task: str) -> JobRequest:
    """The request that the flags of a command mean. Raises UsageError where there is no model, or not one prompt."""
    model = model_of(args)  # first: a refiner brings settings of its own
    is_batch_file, settings = args.from_file is not None, settings_of(args)
    lines = read_lines(args)
    count = count_of(args, 1 if is_batch_file or args.choices == "all" else args.batch_size)
    if expansion := expansion_of(args, settings, count):
        if not is_batch_file and expansion.mode == "random":
            settings = {**settings, "seed": expansion.seed}
            if args.seed in (None, -1):
                say(f"seed {expansion.seed}", quiet=args.quiet)
        lines, count = expansion.expanded(lines), expansion.pictures_of_a_line
    return job_of(args, task, model=model, lines=lines, settings=settings, count=count, is_batch_file=is_batch_file)


def job_of(args: argparse.Namespace, task: str, **own: object) -> JobRequest:
    """The request that the flags mean, with these fields of its own."""
    inputs = None if task == "text to picture" else InputSettings(**given(args, InputSettings))
    others = {"inputs": inputs, **own}
    return JobRequest(task=task, **{**given(args, JobRequest), **others})


def expansion_of(args: argparse.Namespace, settings: Mapping[str, object], count: int) -> Expansion | None:
    """What --choices asks for. Without --seed, what is drawn for a file of prompts follows from the file.

    settings, count  of all lines
    """
    if args.choices is None:
        if args.wildcards is not None:
            raise UsageError("--wildcards does nothing without --choices. Give --choices all or --choices random.")
        return None
    seed = args.seed
    if seed in (None, -1):
        seed = secrets.randbits(32) if args.from_file is None else seed_of_file(args.from_file)
    return Expansion(args.choices, seed, Wildcards(args.wildcards), settings, count)


def count_of(args: argparse.Namespace, batch: int) -> int:
    """How many pictures of each prompt. batch: how many a batch of --n_iter has. Raises UsageError."""
    if args.count is not None and args.n_iter is not None:
        raise UsageError("--count is the number of pictures, --n_iter that of batches. Give only one of them.")
    return (args.n_iter or 1) * batch if args.count is None else args.count


def given(args: argparse.Namespace, kind: type) -> dict[str, object]:
    """The fields of this dataclass that have flags of the same name, where they are not left to the default."""
    values = {field.name: getattr(args, field.name, None) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


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
    """The model that the flags name, or that the picture of --like was made with; else the embedded one."""
    like, made = args.like.name if getattr(args, "like", None) else "", {}
    if like and isinstance(args.made_with.get("model"), dict):
        made = args.made_with["model"]
    if args.model is not None:
        file = find(args.model)
    else:
        file = (find_again(made, say) if made else None) or embedded_model()
        if not file.exists():
            raise UsageError("no model given. Give a checkpoint with -m FILE; the README says where to get one.")
        row = row_named(args.made_with.get("family")) if made else None
        if row and row.config.unet.vector_width and file == embedded_model():  # its settings would not fit
            raise UsageError(
                f"{like} was made with {shown(str(made.get('name')))}, a {row.title} checkpoint that is not in your "
                "models folder. Give it with -m FILE."
            )
        if made and file != embedded_model():
            say(f"{like} was made with {made.get('name', 'this model')}: using {file}", quiet=args.quiet)
    same = made and (made.get("name") in (file.stem, file.name) or (args.model is None and file != embedded_model()))
    again = told_of(made, file) if same else {}
    request = {**again, **given(args, ModelRequest)}
    if args.prediction == "auto":
        request["prediction"] = again.get("prediction", "auto")
    if args.vae:
        request["vae"] = find(args.vae, "vae")
    if getattr(args, "tiny_vae", None):
        request["tiny_vae"] = find(args.tiny_vae, "vae")
    request["refiner"] = refiner_of(args, file)
    request["embeddings"] = tuple(find(place, "embeddings") for place in getattr(args, "embeddings", ()))
    return ModelRequest(**{**request, "file": file, "like": like})


def refiner_of(args: argparse.Namespace, model: Path) -> Path | None:
    """The refiner that the flags name, or that the picture of --like was made with."""
    made = args.made_with.get("refiner") if getattr(args, "like", None) else None
    if getattr(args, "refiner", None) is not None:
        if args.switch_at is None:
            args.switch_at = DEFAULT_SWITCH
        return find(args.refiner)
    if not isinstance(made, dict) or getattr(args, "switch_at", None) is None:
        return None
    from convert.files.hashing import file_sha256

    name = Path(str(made.get("name"))).name
    places = (place / f"{name}{suffix}" for place in (Path(), model.parent) for suffix in (".safetensors", ".ckpt", ""))
    again = (path for path in places if path.exists() and has_hash(path, made, file_sha256) is not False)
    found = next(again, None) or find_again(made, say)
    if found is None:
        say(f"{args.like.name} was made with the refiner {name}: give it with --refiner FILE. Now made without it.")
        for setting in {"switch_at", "switch_by", "aesthetic_score", "negative_aesthetic_score"} - given_flags(args):
            setattr(args, setting, None)
    return found


def told_of(made: Mapping[str, object], file: Path) -> dict[str, object]:
    """What a picture notes of its model that is not in the model's file: what it predicts, and other VAEs if found."""
    again = {"prediction": made["prediction"]} if made.get("prediction") in ("eps", "v", "x0") else {}
    for part in ("vae", "tiny_vae"):
        vae = made.get(part)
        name = Path(str(vae.get("name"))).name if isinstance(vae, dict) else ""
        places = (place / name for place in (Path(), file.parent, *folders("vae")) if name)
        if found := next((place for place in places if place.exists()), None):
            again[part] = found
    return again


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """The settings that flags give to every picture; a flag that is absent leaves the default to `Settings`."""
    return {name: value for name, value in given(args, Settings).items() if name != "prompt"}
