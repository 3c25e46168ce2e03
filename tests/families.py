"""Made-up models of the families that are recognised but not run: every name of a real file, at any width.

The names come from our own tables at the sizes of each family's original config; what else a family has is listed here.
At full width their numbers of tensors and of parameters are those of the published files (`test_families`).
"""

from dataclasses import replace
from functools import cache

from convert.layouts.names import PREFIXES, Original, original_names
from sd.config import SD_V1, SD_V2, SDXL, SDXL_REFINER, ModelConfig, UNetConfig
from sd.networks.build import build_networks, parameter_shapes

Shapes = dict[str, tuple[int, ...]]
UNET = PREFIXES["unet"]

UPSCALER_UNET = replace(SD_V2.unet, in_channels=7, width=256, multipliers=(1, 2, 2, 4), depths=(0, 1, 1, 1))


def unet_shapes(config: UNetConfig, width: int | None = None, *, label: int = 0) -> Shapes:
    """A UNet under its original names; `label`: the width of what it is told beside the text."""
    config = replace(config, width=width or config.width)
    shapes = {name: shape[:2] if "proj_" in name else shape for name, shape in part_shapes(config, "unet").items()}
    hidden = 4 * config.width
    if label:
        shapes |= linear(f"{UNET}label_emb.0.0", hidden, label) | linear(f"{UNET}label_emb.0.2", hidden, hidden)
    return shapes


@cache
def part_shapes(unet: UNetConfig, part: str, width: int | None = None) -> Shapes:
    config = replace(SD_V1, unet=unet, vae=replace(SD_V1.vae, width=width or SD_V1.vae.width))
    names: dict[str, Original] = original_names(config)
    shapes = parameter_shapes(build_networks(config))
    return {
        names[ours].name: shape + (1,) * names[ours].unit_axes
        for ours, shape in shapes.items()
        if ours.startswith(f"{part}.")
    }


def vae_shapes(width: int | None = None) -> Shapes:
    return part_shapes(replace(SD_V1.unet, width=32), "vae", width)


@cache
def v1_text_shapes(prefix: str, config: ModelConfig = SD_V1) -> Shapes:
    """CLIP ViT-L's text encoder under another prefix."""
    shapes = parameter_shapes(build_networks(replace(config, unet=replace(config.unet, width=32))))
    names = original_names(config)
    return {
        prefix + names[ours].name.removeprefix(PREFIXES["text_encoder"]): shape
        for ours, shape in shapes.items()
        if ours.startswith("text_encoder.")
    }


def open_clip_shapes(prefix: str, layers: int, width: int) -> Shapes:
    """The text side of an OpenCLIP model."""
    shapes: Shapes = {
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "logit_scale": (),
        "token_embedding.weight": (49408, width),
    } | norm("ln_final", width)
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}."
        shapes |= norm(f"{block}ln_1", width) | norm(f"{block}ln_2", width)
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{block}attn.out_proj", width, width)
        shapes |= linear(f"{block}mlp.c_fc", 4 * width, width) | linear(f"{block}mlp.c_proj", width, 4 * width)
    return {prefix + name: shape for name, shape in shapes.items()}


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def v2(*, unet: UNetConfig = SD_V2.unet, width: int | None = None, text_width: int = 1024, label: int = 0) -> Shapes:
    """Version 2 and its relatives. `width`: of the first level of UNet and VAE, that of the family if left out."""
    text = open_clip_shapes("cond_stage_model.model.", 24, text_width)
    return unet_shapes(unet, width, label=label) | vae_shapes(width) | text


def xl(*, width: int | None = None, text_widths: tuple[int, int] = (768, 1280)) -> Shapes:
    first, second = text_widths
    clip = replace(
        SD_V1,
        text_encoder=replace(SD_V1.text_encoder, width=first, hidden_width=4 * first, heads=1),
    )
    return (
        unet_shapes(SDXL.unet, width, label=2816)
        | vae_shapes(width)
        | v1_text_shapes("conditioner.embedders.0.transformer.text_model.", clip)
        | open_clip_shapes("conditioner.embedders.1.model.", 32, second)
    )


def refiner(*, width: int | None = None, text_width: int = 1280) -> Shapes:
    text = open_clip_shapes("conditioner.embedders.0.model.", 32, text_width)
    return unet_shapes(SDXL_REFINER.unet, width, label=2560) | vae_shapes(width) | text
