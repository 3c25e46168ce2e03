"""`--like picture.png`: the settings of a picture, ours or another tool's, in place of the flags' defaults."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from sd.app.errors import UsageError
from sd.app.jobs.stored import read

if TYPE_CHECKING:
    pass

NO_EFFECT = {
    "strength": 1.0,
    "hires": None,
    "hires_steps": None,
    "hires_upscale": "latent",
    "hires_strength": 0.7,
    "exact_steps": False,
    "lora": [],
    "invert_depth": False,
    "prompt_2": "",
    "negative_prompt_2": "",
    "original_size": (),
    "crop": (),
    "aesthetic_score": 6.0,
    "negative_aesthetic_score": 2.5,
    "switch_at": None,
    "switch_by": "time",
}
REPLACES = {  # a flag on the command line -> settings of the picture that do not go with it
    **{flag: {"prompt", "prompt_2"} for flag in ("prompt", "prompt_flag", "prompt_file", "from_file")},
    "negative_prompt": {"negative_prompt_2"},
    "lora": {"lora"},
    "switch_at": {"switch_by"},
    "sampler": {"schedule", "eta", "discard_penultimate"},
    "schedule": {"sigmas"},
    "steps": {"sigmas"},
    "sigmas": {"steps", "schedule", "discard_penultimate"},
    "mask": {"expand"},
    "hires": {"hires_steps"},
    "hires_strength": {"hires_steps"},
}


def apply_like(args: argparse.Namespace, on_read: Callable[[str], object]) -> tuple[list[str], list[str]]:
    """Set the arguments to the settings of the picture; flags on the command line take precedence.

    on_read  called with a sentence before files are read to find an adapter by its hash

    Returns the settings that could not be used, and what else is worth knowing. Raises UsageError or PictureError if
    the picture has none.
    """
    from convert.families.table import row_named
    from sd.pipeline.image.stored_settings.other_programs import NoSettings

    try:
        stored = read(args.like)[0]
    except NoSettings as error:
        raise UsageError(f"--like {args.like} {error} Give the prompt and the settings yourself.") from None
    found, unused, made_with = stored.settings, stored.unused, stored.made_with
    given = given_flags(args)
    notes = [] if "rng" in given else stored.notes
    if found.get("sigmas"):
        for name in ("steps", "schedule"):
            found.pop(name, None)  # they follow from the noise levels
    for flag in given & set(REPLACES):
        for name in REPLACES[flag]:
            found.pop(name, None)
    from sd.app.jobs.adapter_folder import use_again

    missing, called = use_again(found, made_with, on_read)  # those of what is still wanted
    unused, notes = [*missing, *unused], [*notes, *called]
    known = vars(args)
    for name, value in found.items():
        if name in given:
            continue
        if name in known:
            setattr(args, name, value)
        elif value != NO_EFFECT.get(name):
            unused.append(f"{name.replace('_', ' ')} {value}")
    if "init" not in known and isinstance(made_with.get("init"), dict):
        unused.append(f"init {made_with['init'].get('name')}")
    if getattr(args, "depth", None) is None and isinstance(made_with.get("depth"), dict):
        unused.append(f"depth {made_with['depth'].get('name')}")
    for label, name in {"Sampler": "sampler", "Schedule type": "schedule"}.items():
        if name not in given and any(part.startswith(f"{label}: ") for part in unused):
            notes = [*notes, f"the default {name} is used instead; expect another picture"]
    model = made_with.get("model")
    row = row_named(made_with.get("family"))
    other = "model" if row and row.averaged else "ema"  # than auto means
    if isinstance(model, dict) and model.get("weights") == other and "weights" not in given:
        args.weights = other
    args.made_with = made_with
    return unused, notes


def given_flags(args: argparse.Namespace) -> set[str]:
    """Which settings the command line sets itself."""
    defaults = [(action, action.default) for action in args.parser._actions]
    for action, _ in defaults:
        action.default = argparse.SUPPRESS
    try:
        return set(vars(args.parser.parse_args(args.given)))
    finally:
        for action, default in defaults:
            action.default = default
