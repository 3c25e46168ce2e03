"""Which layout goes to which target, and the checks before anything is read."""

import os
from dataclasses import replace
from pathlib import Path

from convert.checkpoint import FORMAT, Checkpoint
from convert.errors import CheckpointError
from convert.families.family import ALONE, part_config, recognise
from convert.families.table import family_named
from convert.files.diffusers_folder import component_alone
from convert.files.folder_kinds import INDEX
from convert.layouts.names import OPTIONAL, PREFIXES
from convert.layouts.noise_levels import marking
from convert.layouts.noise_schedule import PREDICTIONS, yaml_of
from convert.layouts.yaml_beside import read_yaml
from sd.files import length_problem, name_problem

LAYOUTS = (FORMAT, "original", "diffusers")
PICKLES = (".ckpt", ".pt")
FILES = (".safetensors", *PICKLES)


class TargetError(ValueError):
    """The request cannot be written."""


class MismatchError(Exception):
    """The written file differs from its source."""


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
        raise TargetError(f"{target} has the name of a file, but the diffusers layout is a folder. Give another name.")
    if suffix in PICKLES and layout not in (None, "original"):
        raise TargetError(f"{target} would be a pickle, which only the original layout can be. Name it .safetensors.")
    if problem := length_problem(target):
        raise TargetError(f"{target} {problem}")
    if not target.absolute().parent.is_dir():
        raise TargetError(f"the folder of {target} does not exist. Make it first.")
    if source.exists() and target.exists() and source.samefile(target):
        raise TargetError(f"{target} is the source itself, which would be lost. Give another name.")
    if layout != "diffusers" and (problem := name_problem(target, force=force)):
        raise (FileExistsError if target.is_file() else TargetError)(f"{target} {problem}")
    if os.path.lexists(target) and layout == "diffusers":
        if Path(os.path.realpath(target)) in Path(os.path.realpath(source)).parents:
            raise TargetError(f"{target} contains the source, which would be lost. Give another name.")
        if not _may_be_replaced(target, part):
            kind = f"a {ALONE[part]} alone" if part else "a diffusers model"
            raise TargetError(f"{target} is not a folder with {kind}, so it is not replaced. Give another name.")
        if not force:
            raise FileExistsError(f"{target} exists already. Give another name, or --force to replace it.")


def _may_be_replaced(folder: Path, part: str | None) -> bool:
    """Whether a folder already holds what is to be written there."""
    if not part:
        return (folder / INDEX).is_file()
    try:
        return component_alone(folder) == part
    except CheckpointError:
        return False


def layout_of(target: Path, layout: str | None, source_layout: str) -> str:
    """The layout to write: as requested; else the original one for a pickle and for a source of ours, else ours."""
    if layout is None and target.suffix.lower() in PICKLES:
        return "original"
    return layout or ("original" if source_layout == FORMAT else FORMAT)


def check_extras(checkpoint: Checkpoint, layout: str, weights: str) -> None:
    """Raises TargetError if the layout cannot keep the tensors beside a model."""
    if not checkpoint.extras:
        return
    if layout == "diffusers":
        raise TargetError("the diffusers layout cannot keep the tensors beside the model. Leave out --keep-all.")
    if layout == "original" and weights != "auto":
        raise TargetError(
            "the original layout keeps both kinds of weights, so there is nothing to choose. Leave out --weights or "
            "--keep-all."
        )


def check_prediction(target: Path, checkpoint: Checkpoint) -> None:
    """Raises TargetError where the original layout cannot tell what the model predicts."""
    if checkpoint.config.prediction == "x0" and target.suffix.lower() in PICKLES:
        raise TargetError(
            f"a {target.suffix} in the original layout cannot say that the UNet predicts x0. Write a .safetensors, "
            "whose metadata say so, or use --to diffusers."
        )


def check_yaml_beside(target: Path, checkpoint: Checkpoint) -> None:
    """Raises TargetError where readers would take what the model predicts from a .yaml that says something else."""
    path, prediction = yaml_of(target), checkpoint.config.prediction
    beside = path and read_yaml(path, PREDICTIONS)
    if beside and checkpoint.part in (None, "unet") and beside.prediction not in ("", prediction):
        raise TargetError(
            f"{beside.name} is there already and says {beside.prediction}, but this model predicts {prediction}: "
            f"{target.name} would be read wrongly. Give another name, or remove {beside.name}."
        )


def check_original_has_room(checkpoint: Checkpoint) -> None:
    """The original layout stores little but shapes. Raises TargetError if they do not determine the model."""
    ours, part = checkpoint.config, checkpoint.part
    shapes = {checkpoint.names[name].name: record.shape for name, record in checkpoint.tensors.items()}
    if part:
        inside = {name.removeprefix((PREFIXES | OPTIONAL)[part]): shape for name, shape in shapes.items()}
        told = part_config(part, inside, family_named(ours.family).config)
    else:
        told = recognise(shapes, ours.family)
    if marking(ours):  # a few tensors say the rest
        told = replace(told, schedule=ours.schedule, vae=ours.vae)
    for where, what, found, usual in (
        ("unet", "the noise schedule", ours.schedule, told.schedule),
        ("vae", "the latent scale", ours.vae.latent_scale, told.vae.latent_scale),
        ("vae", "the means of the latents", ours.vae.latent_means, told.vae.latent_means),
        ("unet", "the UNet's heads", ours.unet.heads, told.unet.heads),
        ("text_encoder", "the text encoder's heads", ours.text_encoder.heads, told.text_encoder.heads),
        ("depth_network", "the depth network's heads, groups and taps", ours.depth, told.depth),
        ("text_encoder", "the text encoder's activation", ours.text_encoder.activation, told.text_encoder.activation),
    ):
        if part in (None, where) and found != usual:
            raise TargetError(
                f"the original layout cannot store {what}: {found}, where readers assume {usual}. "
                "Use --to sd-zoo or --to diffusers."
            )
