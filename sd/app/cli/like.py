"""`--like picture.png`: the settings of a picture, ours or another tool's, in place of the flags' defaults."""

import argparse
from pathlib import Path

from sd.app.cli.flags import Parser, say
from sd.app.errors import UsageError
from sd.pipeline.image.input_settings import SIDES
from sd.pipeline.settings import FIELDS, OF_THE_RUN, Settings

OF_THE_MASK = ("resize_mode", "invert_mask", "mask_threshold", "mask_blur", "only_masked", "mask_padding", "expand",
               "overlap")  # fmt: skip
OF_NO_MEANING = {"strength": 1.0, "hires": None, "hires_steps": None, "hires_upscale": "latent", "hires_strength": 0.7}
PROMPTS = {"prompt", "prompt_flag", "prompt_file", "from_file"}
# What a flag leaves no meaning to, where it is given beside the picture.
REPLACES = {
    "sampler": {"schedule", "eta"},
    "schedule": {"sigmas"},
    "steps": {"sigmas"},
    "sigmas": {"steps", "schedule"},
    "mask": {"expand"},
    "hires": {"hires_steps"},
    "hires_strength": {"hires_steps"},
}


def applied(args: argparse.Namespace, parser: Parser) -> argparse.Namespace:
    """The arguments with the settings of the picture that --like names, where the command line says nothing else.

    What cannot be used of it is told in one line. Raises UsageError or PictureError where it says nothing at all.
    """
    if args.like is None:
        return args
    found, unused, made_with = read(args.like)
    given = given_flags(args.given, parser)
    if given & PROMPTS:
        found.pop("prompt", None)
    if found.get("sigmas"):
        for name in ("steps", "schedule"):
            found.pop(name, None)  # they follow from the noise levels
    for flag in given & set(REPLACES):
        for name in REPLACES[flag]:
            found.pop(name, None)
    known = vars(args)
    for name, value in found.items():
        if name in given:
            continue
        if name in known:
            setattr(args, name, value)
        elif value != OF_NO_MEANING.get(name):
            unused.append(f"{name.replace('_', ' ')} {value}")
    if "init" not in known and isinstance(made_with.get("init"), dict):
        unused.append(f"init {made_with['init'].get('name')}")
    model = made_with.get("model")
    if isinstance(model, dict) and model.get("weights") == "ema" and "weights" not in given:
        args.weights = "ema"
    args.made_with = made_with
    if unused:
        say(f"{args.like.name}: could not use {'; '.join(unused)}")
    return args


def given_flags(given: list[str], parser: Parser) -> set[str]:
    """Which settings the words of a command line set."""
    defaults = [(action, action.default) for action in parser._actions]
    for action, _ in defaults:
        action.default = argparse.SUPPRESS
    try:
        return set(vars(parser.parse_args(given)))
    finally:
        for action, default in defaults:
            action.default = default


def read(path: Path) -> tuple[dict, list[str], dict]:
    """Settings by our names, what could not be used, and what is known of the model and the device."""
    from sd.pipeline.image.metadata import exact_in, read_foreign_texts, settings_from
    from sd.pipeline.image.parameters import settings_in

    texts = read_foreign_texts(path)
    exact = exact_in(texts)
    settings = settings_from(exact)
    if settings is not None:
        if "init" in exact and "Resize mode: " not in texts.get("parameters", ""):
            # nobody had asked for a size: it followed from the picture, and does so again
            exact = {name: value for name, value in exact.items() if name not in ("width", "height")}
        return *from_exact(settings, exact), {name: exact[name] for name in (*OF_THE_RUN, "init") if name in exact}
    text = texts.get("parameters", "")
    if not text.strip() or text.lstrip().startswith("{"):
        raise UsageError(
            f"--like {path} carries no settings that are read here: neither ours nor a text as the common web UI "
            "writes it. Pictures lose such texts when they are edited or sent."
        )
    found = settings_in(text)
    return found.settings, found.unused, {}


def from_exact(settings: Settings, exact: dict) -> tuple[dict, list[str]]:
    """The settings of a picture of ours, and those of its mask; the picture that it began with must be given again."""
    found = {name: value for name, value in settings.to_dict().items() if name in exact}
    found |= {name: exact[name] for name in OF_THE_MASK if isinstance(exact.get(name), str | int | float)}
    if found.get("expand") and not any(side in found["expand"] for side in SIDES):
        del found["expand"]
    others = [name for name in exact if name not in {*FIELDS, *OF_THE_RUN, *OF_THE_MASK, "init", "mask"}]
    return found, others
