"""The sigmas that a file states of a model without timesteps.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), has such models; tensors
of their own mark them in files of Stable Diffusion XL, under the names that ComfyUI reads.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

from convert.errors import UnsupportedFileError
from sd.config import ModelConfig, ScheduleConfig

MEANS, DEVIATIONS = "edm_mean", "edm_std"  # of the latents: Playground 2.5, which predicts what `sd.config` calls edm
HIGHEST, LOWEST = "edm_vpred.sigma_max", "edm_vpred.sigma_min"  # of sigma: CosXL, which predicts v
LARGEST = 1e6  # of their numbers
PLAYGROUND = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
COSXL = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0}  # where the tensors say nothing else
# Of the published Playground 2.5, for files that have the two tensors without elements.
PUBLISHED = {
    MEANS: (-1.6574, 1.886, -1.383, 2.5155),
    DEVIATIONS: (8.4927, 5.9022, 6.5498, 5.2299),
}


@dataclass(frozen=True, kw_only=True)
class Continuous:
    """What the tensors of a model without timesteps state."""

    schedule: ScheduleConfig
    prediction: str
    mark: str  # the tensor that says so
    latents: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # means and deviations by channel

    @property
    def note(self) -> str:
        return (
            f"trained at sigmas from {self.schedule.sigma_min:g} to {self.schedule.sigma_max:g}, without timesteps: "
            "best with --schedule karras or exponential."
        )

    def applied_to(self, config: ModelConfig) -> ModelConfig:
        """Latents are in units of their deviation, so they are not scaled once these are known."""
        vae = config.vae
        if self.latents:
            means, deviations = self.latents
            vae = replace(vae, latent_scale=1.0, latent_means=means, latent_deviations=deviations)
        return replace(config, schedule=self.schedule, vae=vae)


def continuous(found: Mapping[str, tuple[float, ...]], schedule: ScheduleConfig) -> Continuous | None:
    """What a file states of its sigmas; None for a model with timesteps.

    found  the numbers in each of these tensors that it has

    Raises UnsupportedFileError for numbers that cannot be used.
    """
    if MEANS in found or DEVIATIONS in found:
        values = {name: found.get(name) or PUBLISHED[name] for name in PUBLISHED}
        usable = all(len(value) == 4 and all(abs(x) < LARGEST for x in value) for value in values.values())
        if not (usable and MEANS in found and DEVIATIONS in found and min(values[DEVIATIONS]) > 0):
            raise UnsupportedFileError(
                f"has no usable {MEANS} and {DEVIATIONS}, the statistics of its latents: 4 numbers each are expected, "
                "the latter above 0."
            )
        levels, latents = PLAYGROUND, tuple(tuple(map(shortest, value)) for value in values.values())
        return Continuous(schedule=replace(schedule, **levels), prediction="edm", mark=MEANS, latents=latents)
    if HIGHEST not in found:
        return None
    (highest, *_), (lowest, *_) = (
        found.get(name) or (COSXL[level],) for name, level in ((HIGHEST, "sigma_max"), (LOWEST, "sigma_min"))
    )
    if not 0 < lowest < highest < LARGEST:
        raise UnsupportedFileError(
            f"has {lowest:g} and {highest:g} in {LOWEST} and {HIGHEST}; they must rise, between 0 and {LARGEST:g}."
        )
    levels = {**COSXL, "sigma_min": shortest(lowest), "sigma_max": shortest(highest)}
    return Continuous(schedule=replace(schedule, **levels), prediction="v", mark=HIGHEST)


def shortest(value: float) -> float:
    """The number with the fewest digits that is the same in float32, in which files keep it: 0.002."""
    in_file = struct.pack("f", value)
    shorter = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next(number for number in shorter if struct.pack("f", number) == in_file)


def marking(config: ModelConfig) -> dict[str, tuple[float, ...]]:
    """The tensors by which a file of the original layout says that a model has no timesteps; {} where it cannot."""
    levels = {name: getattr(config.schedule, name) for name in COSXL}
    if config.prediction == "edm" and levels == PLAYGROUND and config.vae.latent_means and config.vae.latent_scale == 1:
        return {MEANS: config.vae.latent_means, DEVIATIONS: config.vae.latent_deviations}
    if config.prediction == "v" and levels["sigma_max"] and levels["sigma_data"] == 1 and not config.vae.latent_means:
        return {HIGHEST: (levels["sigma_max"],), LOWEST: (levels["sigma_min"],)}
    return {}
