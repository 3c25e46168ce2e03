"""A model with the VAE of another file, read as one file: nothing is copied until it is written."""

from dataclasses import replace

from convert.checkpoint import FORMAT, Checkpoint, read_checkpoint
from convert.errors import WeightMismatchError
from convert.files.reader import CheckpointFile, JoinedFiles, errors_named
from convert.single_part import read_part
from sd.config import SD_V1


def read_with_vae(
    file: CheckpointFile, other: CheckpointFile, *, weights: str = "auto"
) -> tuple[JoinedFiles, Checkpoint]:
    """The model of one file with the VAE of the other, and the file to read both from.

    weights  as in `read_checkpoint`

    The model need not have a VAE of its own. Its latent scale stays, because its UNet was trained with it. Raises
    CheckpointError, with the name of the other file if the fault is there.
    """
    with errors_named(other):
        vae = read_part(other, "vae")
    joined = JoinedFiles(file, other)
    shifted = {ours: joined.of_second(record) for ours, record in vae.tensors.items()}
    checkpoint = read_checkpoint(joined, weights=weights, vae=replace(vae, tensors=shifted))
    with errors_named(other):
        _check_latents(checkpoint, vae, states_scale=other.metadata.get("format") == FORMAT or bool(other.configs))
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
    if states_scale and found.latent_scale != own.latent_scale:
        raise WeightMismatchError(
            f"has a VAE with the latent scale {found.latent_scale}; the model was trained with another kind "
            f"of VAE, whose scale is {own.latent_scale}."
        )
