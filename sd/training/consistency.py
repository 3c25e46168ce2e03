"""Distilling a model for few steps: an adapter learns to jump where its teacher, the model without it, walks."""

from pathlib import Path

import torch
from torch import Tensor, nn

from sd.config import ModelConfig
from sd.sampling.schedule import alphas_cumprod
from sd.training.adapters import LowRankAdapter, OnlyTrained
from sd.training.jobs import noisy_latents, tokenizer_of
from sd.training.latents import EncodedAsTheyCome, EncodedOnce
from sd.training.loop import TrainingOptions, TrainingRun
from sd.training.losses import ConsistencyLoss


def consistency_run(
    config: ModelConfig,
    networks: dict[str, nn.Module],
    encoded: EncodedAsTheyCome | EncodedOnce,
    options: TrainingOptions,
    folder: Path,
    *,
    adapter: LowRankAdapter,
    batch_size: int,
    seed: int,
    guidance_scale: float,
    grid: int,
    noise_offset: float = 0.0,
) -> TrainingRun:
    """Train an adapter of the UNet with `ConsistencyLoss`; the networks are frozen.

    noise_offset  as in `sd.training.losses.draw`

    Luo et al., "LCM-LoRA: A Universal Stable-Diffusion Acceleration Module" (2023).
    """
    unet, tokenizer = networks["unet"], tokenizer_of(config)

    def teacher(*given: Tensor) -> Tensor:
        with adapter.off():
            return unet(*given)

    module = ConsistencyLoss(
        unet,
        teacher,
        networks["text_encoder"],
        alphas_cumprod(config.schedule),
        torch.from_numpy(tokenizer([""])),
        prediction=config.prediction,
        guidance_scale=guidance_scale,
        grid=grid,
    )
    module.to(unet.out.conv.weight.device)
    settled = {"guidance_scale": guidance_scale, "grid": grid, "noise_offset": noise_offset, **adapter.settings}
    batches = noisy_latents(
        config, encoded, tokenizer, batch_size=batch_size, seed=seed, timesteps=grid, noise_offset=noise_offset
    )
    return TrainingRun(
        OnlyTrained(adapter, module), batches, options, folder, batch_size=batch_size, seed=seed, **settled
    )
