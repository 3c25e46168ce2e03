"""Find the tiny VAE in an open file: taesd_encoder, taesd_decoder, both in one file, or diffusers' AutoencoderTiny."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from convert.checkpoint import fitted
from convert.errors import UnsupportedFileError, WeightMismatchError, counted, shown, shown_list
from convert.families.family import check_complete
from convert.families.recognition import describe
from convert.files.reader import CheckpointFile
from convert.files.records import TensorRecord
from convert.layouts.original_layout import networks_in
from convert.layouts.tiny_vae_names import tiny_vae_parameters
from convert.layouts.wrapping import plain_names, unwrap
from sd.config import TAESD, ModelConfig, TinyVAEConfig

COMPONENT = "tiny_vae"  # of diffusers' folder, as `convert.files.diffusers_folder` calls it
PLACES = {  # half -> what its names begin with, and whether diffusers counts its layers
    "decoder": (("decoder.layers.", True), ("taesd_decoder.", False), ("decoder.", False), ("", False)),
    "encoder": (("encoder.layers.", True), ("taesd_encoder.", False), ("encoder.", False), ("", False)),
}
BESIDE = ("vae_scale", "vae_shift")  # numbers that ComfyUI puts there; they follow from the family
USUAL = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "scaling_factor": 1.0}


@dataclass(frozen=True, kw_only=True)
class TinyVAEFile:
    """The halves that a file has: complete, of the right shapes, not yet read."""

    config: TinyVAEConfig
    halves: tuple[str, ...]  # "encoder", "decoder"
    layout: str  # "original" or "diffusers"
    tensors: dict[str, TensorRecord]  # by our names
    stored_names: dict[str, str]  # ours -> the one in the file


def read_tiny_vae(file: CheckpointFile) -> TinyVAEFile:
    """What a file holds of a tiny VAE. Nothing in it tells the family that it was made for.

    Raises UnsupportedFileError for another kind of file, WeightMismatchError for missing or surplus weights.
    """
    tensors, stored = {}, {}
    inside = unwrap(file.root, networks_in).tensors
    for name, plain in plain_names(inside)[0].items():
        plain = plain.removeprefix(f"{COMPONENT}.")
        tensors[plain], stored[plain] = inside[name], name
    found = {half: place for half in PLACES if (place := _place(half, tensors))}
    if not found:
        raise UnsupportedFileError(_other_kind(tensors))
    check_settings(file.configs.get(COMPONENT, {}))
    ends = {half: _ends(half, prefix, counted_by_them, tensors) for half, (prefix, counted_by_them) in found.items()}
    latents, width = next(iter(ends.values()))
    if any(end != (latents, width) for end in ends.values()):
        raise WeightMismatchError("holds an encoder and a decoder of different sizes, which do not belong together.")
    if latents != TAESD.latent_channels:
        raise UnsupportedFileError(
            f"is a tiny VAE for latents of {latents} channels, as FLUX and Stable Diffusion 3 have them; those of "
            f"Stable Diffusion 1, 2 and XL have {TAESD.latent_channels}. Give a taesd or taesdxl file"
        )
    config = replace(TAESD, width=width)
    names, shapes = {}, {}
    for half, (prefix, counted_by_them) in found.items():
        for parameter in tiny_vae_parameters(config, half):
            theirs = parameter.diffusers if counted_by_them else parameter.original
            names[f"{half}.{parameter.ours}"] = prefix + theirs
            shapes[f"{half}.{parameter.ours}"] = parameter.shape
    check_complete([name for name in names.values() if name not in tensors], len(names))
    if surplus := [stored[name] for name in tensors.keys() - {*names.values(), *BESIDE}]:
        raise WeightMismatchError(
            f"holds {counted(len(surplus), 'weight')} that a tiny VAE has no place for: {shown_list(sorted(surplus))}. "
            "It is another architecture."
        )
    ours = {name: tensors[theirs] for name, theirs in names.items()}
    stored = {name: stored[theirs] for name, theirs in names.items()}
    return TinyVAEFile(
        config=config,
        halves=tuple(found),
        layout="diffusers" if any(by_them for _, by_them in found.values()) else "original",
        tensors=fitted(ours, stored, shapes, "a tiny VAE"),
        stored_names=stored,
    )


def require_decoder(found: TinyVAEFile, model: ModelConfig) -> TinyVAEFile:
    """The same for a model whose latents it is to decode, which tell the scale.

    Raises UnsupportedFileError without a decoder, and for a model with other latents.
    """
    if "decoder" not in found.halves:
        raise UnsupportedFileError(
            "holds only the encoder of a tiny VAE, and pictures are decoded with its other half. Give taesd_decoder, "
            "or taesdxl_decoder for XL"
        )
    if (model.vae.latent_channels, model.vae.factor) != (found.config.latent_channels, found.config.factor):
        raise UnsupportedFileError(
            f"is a tiny VAE for {found.config.latent_channels} channels and {found.config.factor}x"
            f"{found.config.factor} pixels per latent; this model has {model.vae.latent_channels} and "
            f"{model.vae.factor}x{model.vae.factor}. Leave out --tiny-vae"
        )
    from convert.families.table import family_named

    scale = family_named(model.family).config.vae.latent_scale  # a model's own may be one per channel
    return replace(found, config=replace(found.config, latent_scale=scale))


def check_settings(config: Mapping[str, object]) -> None:
    """Refuse settings of AutoencoderTiny that mean another network. Raises UnsupportedFileError."""
    for name, usual in USUAL.items():
        if config.get(name, usual) != usual:
            raise UnsupportedFileError(
                f"is a tiny VAE whose {name} is {shown(str(config[name]), 40)}; only {usual} is supported"
            )


def _place(half: str, tensors: Mapping[str, TensorRecord]) -> tuple[str, bool] | None:
    """Where the names of a half begin in this file, and whether diffusers counts its layers; None if it is not there.

    The decoder's first layer has no weights, so that the original files begin with 1; the encoder's is followed by a
    block.
    """
    for prefix, counted_by_them in PLACES[half]:
        first, block = ("0", "1") if half == "encoder" else ("0", "2") if counted_by_them else ("1", "3")
        if {f"{prefix}{first}.weight", f"{prefix}{block}.conv.0.weight"} <= tensors.keys():
            return prefix, counted_by_them
    return None


def _ends(half: str, prefix: str, counted_by_them: bool, tensors: Mapping[str, TensorRecord]) -> tuple[int, int]:
    """The channels of the latents and of the layers inside, by the convolution at the latents."""
    rows = {parameter.ours: parameter for parameter in tiny_vae_parameters(TAESD, half)}
    row = rows["conv_in.weight" if half == "decoder" else "conv_out.weight"]
    name = prefix + (row.diffusers if counted_by_them else row.original)
    shape = tensors[name].shape if name in tensors else ()
    if len(shape) != 4 or 0 in shape:
        raise WeightMismatchError(f"lacks the convolution {shown(name)}, which tells the size of a tiny VAE.")
    return (shape[1], shape[0]) if half == "decoder" else (shape[0], shape[1])


def _other_kind(tensors: Mapping[str, TensorRecord]) -> str:
    """What a file without a tiny VAE is, in a sentence whose subject is the file."""
    kind = describe({name: record.shape for name, record in tensors.items()})
    advice = "Give it with --vae" if kind.parts == ("VAE",) else "Give taesd_decoder, or taesdxl_decoder for XL"
    what = f" (it holds: {kind.name})" if kind.name != "unknown" else ""
    return f"is not a tiny VAE such as TAESD{what}. {advice}"
