"""Write a model as the original training code saved it, so that everything that reads those files reads it."""

from pathlib import Path

import torch
from torch import Tensor

from convert.files.safetensors_writer import write_safetensors
from convert.files.tensors import raw_bytes
from convert.layouts.joined import is_transposed, joined_names
from convert.layouts.names import ema_name, generation, original_names
from convert.layouts.noise_schedule import PREDICTS_V
from sd.config import ModelConfig, ScheduleConfig
from sd.files import written_whole


def schedule_buffers(config: ScheduleConfig) -> dict[str, Tensor]:
    """The twelve tables that the original training code saves beside the weights: Ho et al. (2020), eq. 4 to 7."""
    # as in `sd.sampling.schedule.alphas_cumprod`, all of it in float64: from the rounded table, betas would keep four
    # digits
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64)
    betas = roots**2
    bars = torch.cumprod(1 - betas, dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    variance = betas * (1 - previous) / (1 - bars)
    tables = {
        "betas": betas,
        "alphas_cumprod": bars,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": bars.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bars).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - bars).log(),
        "sqrt_recip_alphas_cumprod": (1 / bars).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bars - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - bars),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - bars),
    }
    return {name: table.float() for name, table in tables.items()}


def original_state_dict(
    config: ModelConfig, weights: dict[str, Tensor], averaged: dict[str, Tensor] | None = None, *, updates: int = 0
) -> dict[str, Tensor]:
    """All tensors of an original file, under its names and in its shapes.

    weights   every parameter by our name, `unet.… vae.… text_encoder.…`
    averaged  the averaged (EMA) ones, of which those of the UNet are written beside the plain ones
    updates   how many updates went into the average
    """
    names = original_names(config)
    own = generation(config)
    state = schedule_buffers(config.schedule)
    if own.of_generative_models:
        bars = state["alphas_cumprod"].double()
        state = {"denoiser.sigmas": ((1 - bars) / bars).sqrt().float()}
    for ours, (name, axes) in names.items():
        state[name] = weights[ours].reshape(weights[ours].shape + (1,) * axes)
    for name, parts in joined_names(config).items():
        value = torch.cat([state.pop(part) for part in parts])
        state[name] = value.T if is_transposed(name) else value
    if averaged is not None or not own.of_generative_models:
        state["model_ema.decay"] = torch.tensor(0.9999)
        state["model_ema.num_updates"] = torch.tensor(updates, dtype=torch.int32)
    for ours, (name, _) in names.items():
        if averaged is not None and ours.startswith("unet."):
            state[ema_name(name)] = averaged[ours].reshape(state[name].shape)
    if config.prediction == "v":
        state[PREDICTS_V] = torch.empty(0)  # nothing else in the file could tell
    first = own.texts[0]
    if not first.is_open_clip:
        state[f"{first.original}embeddings.position_ids"] = torch.arange(config.text_encoder.context_length)[None]
    return state


def write_original(path: Path, state: dict[str, Tensor], *, force: bool = False, **beside: object) -> None:
    """Write tensors as `.ckpt`, a pickle in a zip with `beside` (the training step and the like), or `.safetensors`.

    Raises ValueError where something should stand beside the tensors of a `.safetensors`, which has no place for it.
    """
    safetensors = path.suffix == ".safetensors"
    if safetensors and beside:
        raise ValueError(f"a .safetensors has no place for {', '.join(beside)}; name the file .ckpt")
    with written_whole(path, force=force) as file:
        if safetensors:
            entries = {name: (str(t.dtype).removeprefix("torch."), t.shape) for name, t in state.items()}
            write_safetensors(file, entries, map(raw_bytes, state.values()), {"format": "pt"})
        else:
            torch.save({**beside, "state_dict": state}, file)
