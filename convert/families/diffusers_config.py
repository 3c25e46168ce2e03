"""The JSON settings of a diffusers folder: checked against the weights when read, derived from the config when written.

Three kinds: settings that follow from our config and must agree (`unet_settings` and the like), settings that our
networks have built in (the tables of fixed ones), and the few that no shape shows, which are read here: heads,
activation, latent scale, noise schedule, prediction, native size. A missing setting has the library's default. Names
and defaults: diffusers 0.42 and transformers 5; older versions have fewer of them.
"""

from collections.abc import Mapping
from dataclasses import replace

from convert.errors import UnsupportedFileError, WeightMismatchError, joined, shown
from convert.families.diffusers_levels import has_sigmas, with_latents, with_sigmas
from convert.families.stated_config import check_free_numbers, check_heads, is_native_size
from convert.families.table import with_open_clip
from convert.layouts.names import DEPTH_ESTIMATOR, generation, text_places
from sd.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig

Settings = Mapping[str, object]

UNET_FIXED = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_eps": 1e-05,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
UNET_FREE = {"sample_size", "attention_head_dim", "upcast_attention", "addition_embed_type_num_heads"}
VAE_FIXED = {
    "act_fn": "silu",
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
VAE_FREE = {"sample_size", "scaling_factor", "force_upcast", "latents_mean", "latents_std"}
TEXT_FIXED = {"layer_norm_eps": 1e-05}
SCHEDULE_DEFAULTS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def unet_settings(config: UNetConfig) -> dict[str, object]:
    """The settings that follow from the shapes of a UNet."""
    attends = [bool(depth) for depth in config.depths]
    depths = [depth or 1 for depth in config.depths]
    depths[-1] = config.depths[-1] or config.middle_depth or 1  # the library's middle is as deep as its last level
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": [config.width * multiplier for multiplier in config.multipliers],
        "layers_per_block": config.residuals_per_level,
        "down_block_types": ["CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attends)],
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "cross_attention_dim": config.context_width,
        "norm_num_groups": config.groups,
    }


def vector_settings(config: UNetConfig) -> dict[str, object]:
    """The settings of what a UNet is given beside the text, if that is anything."""
    guidance = {"time_cond_proj_dim": config.guidance_width} if config.guidance_width else {}
    if not config.vector_width:
        return guidance
    return guidance | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": config.vector_width,
    }


def _with_depths(stated: Settings, config: UNetConfig) -> Settings:
    """The same, without a depth for levels that have no attention: files state any."""
    name = "transformer_layers_per_block"
    depths = stated.get(name)
    if type(depths) is int:
        depths = [depths] * len(config.depths)
    if type(depths) is not list or len(depths) != len(config.depths):
        return stated
    *levels, last = zip(depths, config.depths, strict=True)
    return {**stated, name: [*(found if depth else 1 for found, depth in levels), last[0]]}


def vae_settings(config: VAEConfig) -> dict[str, object]:
    """The settings that follow from the shapes of a VAE."""
    levels = len(config.multipliers)
    return {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": [config.width * multiplier for multiplier in config.multipliers],
        "layers_per_block": config.residuals_per_level,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": config.groups,
    }


def text_settings(config: TextEncoderConfig) -> dict[str, object]:
    """The settings that follow from the shapes of a text encoder."""
    return {
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.layers,
    }


def with_settings(seen: ModelConfig, settings: Mapping[str, Settings]) -> ModelConfig:
    """The config read from shapes, completed by the settings of a folder.

    settings  by component ("unet", "vae", "text_encoder", "scheduler"); missing ones have the defaults, a model
              without a scheduler has the schedule of its family

    Raises UnsupportedFileError for settings that our networks do not have, WeightMismatchError for settings that
    contradict the weights and for values that are not numbers.
    """
    unet, vae = (settings.get(name, {}) for name in ("unet", "vae"))
    fixed = UNET_FIXED | {"use_linear_projection": generation(seen).linear} | vector_settings(seen.unet)
    _check_fixed("unet", unet, fixed, {*unet_settings(seen.unet), *UNET_FREE})
    _check_fixed("vae", vae, VAE_FIXED, {*vae_settings(seen.vae), *VAE_FREE})
    _check_agreement("unet", _with_depths(unet, seen.unet), unet_settings(seen.unet))
    _check_agreement("vae", vae, vae_settings(seen.vae))
    texts = {}
    for part, place in text_places(seen).items():
        stated, encoder = settings.get(place.folder, {}), getattr(seen, part)
        _check_fixed(place.folder, stated, TEXT_FIXED, None)
        _check_agreement(place.folder, stated, text_settings(encoder))
        heads, activation = stated.get("num_attention_heads", encoder.heads), stated.get("hidden_act")
        texts[part] = replace(encoder, heads=heads, activation=encoder.activation if activation is None else activation)
    heads = unet.get("attention_head_dim", 8)  # the number of heads, whatever it is called
    config = replace(
        seen,
        unet=replace(seen.unet, heads=tuple(heads) if type(heads) is list else (heads,) * len(seen.unet.heads)),
        vae=replace(seen.vae, latent_scale=_number(vae.get("scaling_factor", seen.vae.latent_scale))),
        **texts,
    )
    if config.depth and DEPTH_ESTIMATOR in settings:
        from convert.families.depth_sizes import with_depth_settings

        config = replace(config, depth=with_depth_settings(config.depth, settings[DEPTH_ESTIMATOR]))
    if "scheduler" in settings:
        config = _with_schedule(config, settings["scheduler"])
    config = with_latents(config, vae)
    side = unet.get("sample_size")
    side = side[0] if type(side) is list and len(side) == 2 and side[0] == side[1] else side
    if type(side) is int and is_native_size(side * config.vae.factor):
        config = replace(config, native_size=side * config.vae.factor)
    check_heads(config)
    check_free_numbers(config)
    return config


def stated_family(settings: Mapping[str, Settings], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The family that a folder's UNet says it belongs to, where widths may not tell."""
    linear = any(len(shape) == 2 for name, shape in shapes.items() if name.endswith("1.proj_in.weight"))
    if not linear or settings.get("unet", {}).get("use_linear_projection") is not True:
        return None
    row = with_open_clip(shapes)
    return row and row.name


def _with_schedule(config: ModelConfig, scheduler: Settings) -> ModelConfig:
    if has_sigmas(scheduler):
        return with_sigmas(config, scheduler)
    if scheduler.get("trained_betas"):
        raise UnsupportedFileError("has noise levels of its own (trained_betas), which are not supported.")
    kind = scheduler.get("beta_schedule", "linear")
    if kind != "scaled_linear":
        raise UnsupportedFileError(
            f"has a noise schedule of the kind {_text(kind)}; only scaled_linear, Stable Diffusion's, is supported."
        )
    prediction = scheduler.get("prediction_type", "epsilon")
    if type(prediction) is not str or prediction not in PREDICTIONS:
        raise UnsupportedFileError(
            f"has a UNet that predicts {_text(prediction)}; {joined([*PREDICTIONS])} are supported."
        )
    timesteps, start, end = (scheduler.get(name, default) for name, default in SCHEDULE_DEFAULTS.items())
    if type(timesteps) is not int:
        raise WeightMismatchError(f"has {_text(timesteps)} for num_train_timesteps, which is not a whole number.")
    schedule = replace(config.schedule, timesteps=timesteps, beta_start=_number(start), beta_end=_number(end))
    return replace(config, schedule=schedule, prediction=PREDICTIONS[prediction])


def _check_fixed(component: str, stated: Settings, fixed: Settings, others: set[str] | None) -> None:
    """`others`: the settings that are checked elsewhere; None: other settings do not matter."""
    for name, value in stated.items():
        if name in fixed:
            if value != fixed[name] and value is not None:
                raise UnsupportedFileError(
                    f"has a {component} with {shown(name)} = {_text(value)}; only networks with "
                    f"{_text(fixed[name])} are supported."
                )
        elif others is not None and name not in others and not name.startswith("_") and value not in (None, False, []):
            raise UnsupportedFileError(f"has a {component} with an unknown setting: {shown(name)} = {_text(value)}.")


def _check_agreement(component: str, stated: Settings, expected: Settings) -> None:
    for name, value in expected.items():
        found = stated.get(name, value)
        if _spread(found, value) != _spread(value, found):
            raise WeightMismatchError(
                f"has a {component} config that contradicts its weights: {name} is {_text(found)}, the weights "
                f"have {_text(value)}."
            )


def _spread(value: object, other: object) -> object:
    """A number, repeated if the other side is a list."""
    return [value] * len(other) if type(value) is int and type(other) is list else value


def _number(value: object) -> float:
    if type(value) not in (int, float):
        raise WeightMismatchError(f"has {_text(value)} in a config where a number is expected.")
    return float(value)


def _text(value: object) -> str:
    return shown(str(value), 60)
