"""Noise levels without timesteps in the settings of a diffusers folder, and the scale of latents that goes with them.

The library's schedulers for them begin with EDM; their sigmas, and the scale of the VAE's latents, are in units in
which the latents have the deviation sigma_data. Ours are in units of it.
"""

from collections.abc import Mapping
from dataclasses import replace

from convert.errors import UnsupportedFileError, WeightMismatchError, shown
from sd.config import ModelConfig

Settings = Mapping[str, object]

DEFAULTS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}  # of the library
PREDICTIONS = {"epsilon": "edm", "v_prediction": "v"}  # as such a scheduler means them
STATISTICS = {"latents_mean": "latent_means", "latents_std": "latent_deviations"}  # theirs -> ours


def has_sigmas(scheduler: Settings) -> bool:
    """Whether the UNet is told sigma, not a timestep."""
    return str(scheduler.get("_class_name")).startswith("EDM") or scheduler.get("timestep_type") == "continuous"


def with_sigmas(config: ModelConfig, scheduler: Settings) -> ModelConfig:
    """The config with the noise levels and the prediction of such a scheduler. Raises CheckpointError."""
    is_edm = str(scheduler.get("_class_name")).startswith("EDM")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in (PREDICTIONS if is_edm else ("v_prediction",)):
        raise UnsupportedFileError(
            f"has a UNet that is told sigma and predicts {shown(str(prediction), 60)}, which is not supported."
        )
    defaults = DEFAULTS if is_edm else {"sigma_min": None, "sigma_max": None}
    stated = {name: scheduler.get(name, default) for name, default in defaults.items()}
    levels = {name: number(value, name) for name, value in stated.items()}
    return replace(config, schedule=replace(config.schedule, **levels), prediction=PREDICTIONS[prediction])


def with_latents(config: ModelConfig, vae: Settings) -> ModelConfig:
    """The config with the statistics of the VAE's latents, in units of sigma_data. Raises CheckpointError."""
    statistics = {}
    for theirs, ours in STATISTICS.items():
        values = vae.get(theirs) or []
        if type(values) is not list or len(values) not in (0, config.vae.latent_channels):
            raise UnsupportedFileError(
                f"has a vae with {theirs} = {shown(str(values), 60)}; one number for each of its "
                f"{config.vae.latent_channels} channels is expected."
            )
        statistics[ours] = tuple(number(value, theirs) for value in values)
    scale = config.vae.latent_scale / config.schedule.sigma_data
    return replace(config, vae=replace(config.vae, latent_scale=scale, **statistics))


def sigma_settings(config: ModelConfig) -> dict[str, object]:
    """What a scheduler of the library needs to know beside its class, EDMEulerScheduler."""
    theirs = {ours: name for name, ours in PREDICTIONS.items()}
    return {
        **{name: getattr(config.schedule, name) for name in DEFAULTS},
        "sigma_schedule": "karras" if config.prediction == "edm" else "exponential",
        "num_train_timesteps": config.schedule.timesteps,
        "prediction_type": theirs[config.prediction],
    }


def latent_settings(config: ModelConfig) -> dict[str, object]:
    """The scale of the latents, and their statistics if there are any."""
    found = {theirs: list(getattr(config.vae, ours)) for theirs, ours in STATISTICS.items() if config.vae.latent_means}
    return {"scaling_factor": config.vae.latent_scale * config.schedule.sigma_data, **found}


def number(value: object, name: str) -> float:
    if type(value) not in (int, float):
        raise WeightMismatchError(f"has {shown(str(value), 60)} for {name} in a config, where a number is expected.")
    return float(value)
