"""What can be written where: the layouts, and what is refused before anything is read for it."""

from pathlib import Path

from convert.checkpoint import FORMAT, Checkpoint
from convert.diffusers_folder import INDEX
from convert.family import recognise

LAYOUTS = (FORMAT, "original", "diffusers")
PICKLES = (".ckpt", ".pt")
FILES = (".safetensors", *PICKLES)


class TargetError(ValueError):
    """What was asked for cannot be written."""


def check_target(source: Path, target: Path, layout: str | None, force: bool) -> None:
    """Raises TargetError or FileExistsError for a target that cannot or should not be written."""
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
        if not (target / INDEX).is_file():
            raise TargetError(
                f"{target} is no folder with a diffusers model, so it is not replaced. Give another name."
            )


def layout_of(target: Path, layout: str | None, source_layout: str) -> str:
    """The layout to write: the one asked for, that of a pickle, or else the one that the source has not."""
    if layout is None and target.suffix.lower() in PICKLES:
        return "original"
    return layout or ("original" if source_layout == FORMAT else FORMAT)


def check_original_has_room(checkpoint: Checkpoint) -> None:
    """In the original layout nothing but the shapes tells what a model is. Raises TargetError if that is not enough."""
    ours = checkpoint.config
    shapes = {checkpoint.names[name].name: record.shape for name, record in checkpoint.tensors.items()}
    told = recognise(shapes)
    for what, found, usual in (
        ("what the UNet predicts", ours.prediction, told.prediction),
        ("the noise schedule", ours.schedule, told.schedule),
        ("the latent scale", ours.vae.latent_scale, told.vae.latent_scale),
        ("the UNet's heads", ours.unet.heads, told.unet.heads),
        ("the text encoder's heads", ours.text_encoder.heads, told.text_encoder.heads),
        ("the text encoder's activation", ours.text_encoder.activation, told.text_encoder.activation),
    ):
        if found != usual:
            raise TargetError(
                f"the original layout has no place for {what}: {found}, where whoever reads it expects {usual}. "
                "Use --to sd-zoo or --to diffusers."
            )
