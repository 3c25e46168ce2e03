"""The UNet: predicts the noise in noisy latents, given the timestep and the text.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.3; the architecture is
that of Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), section 3.

Twelve input blocks lead down to an eighth of the latents' size, one block stands in the middle, and twelve output
blocks lead up again. Each output block also takes the output of its counterpart on the way down (the skip). For Stable
Diffusion v1, `block_plan` returns:

    block             layers                            channels  skip  heads  scale
    input_blocks.0    conv                             4 ->  320     0      -    1/1
    input_blocks.1    residual attention             320 ->  320     0      8    1/1
    input_blocks.2    residual attention             320 ->  320     0      8    1/1
    input_blocks.3    downsample                     320 ->  320     0      -    1/2
    input_blocks.4    residual attention             320 ->  640     0      8    1/2
    input_blocks.5    residual attention             640 ->  640     0      8    1/2
    input_blocks.6    downsample                     640 ->  640     0      -    1/4
    input_blocks.7    residual attention             640 -> 1280     0      8    1/4
    input_blocks.8    residual attention            1280 -> 1280     0      8    1/4
    input_blocks.9    downsample                    1280 -> 1280     0      -    1/8
    input_blocks.10   residual                      1280 -> 1280     0      -    1/8
    input_blocks.11   residual                      1280 -> 1280     0      -    1/8
    middle_block      residual1 attention residual2 1280 -> 1280     0      8    1/8
    output_blocks.0   residual                      2560 -> 1280  1280      -    1/8
    output_blocks.1   residual                      2560 -> 1280  1280      -    1/8
    output_blocks.2   residual upsample             2560 -> 1280  1280      -    1/4
    output_blocks.3   residual attention            2560 -> 1280  1280      8    1/4
    output_blocks.4   residual attention            2560 -> 1280  1280      8    1/4
    output_blocks.5   residual attention upsample   1920 -> 1280   640      8    1/2
    output_blocks.6   residual attention            1920 ->  640   640      8    1/2
    output_blocks.7   residual attention            1280 ->  640   640      8    1/2
    output_blocks.8   residual attention upsample    960 ->  640   320      8    1/1
    output_blocks.9   residual attention             960 ->  320   320      8    1/1
    output_blocks.10  residual attention             640 ->  320   320      8    1/1
    output_blocks.11  residual attention             640 ->  320   320      8    1/1

B batch, C channels, H W height and width of the latents, S tokens of the text.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.config import UNetConfig
from sd.networks.attention import SpatialTransformer
from sd.networks.block_plan import BlockRow, block_plan


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """Encode the timestep, and so how noisy x_t is, as cosines and sines of geometrically growing wavelengths.

    timestep  () or (B,), 0 to 999, not always whole
    returns   (1 or B, width) float32, first the cosines, then the sines

    Vaswani et al. (2017), section 3.5, alternate sines and cosines; this order and these frequencies,
    10000 ** (-i / half), are from Dhariwal & Nichol's code, with which the weights were trained.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float().reshape(-1, 1) * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; the time embedding added between them says how noisy the input is."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, C, H, W), time (1 or B, time width) -> (B, out channels, H, W)"""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2), odd sides rounded up"""
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """(B, C, H/2, W/2) -> (B, C, H, W). `size` is (H, W): on the way down, odd sides were rounded up."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.ModuleDict):
    """One UNet block: residual, attention and resampling layers in the order they run."""

    def __init__(self, row: BlockRow, config: UNetConfig):
        super().__init__()
        channels, width = row.in_channels, row.out_channels
        for name in row.layers:
            if name == "conv":
                self[name] = nn.Conv2d(channels, width, 3, padding=1)
            elif name == "attention":
                self[name] = SpatialTransformer(width, config.context_width, row.heads, row.depth, config.groups)
            elif name == "downsample":
                self[name] = Downsample(channels)
            elif name == "upsample":
                self[name] = Upsample(width)
            else:
                self[name] = ResidualBlock(channels, width, 4 * config.width, config.groups)
                channels = width

    def forward(self, x: Tensor, time: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
        """x (B, C, H, W), time (1 or B, time width), context (B, S, context width) -> (B, out channels, H', W')"""
        for layer in self.values():
            if isinstance(layer, ResidualBlock):
                x = layer(x, time)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Predicts the noise in x_t (or the velocity, for families trained that way)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.width = config.width
        time_width = 4 * config.width
        self.time_embed = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(config.width, time_width),
                activation=nn.SiLU(),
                linear2=nn.Linear(time_width, time_width),
            )
        )
        self.cond_proj = nn.Linear(config.guidance_width, config.width, bias=False) if config.guidance_width else None
        self.label_emb = None
        if config.vector_width:
            self.label_emb = nn.Sequential(
                OrderedDict(
                    linear1=nn.Linear(config.vector_width, time_width),
                    activation=nn.SiLU(),
                    linear2=nn.Linear(time_width, time_width),
                )
            )
        stages: dict[str, list[Block]] = {"input_blocks": [], "middle_block": [], "output_blocks": []}
        for row in block_plan(config):
            stages[row.name.partition(".")[0]].append(Block(row, config))
        self.input_blocks = nn.ModuleList(stages["input_blocks"])
        (self.middle_block,) = stages["middle_block"]
        self.output_blocks = nn.ModuleList(stages["output_blocks"])
        self.out = nn.Sequential(
            OrderedDict(
                norm=nn.GroupNorm(config.groups, config.width, eps=1e-5),
                activation=nn.SiLU(),
                conv=nn.Conv2d(config.width, config.out_channels, 3, padding=1),
            )
        )

    def forward(
        self,
        x_t: Tensor,
        timestep: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise in latents (or the velocity).

        x_t       (B, in_channels, H, W)  noisy latents, H and W at least 1
        timestep  () or (B,)              999 is noisiest
        context   (B, S, context width)   the encoded prompt
        vector    (B, vector width)       the pooled prompt and the picture's sizes, for families trained with them
        guidance  (1 or B, guidance width)  the embedded guidance scale, for UNets distilled with it; without, w is 0
        returns   (B, out_channels, H, W)
        """
        time = timestep_embedding(timestep, self.width).to(x_t.dtype)
        if guidance is not None:
            time = time + self.cond_proj(guidance)
        time = self.time_embed(time)
        if self.label_emb is not None:
            time = time + self.label_emb(vector)
        x, skips = x_t, []
        for block in self.input_blocks:
            x = block(x, time, context)
            skips.append(x)
        x = self.middle_block(x, time, context)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            # a block that upsamples does so to the size of the next skip
            x = block(x, time, context, size=skips[-1].shape[-2:] if skips else None)
        return self.out(x)
