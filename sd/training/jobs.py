"""The two stages of training Stable Diffusion: first the autoencoder on pictures, then the UNet on its latents.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), sections 3.1 and 3.2.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.config import ModelConfig
from sd.networks.build import build_networks
from sd.networks.vae import VAE, sample_latents
from sd.sampling.schedule import alphas_cumprod
from sd.text.tokenizer import Tokenizer
from sd.training.adapters import LowRankAdapter, NewWord, OnlyTrained
from sd.training.latents import EncodedAsTheyCome, EncodedOnce, Pictures
from sd.training.loop import TrainingOptions, TrainingRun, process_share
from sd.training.losses import AutoencodingLoss, DenoisingLoss, draw, standardise_latents


def fresh_networks(config: ModelConfig, seed: int) -> dict[str, nn.Module]:
    """The networks with random initial weights.

    Linear layers and convolutions are initialised as in PyTorch, embeddings as in CLIP. The last convolution of each
    residual block and the last layer of each transformer start at zero, so that at first every block passes its input
    on, as in the code of Ho et al. (2020) and the original's UNet. It matters as much in the VAE: after 100 steps, the
    small model's loss is 0.50 with it and 0.83 without. The VAE's latents start with little noise, so that the decoder
    sees something from the first step on.
    """
    torch.manual_seed(seed)
    networks = {name: network.to_empty(device="cpu") for name, network in build_networks(config).items()}
    for network in networks.values():
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    for network in (networks["unet"], networks["vae"]):
        for name, module in network.named_modules():
            if name.endswith((".conv2", ".attention.proj_out")) or name == "out.conv":
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
    moments = networks["vae"].quant_conv
    logvar = slice(moments.out_channels // 2, None)
    with torch.no_grad():
        moments.weight[logvar] *= 0.1
        moments.bias[logvar] -= 6
    text_encoder = networks["text_encoder"]
    nn.init.normal_(text_encoder.token_embedding.weight, std=0.02)
    nn.init.normal_(text_encoder.position_embedding.weight, std=0.01)
    for network in networks.values():
        network.requires_grad_(True).train()
    return networks


def autoencoder_run(
    vae: VAE,
    pictures: Pictures,
    options: TrainingOptions,
    folder: Path,
    *,
    batch_size: int,
    seed: int,
    squared: float = 1.0,
    noise: float = 0.0,
    smooth: float = 0.0,
    workers: int = 0,
) -> TrainingRun:
    """Train the VAE, or what is not frozen of it, to reconstruct pictures.

    squared, noise, smooth  see `AutoencodingLoss`
    workers                 see `sd.training.loop.TrainingRun`
    """
    share = process_share(batch_size)
    weights = {"squared": squared, "noise": noise, "smooth": smooth}
    module = AutoencodingLoss(vae, **weights)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        images, _ = pictures.batch(step, batch_size, share)
        channels, factor = vae.post_quant_conv.in_channels, 2 ** (len(vae.encoder.down) - 1)
        shape = (batch_size, channels, images.shape[-2] // factor, images.shape[-1] // factor)
        return images, draw(seed, step, shape, 1, 0.0).noise[share]

    return TrainingRun(module, batch, options, folder, workers=workers, batch_size=batch_size, seed=seed, **weights)


@torch.no_grad()
def standardise(vae: VAE, pictures: Pictures, scale: float, *, batches: int, batch_size: int) -> None:
    """Change a trained VAE so that its scaled latents have unit variance; its pictures stay the same."""
    device = vae.quant_conv.weight.device
    everything = slice(0, batch_size)
    means = [vae.encode(pictures.batch(step, batch_size, everything)[0].to(device))[0].cpu() for step in range(batches)]
    standardise_latents(vae, torch.cat(means).to(device), scale)


def tokenizer_of(config: ModelConfig) -> Tokenizer:
    return Tokenizer(context_length=config.text_encoder.context_length, pad_token=config.text_encoder.pad_token)


def noisy_latents(
    config: ModelConfig,
    encoded: EncodedAsTheyCome | EncodedOnce,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    timesteps: int,
    prompt_dropout: float = 0.0,
    noise_offset: float = 0.0,
) -> Callable[[int], tuple[Tensor, ...]]:
    """A function from a step to its batch: latents, tokens, noise levels from 0 to `timesteps` - 1, and noise; in some
    families with extra input channels. See `draw`.
    """
    share = process_share(batch_size)

    def batch(step: int) -> tuple[Tensor, ...]:
        mean, logvar, captions, *beside = encoded.batch(step, batch_size, share)
        draws = draw(seed, step, (batch_size, *mean.shape[1:]), timesteps, prompt_dropout, noise_offset)
        latent_noise = draws.latent_noise[share].to(mean.device)
        latents = config.vae.latent_scale * sample_latents(mean, logvar, latent_noise)
        dropped = draws.dropped[share].tolist()
        kept = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        tokens = torch.from_numpy(tokenizer(kept))
        beside = [values for values in beside if values is not None]
        return latents, tokens, draws.timesteps[share], draws.noise[share], *beside

    return batch


def denoiser_run(
    config: ModelConfig,
    networks: dict[str, nn.Module],
    encoded: EncodedAsTheyCome | EncodedOnce,
    options: TrainingOptions,
    folder: Path,
    *,
    batch_size: int,
    seed: int,
    prompt_dropout: float = 0.1,
    min_snr_gamma: float | None = None,
    snr_floor: float = 0.0,
    noise_offset: float = 0.0,
    train_text_encoder: bool = True,
    adapter: LowRankAdapter | NewWord | None = None,
    workers: int = 0,
) -> TrainingRun:
    """Train the UNet on latents of the VAE, and the text encoder too unless `train_text_encoder` is False.

    prompt_dropout  share of pictures trained with the empty prompt, so that the network also learns what guidance moves
                    away from: Ho & Salimans (2022), algorithm 1
    adapter         trained in place of the networks, which must be frozen
    workers         see `sd.training.loop.TrainingRun`; only for latents that are `EncodedOnce`
    """
    text_encoder = networks["text_encoder"]
    if config.text_encoder_2:
        from sd.training.xl import Conditions

        text_encoder = Conditions(config, [text_encoder, networks["text_encoder_2"]])
    text_encoder.requires_grad_(train_text_encoder)
    table = alphas_cumprod(config.schedule)
    module = DenoisingLoss(
        networks["unet"],
        text_encoder,
        table,
        prediction=config.prediction,
        min_snr_gamma=min_snr_gamma,
        snr_floor=snr_floor,
    )
    module.to(networks["unet"].out.conv.weight.device)
    batch = noisy_latents(
        config,
        encoded,
        adapter.tokenizer if isinstance(adapter, NewWord) else tokenizer_of(config),
        batch_size=batch_size,
        seed=seed,
        timesteps=config.schedule.timesteps,
        prompt_dropout=prompt_dropout,
        noise_offset=noise_offset,
    )
    return TrainingRun(
        OnlyTrained(adapter, module) if adapter else module,
        batch,
        options,
        folder,
        workers=workers,
        batch_size=batch_size,
        seed=seed,
        prompt_dropout=prompt_dropout,
        min_snr_gamma=min_snr_gamma,
        snr_floor=snr_floor,
        noise_offset=noise_offset,
        **(adapter.settings if adapter else {}),
    )
