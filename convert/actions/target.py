"""What can be written where: the layouts, and what is refused before anything is read for it."""

from dataclasses import replace
from pathlib import Path

from convert.checkpoint import FORMAT, Checkpoint
from convert.errors import CheckpointError
from convert.families.family import PARTS, part_config, recognise
from convert.files.diffusers_folder import INDEX, component_alone
from convert.layouts.names import PREFIXES

LAYOUTS = (FORMAT, "original", "diffusers")
PICKLES = (".ckpt", ".pt")
FILES = (".safetensors", *PICKLES)


class TargetError(ValueError):
    """What was asked for cannot be written."""


class MismatchError(Exception):
    """What was written is not what it was written from."""


def check_target(source: Path, target: Path, layout: str | None, part: str | None, force: bool) -> None:
    """Raises TargetError or FileExistsError for a target that cannot or should not be written.

    part  the one that is written alone, if there is one
    """
    suffix = target.suffix.lower()
    if layout is not None and layout not in LAYOUTS:
        raise TargetError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout != "diffusers" and suffix not in FILES:
        raise TargetError(f"{target} must end in .safetensors, .ckpt or .pt; for a folder, ask for --to diffusers.")
    if layout == "diffusers" and suffix in FILES:
        raise TargetError(f"{target} has the name of a file, but diffusers' layout is a folder. Give another name.")
    if suffix in PICKLES and layout not in (None, "original"):
        raise TargetError(f"{target} would be a pickle, which only the original layout is. Name it .safetensors.")
    if not target.absolute().parent.is_dir():
        raise TargetError(f"the folder of {target} does not exist. Make it first.")
    if source.exists() and target.exists() and source.samefile(target):
        raise TargetError(f"{target} is the source itself, which would be lost. Give another name.")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already. Give another name, or --force to replace it.")
    if target.is_dir() and layout != "diffusers":
        raise TargetError(f"{target} is a folder. Give another name.")
    if target.exists() and layout == "diffusers":
        if target.resolve() in source.resolve().parents:
            raise TargetError(f"{target} has the source in it, which would be lost. Give another name.")
        if not _may_be_replaced(target, part):
            kind = f"a {PARTS[part]} alone" if part else "a diffusers model"
            raise TargetError(f"{target} is no folder with {kind}, so it is not replaced. Give another name.")


def _may_be_replaced(folder: Path, part: str | None) -> bool:
    """Whether what is in a folder is what is to be written there."""
    if not part:
        return (folder / INDEX).is_file()
    try:
        return component_alone(folder) == part
    except CheckpointError:
        return False


def layout_of(target: Path, layout: str | None, source_layout: str) -> str:
    """The layout to write: the one asked for, that of a pickle, or else the one that the source has not."""
    if layout is None and target.suffix.lower() in PICKLES:
        return "original"
    return layout or ("original" if source_layout == FORMAT else FORMAT)


def check_extras(checkpoint: Checkpoint, layout: str, weights: str) -> None:
    """Raises TargetError if what lies beside a model cannot be kept in the layout."""
    if not checkpoint.extras:
        return
    if layout == "diffusers":
        raise TargetError("diffusers' layout has no place for what lies beside the model. Leave --keep-all out.")
    if layout == "original" and weights != "auto":
        raise TargetError(
            "the original layout keeps both kinds of weights, each in its place, so there is nothing to choose. Leave "
            "--weights out, or --keep-all."
        )


def check_original_has_room(checkpoint: Checkpoint) -> None:
    """In the original layout little but the shapes tells what a model is. Raises TargetError if that is not enough."""
    ours, part = checkpoint.config, checkpoint.part
    shapes = {checkpoint.names[name].name: record.shape for name, record in checkpoint.tensors.items()}
    if part:
        told = part_config(part, {name.removeprefix(PREFIXES[part]): shape for name, shape in shapes.items()})
    else:
        told = recognise(shapes)
        told = told if ours.prediction == "eps" else replace(told, prediction="v")  # a marker tells of it
    for where, what, found, usual in (
        ("unet", "what the UNet predicts", ours.prediction, told.prediction),
        ("unet", "the noise schedule", ours.schedule, told.schedule),
        ("vae", "the latent scale", ours.vae.latent_scale, told.vae.latent_scale),
        ("unet", "the UNet's heads", ours.unet.heads, told.unet.heads),
        ("text_encoder", "the text encoder's heads", ours.text_encoder.heads, told.text_encoder.heads),
        ("text_encoder", "the text encoder's activation", ours.text_encoder.activation, told.text_encoder.activation),
    ):
        if part in (None, where) and found != usual:
            raise TargetError(
                f"the original layout has no place for {what}: {found}, where whoever reads it expects {usual}. "
                "Use --to sd-zoo or --to diffusers."
            )
