"""The variational autoencoder: encodes a picture as latents of an eighth of its height and width, and decodes them.

Kingma & Welling, "Auto-Encoding Variational Bayes" (2014). The network is that of Rombach et al., "High-Resolution
Image Synthesis with Latent Diffusion Models" (2022), section 3.1; its blocks come from Esser et al., "Taming
Transformers for High-Resolution Image Synthesis" (2021), table 7, and before that from Ho et al. (2020).

B batch, C channels, H W height and width.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.config import VAEConfig
from sd.networks.attention import Attention

NORM_EPS = 1e-6  # of every group norm here; the UNet's residual blocks use 1e-5


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out channels, H, W)"""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Every position attends to every other, with a single head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.attention = Attention(channels, channels, heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        height, width = x.shape[-2:]
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        return x + self.attention(tokens).transpose(1, 2).unflatten(-1, (height, width))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)"""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as the weights were trained


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)"""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then the step to the next resolution, if there is one."""

    def __init__(self, in_channels: int, out_channels: int, residuals: int, groups: int, resample: nn.Module | None):
        super().__init__()
        widths = [in_channels] + [out_channels] * residuals
        self.residuals = nn.Sequential(*(ResidualBlock(a, b, groups) for a, b in pairwise(widths)))
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.residuals(x))


def middle(channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            residual1=ResidualBlock(channels, channels, groups),
            attention=SelfAttention(channels, groups),
            residual2=ResidualBlock(channels, channels, groups),
        )
    )


class Encoder(nn.Module):
    """From a picture to the mean and log-variance of its latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            resample = Downsample(width) if level < len(widths) - 1 else None
            self.down.append(Level(channels, width, config.residuals_per_level, config.groups, resample))
            channels = width
        self.mid = middle(channels, config.groups)
        self.norm_out = nn.GroupNorm(config.groups, channels, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, 8H, 8W) in [-1, 1] -> (B, 8, H, W): four channels for the mean, four for the log-variance"""
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """From latents to a picture."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = middle(channels, config.groups)
        levels = []
        for level, width in reversed(list(enumerate(widths))):
            resample = Upsample(width) if level > 0 else None
            levels.append(Level(channels, width, config.residuals_per_level + 1, config.groups, resample))
            channels = width
        self.up = nn.ModuleList(reversed(levels))  # numbered as in the encoder, so the last level runs first
        self.norm_out = nn.GroupNorm(config.groups, channels, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels, config.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4, H, W) -> (B, 3, 8H, 8W), about [-1, 1]"""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Encoder and decoder, with 1x1 convolutions between them and the latents.

    Latents are unscaled here: the pipeline scales them after `encode` and back before `decode`, by the two functions
    below.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures as normal distributions of latents; `sample_latents` draws from them.

        image    (B, 3, 8H, 8W) in [-1, 1]
        returns  mean and log-variance, each (B, 4, H, W); the latter clamped to [-30, 20], so its exponential is finite
        """
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, 4, H, W), unscaled -> image (B, 3, 8H, 8W), about [-1, 1]"""
        return self.decoder(self.post_quant_conv(latents))


def sample_latents(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Draw latents from the distribution that `VAE.encode` returns, with standard normal noise of the same shape.

    Kingma & Welling (2014), section 2.4: z = mu + sigma * eps.
    """
    return mean + torch.exp(0.5 * logvar) * noise


def scaled(latents: Tensor, config: VAEConfig) -> Tensor:
    """Latents (B, 4, H, W) of the VAE -> those of the UNet, with about unit variance."""
    if config.latent_means:
        means, deviations = _by_channel(config, latents)
        latents = (latents - means) / deviations
    return config.latent_scale * latents


def unscaled(latents: Tensor, config: VAEConfig) -> Tensor:
    """The inverse of `scaled`."""
    latents = latents / config.latent_scale
    if config.latent_means:
        means, deviations = _by_channel(config, latents)
        latents = latents * deviations + means
    return latents


def _by_channel(config: VAEConfig, latents: Tensor) -> Tensor:
    """Means and deviations, (2, C, 1, 1)."""
    values = (config.latent_means, config.latent_deviations)
    return torch.tensor(values, dtype=latents.dtype, device=latents.device)[..., None, None]
