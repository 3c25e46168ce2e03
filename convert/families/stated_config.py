"""The config in the metadata of a file of ours, which a stranger may have written.

Sizes come from the shapes of the tensors, and the metadata must agree; the few numbers that no shape shows must have
the right type and be in range.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import chain

from convert.errors import WeightMismatchError, shown
from convert.families.family import TEXTS, check_complete, check_counts, part_config, recognise
from convert.families.table import row_named
from convert.files.records import TensorRecord
from convert.layouts.names import PREFIXES, SECOND_TEXT, original_names
from sd.config import DPT_HYBRID, SDXL, ModelConfig

EVERYTHING = asdict(replace(SDXL, depth=DPT_HYBRID))  # a config with all fields
# that not every model has
OPTIONAL = {"text_encoder_2", "depth", "vector_width", "guidance_width", "skipped_layers", "pooled_width"}
OPTIONAL |= {"guidance_scale", "sigma_min", "sigma_max", "sigma_data", "latent_means", "latent_deviations"}
PREDICTIONS = ("eps", "v", "x0", "edm")
OF_LATENTS = ("latent_scale", "latent_means", "latent_deviations")  # numbers of a VAE that no shape shows
ACTIVATIONS = ("quick_gelu", "gelu")
TIMESTEPS = range(1, 10_000 + 1)
SIDES = range(64, 4096 + 1, 8)  # pixels that native_size may be
HIGHEST_GUIDANCE = 100


def stated_config(text: str, tensors: Mapping[str, TensorRecord], part: str | None = None) -> ModelConfig:
    """The config that the metadata and the tensors, by our names, agree on; with `part`, of one part alone.

    Raises WeightMismatchError.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise WeightMismatchError("has no usable config in its metadata: it is not JSON.") from None
    if not _same_types(data, EVERYTHING):
        raise WeightMismatchError("has no usable config in its metadata: its fields or their types are not a config's.")
    stated = ModelConfig.from_dict(data)
    check_counts(stated)
    names = original_names(stated, part)
    check_complete([ours for ours in names if ours not in tensors], len(names))
    shapes = {name: tensors[ours].shape + (1,) * axes for ours, (name, axes) in names.items()}
    if part:
        if not row_named(stated.family):
            raise WeightMismatchError(f"has {shown(stated.family)} for family in its metadata, which is unknown.")
        prefix = (PREFIXES | dict([SECOND_TEXT]))[part]
        seen = part_config(part, {name.removeprefix(prefix): shape for name, shape in shapes.items()}, stated)
    else:
        seen = recognise(shapes, stated.family)
    check_heads(stated)
    check_free_numbers(stated)
    config = replace(
        seen,
        unet=replace(seen.unet, heads=stated.unet.heads),
        **{
            part: replace(text, heads=getattr(stated, part).heads, activation=getattr(stated, part).activation)
            for part in TEXTS
            if (text := getattr(seen, part)) and getattr(stated, part)
        },
        vae=replace(seen.vae, **{name: getattr(stated.vae, name) for name in OF_LATENTS}),
        schedule=stated.schedule,
        prediction=stated.prediction,
        native_size=stated.native_size,
        guidance_scale=stated.guidance_scale,
    )
    if config.depth and stated.depth:
        depth = replace(config.depth, heads=stated.depth.heads, groups=stated.depth.groups, taps=stated.depth.taps)
        config = replace(config, depth=depth)
    if stated != config:
        raise WeightMismatchError("has a config in its metadata that contradicts its tensors.")
    return config


def is_native_size(value: object) -> bool:
    return type(value) is int and value in SIDES


def is_guidance_scale(value: object) -> bool:
    return type(value) is float and 0 <= value <= HIGHEST_GUIDANCE


def _same_types(value: object, model: object) -> bool:
    """Whether what came out of JSON has the fields of a config, each of exactly the type it has there."""
    if isinstance(model, dict):
        return (
            type(value) is dict
            and model.keys() - OPTIONAL <= value.keys() <= model.keys()
            and all(_same_types(value[name], model[name]) for name in value)
        )
    if isinstance(model, tuple):  # of whole numbers, as many as there are levels; or of others, as many as channels
        return type(value) is list and all(type(item) is type((*model, 0.0)[0]) for item in value)
    return type(value) is type(model)


def check_heads(config: ModelConfig) -> None:
    """Every attention must have a whole number of channels for each of its heads. Raises WeightMismatchError."""
    unet, texts = config.unet, [text for part in TEXTS if (text := getattr(config, part))]
    if len(unet.heads) != len(unet.multipliers):
        raise WeightMismatchError(
            f"has {len(unet.heads)} numbers of attention heads for the {len(unet.multipliers)} levels of its UNet."
        )
    widths = [unet.width * multiplier for multiplier in unet.multipliers]
    attentions = [("UNet", *pair) for pair in zip(widths, unet.heads, strict=True)]
    attentions += [("text encoder", text.width, text.heads) for text in texts]
    for where, width, heads in attentions:
        if type(heads) is not int or heads < 1 or width % heads:
            raise WeightMismatchError(
                f"has a {where} that is {width} wide with {shown(str(heads), 40)} attention heads; they must divide it."
            )


def check_free_numbers(config: ModelConfig) -> None:
    """Numbers that no shape shows must be in range. Raises WeightMismatchError."""
    schedule, scale = config.schedule, config.vae.latent_scale
    latents = config.vae.latent_means, config.vae.latent_deviations
    checks = [
        (0 < scale < math.inf, "latent_scale", scale, "it must be finite and greater than 0"),
        (config.prediction in PREDICTIONS, "prediction", config.prediction, f"it must be {' or '.join(PREDICTIONS)}"),
        *(
            (text.activation in ACTIVATIONS, "activation", text.activation, f"it must be {' or '.join(ACTIVATIONS)}")
            for part in TEXTS
            if (text := getattr(config, part))
        ),
        (is_native_size(config.native_size), "native_size", config.native_size, "it must be 64, 72, ... 4096"),
        (
            is_guidance_scale(config.guidance_scale),
            "guidance_scale",
            config.guidance_scale,
            f"it must be 0 to {HIGHEST_GUIDANCE}",
        ),
        (schedule.timesteps in TIMESTEPS, "timesteps", schedule.timesteps, f"it must be 1 to {TIMESTEPS[-1]}"),
        (
            0 <= schedule.sigma_min <= schedule.sigma_max < math.inf
            and (schedule.sigma_min > 0) == (schedule.sigma_max > 0)
            and 0 < schedule.sigma_data < math.inf,
            "sigma_min, sigma_max and sigma_data",
            f"{schedule.sigma_min}, {schedule.sigma_max} and {schedule.sigma_data}",
            "the first two must rise, the last must be greater than 0",
        ),
        (
            [len(values) for values in latents] in ([0, 0], [config.vae.latent_channels] * 2)
            and all(map(math.isfinite, chain(*latents)))
            and min(config.vae.latent_deviations, default=1) > 0,
            "latent_means and latent_deviations",
            latents,
            "they must be finite numbers for each channel, the latter greater than 0",
        ),
        (
            0 < schedule.beta_start <= schedule.beta_end < 1,
            "beta_start and beta_end",
            f"{schedule.beta_start} and {schedule.beta_end}",
            "they must rise between 0 and 1",
        ),
    ]
    for right, name, found, rule in checks:
        if not right:
            raise WeightMismatchError(f"has {shown(str(found))} for {name} in its metadata; {rule}.")
