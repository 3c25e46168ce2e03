"""The tiny autoencoder, which decodes latents nearly as the VAE does, in a small part of the time.

Ollin Boer Bohan, "TAESD" (2023): convolutions and ReLU only, distilled from the VAE of Stable Diffusion 1 and 2, or of
XL. Latents here are those of the UNet, already scaled.

    encoder                          channels   scale    decoder                       channels   scale
    conv_in                           3 -> 64   1/1      conv_in                        4 -> 64   1/8
    block                            64 -> 64   1/1      levels.0  3 blocks, upsample  64 -> 64   1/4
    levels.0  downsample, 3 blocks   64 -> 64   1/2      levels.1  likewise            64 -> 64   1/2
    levels.1  likewise               64 -> 64   1/4      levels.2  likewise            64 -> 64   1/1
    levels.2  likewise               64 -> 64   1/8      block                         64 -> 64   1/1
    conv_out                         64 ->  4   1/8      conv_out                      64 ->  3   1/1

B batch, C channels, H W height and width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sd.config import TinyVAEConfig

LARGEST = 3  # latents are squeezed into (-3, 3), softly, before they are decoded


class Block(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        h = F.relu(self.conv1(x))
        h = F.relu(self.conv2(h))
        return F.relu(x + self.conv3(h))


class DownLevel(nn.Module):
    """The step to a lower resolution, then blocks."""

    def __init__(self, channels: int, blocks: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)"""
        return self.blocks(self.conv(x))


class UpLevel(nn.Module):
    """Blocks, then the step to a higher resolution."""

    def __init__(self, channels: int, blocks: int):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)"""
        return self.conv(F.interpolate(self.blocks(x), scale_factor=2.0, mode="nearest"))


class TinyEncoder(nn.Module):
    """From a picture to latents."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(config.image_channels, config.width, 3, padding=1)
        self.block = Block(config.width)
        self.levels = nn.Sequential(*(DownLevel(config.width, config.blocks_per_level) for _ in range(config.levels)))
        self.conv_out = nn.Conv2d(config.width, config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 8H, 8W) in [0, 1] -> (B, 4, H, W)"""
        return self.conv_out(self.levels(self.block(self.conv_in(x))))


class TinyDecoder(nn.Module):
    """From latents to a picture."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(config.latent_channels, config.width, 3, padding=1)
        self.levels = nn.Sequential(*(UpLevel(config.width, config.blocks_per_level) for _ in range(config.levels)))
        self.block = Block(config.width)
        self.conv_out = nn.Conv2d(config.width, config.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4, H, W) -> (B, 3, 8H, 8W), about [0, 1]"""
        x = F.relu(self.conv_in(LARGEST * (x / LARGEST).tanh()))
        return self.conv_out(self.block(self.levels(x)))


class TinyVAE(nn.Module):
    """Encoder and decoder, each of which may be used without the other: `encoder` or `decoder` is then None."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        self.config = config
        self.encoder: TinyEncoder | None = TinyEncoder(config)
        self.decoder: TinyDecoder | None = TinyDecoder(config)

    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, 8H, 8W) in [-1, 1] -> latents (B, 4, H, W), scaled; there is no distribution to draw from"""
        return self.encoder((image + 1) / 2)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, 4, H, W), scaled -> image (B, 3, 8H, 8W), about [-1, 1]"""
        return 2 * self.decoder(latents) - 1
