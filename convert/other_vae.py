"""Open a model, also with the VAE of another file as if both were one: nothing is copied until it is written."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from convert.checkpoint import FORMAT, Checkpoint, match_shapes, read_checkpoint
from convert.errors import WeightMismatchError
from convert.files.reader import CheckpointFile, JoinedFiles, errors_named, open_checkpoint
from convert.layouts.names import PREFIXES, parameter_shapes
from convert.layouts.original_layout import find_tensors
from convert.single_part import only, read_part
from sd.config import SD_V1


@contextmanager
def opened_model(
    path: str | os.PathLike,
    weights: str = "auto",
    prediction: str = "auto",
    variant: str | None = None,
    vae: str | os.PathLike | None = None,
) -> Iterator[tuple[CheckpointFile, Checkpoint]]:
    """An open file or folder, and the model in it.

    weights, prediction  as in `read_checkpoint`
    variant              as in `open_checkpoint`
    vae                  a file or folder whose VAE is used instead of the model's own

    Raises CheckpointError, with the name of the file that the fault is in.
    """
    with ExitStack() as stack:
        other = stack.enter_context(open_checkpoint(vae)) if vae else None
        file = stack.enter_context(open_checkpoint(path, variant=variant))
        if not other:
            yield file, read_checkpoint(file, weights=weights, prediction=prediction)
            return
        joined, checkpoint = read_with_vae(file, other, weights=weights, prediction=prediction)
        with errors_named(joined):
            yield joined, checkpoint


def read_with_vae(
    file: CheckpointFile, other: CheckpointFile, *, weights: str = "auto", prediction: str = "auto"
) -> tuple[JoinedFiles, Checkpoint]:
    """The model of one file with the VAE of the other, and the file to read both from.

    weights, prediction  as in `read_checkpoint`

    The model need not have a VAE of its own. Its latent scale stays, because its UNet was trained with it. Raises
    CheckpointError, with the name of the other file if the fault is there.
    """
    with errors_named(other):
        vae = read_part(other, "vae")
    joined = JoinedFiles(file, other)
    shifted = {ours: joined.of_second(record) for ours, record in vae.tensors.items()}
    checkpoint = read_checkpoint(joined, weights=weights, prediction=prediction, vae=replace(vae, tensors=shifted))
    with errors_named(other):
        whole = any(name.startswith(PREFIXES["unet"]) for name in find_tensors(other).tensors)  # which tells the family
        states_scale = whole or other.metadata.get("format") == FORMAT or bool(other.configs)
        _check_latents(checkpoint, vae, states_scale=states_scale)
        match_shapes(only(checkpoint, "vae"), parameter_shapes(checkpoint.config))
    return joined, checkpoint


def _check_latents(checkpoint: Checkpoint, vae: Checkpoint, *, states_scale: bool) -> None:
    """A VAE for other latents would load without an error and give noise. Raises WeightMismatchError."""
    unet, found, own = checkpoint.config.unet, vae.config.vae, checkpoint.config.vae
    if found.latent_channels != unet.out_channels:
        raise WeightMismatchError(
            f"has a VAE for latents of {found.latent_channels} channels; the UNet of the model makes "
            f"{unet.out_channels}."
        )
    if found.factor != SD_V1.vae.factor:
        raise WeightMismatchError(
            f"has a VAE with {found.factor}x{found.factor} pixels per latent; an "
            f"{checkpoint.config.family} model needs {SD_V1.vae.factor}x{SD_V1.vae.factor}."
        )
    if states_scale and found.latent_scale != own.latent_scale and not own.latent_means:
        raise WeightMismatchError(
            f"has a VAE with the latent scale {found.latent_scale}; the model was trained with another kind "
            f"of VAE, whose scale is {own.latent_scale}."
        )
