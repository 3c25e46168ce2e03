"""The depth network: from one picture, how near each of its points is.

Ranftl, Bochkovskiy & Koltun, "Vision Transformers for Dense Prediction" (2021): DPT-Hybrid, trained by MiDaS (Ranftl et
al., 2020) on many data sets at once. Those share no unit, so the output is inverse depth (large is near) up to an
unknown scale and shift.

    part          what                                              channels  scale
    stem          convolution, max-pooling                          3 ->   64  1/4
    stages.0      3 residual blocks                                64 ->  256  1/4   tap 0
    stages.1      4 residual blocks                               256 ->  512  1/8   tap 1
    stages.2      9 residual blocks                               512 -> 1024  1/16
    patch_proj    to tokens, and one more for the whole picture  1024 ->  768  1/16
    layers.0-11   transformer                                     768 ->  768  1/16
    readouts.0    from the tokens after layer 8                   768 ->  768  1/16  tap 2
    readouts.1    from the tokens after layer 11                  768 ->  768  1/32  tap 3
    reduce.0-3    convolution of each tap                             ->  256
    fusion.3-0    add the next tap, upsample                      256 ->  256  1/2
    head          convolutions, upsample                          256 ->    1  1/1

B batch, C channels, H W height and width of the picture, T tokens, D width of a token.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.config import DepthConfig
from sd.networks.attention import Attention
from sd.networks.text_encoder import FeedForward

SIDE_MULTIPLE = 32  # the deepest feature map has a 32nd of the picture's sides
LAYER_NORM_EPS = 1e-6  # as in the original vision transformer; PyTorch's default is 1e-5
STANDARDISATION_EPS = 1e-8


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad so that a window of this size and stride gives ceil(side / stride) outputs; an odd pixel goes to the end.

    This is TensorFlow's "SAME", with which the weights were trained: at stride 2, an even side gets less at its start
    than at its end. As much on both sides would move everything by half a pixel.
    """
    before_and_after = []
    for side in (x.shape[-1], x.shape[-2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        before_and_after += [total // 2, total - total // 2]
    return F.pad(x, before_and_after, value=value)


class StandardisedConv(nn.Conv2d):
    """A convolution that uses its weights with mean 0 and variance 1 in each output channel.

    Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization" (2019), section on
    weight standardization.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__(in_channels, out_channels, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out channels, H/stride, W/stride), rounded up"""
        weight = F.layer_norm(self.weight, self.weight.shape[1:], eps=STANDARDISATION_EPS)
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        return F.conv2d(pad_same(x, kernel, stride), weight, stride=stride)


class Stem(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.conv = StandardisedConv(3, channels, 7, stride=2)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/4, W/4)"""
        x = F.relu(self.norm(self.conv(image)))
        return F.max_pool2d(pad_same(x, 3, 2, value=-torch.inf), 3, stride=2)


class Bottleneck(nn.Module):
    """Three convolutions, in the middle on a quarter of the channels, beside a shortcut.

    He et al., "Deep Residual Learning for Image Recognition" (2016), figure 5, with group norm; the second convolution
    has the stride. The first block of a stage has a convolution in its shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, *, first: bool):
        super().__init__()
        middle = out_channels // 4
        self.conv1 = StandardisedConv(in_channels, middle, 1)
        self.norm1 = nn.GroupNorm(groups, middle, eps=1e-5)
        self.conv2 = StandardisedConv(middle, middle, 3, stride)
        self.norm2 = nn.GroupNorm(groups, middle, eps=1e-5)
        self.conv3 = StandardisedConv(middle, out_channels, 1)
        self.norm3 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        shortcut = OrderedDict(
            conv=StandardisedConv(in_channels, out_channels, 1, stride),
            norm=nn.GroupNorm(groups, out_channels, eps=1e-5),
        )
        self.shortcut = nn.Sequential(shortcut) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out channels, H/stride, W/stride)"""
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(self.norm3(self.conv3(h)) + self.shortcut(x))


def stage(in_channels: int, out_channels: int, blocks: int, stride: int, groups: int) -> nn.Sequential:
    """Blocks at one resolution; the first one goes to it."""
    first = Bottleneck(in_channels, out_channels, stride, groups, first=True)
    others = (Bottleneck(out_channels, out_channels, 1, groups, first=False) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)


class TransformerLayer(nn.Module):
    """Self-attention, then feed-forward; each adds to its input.

    Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), eq. 2 and 3.
    """

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attention = Attention(config.width, config.width, config.heads, bias=True)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.feed_forward = FeedForward(config.width, config.hidden_width, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Readout(nn.Module):
    """From tokens to a feature map again: each position also gets the token of the whole picture.

    Ranftl et al. (2021), section 3, "Convolutional decoder": Read (the variant "proj"), Concatenate, Resample.
    """

    def __init__(self, width: int, *, halves: bool):
        super().__init__()
        self.project = nn.Linear(2 * width, width)
        self.conv = nn.Conv2d(width, width, 1)
        self.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1) if halves else nn.Identity()

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, 1 + height*width, D) -> (B, D, height, width), or half as high and wide"""
        whole, positions = tokens[:, :1], tokens[:, 1:]
        x = F.gelu(self.project(torch.cat([positions, whole.expand_as(positions)], dim=-1)))
        return self.downsample(self.conv(x.transpose(1, 2).unflatten(-1, (height, width))))  # (B, T, D) -> (B, D, h, w)


class ResidualUnit(nn.Module):
    """Two convolutions, each after its activation, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Add a feature map to what comes from the deeper ones, and go to twice the size.

    Ranftl et al. (2021), figure 1, right. The deepest has nothing to add its feature map to.
    """

    def __init__(self, channels: int, *, deepest: bool):
        super().__init__()
        self.residual1 = nn.Identity() if deepest else ResidualUnit(channels)
        self.residual2 = ResidualUnit(channels)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, deeper: Tensor | None) -> Tensor:
        """x, deeper (B, C, H, W) -> (B, C, 2H, 2W)"""
        x = self.residual1(x) if deeper is None else deeper + self.residual1(x)
        x = F.interpolate(self.residual2(x), scale_factor=2.0, mode="bilinear", align_corners=True)
        return self.out(x)


class DepthNetwork(nn.Module):
    """Estimates inverse depth."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.grid, self.taps = config.grid, config.taps
        self.stem = Stem(config.stem_width, config.groups)
        self.stages = nn.ModuleList()
        channels = config.stem_width
        for width, blocks in zip(config.stage_widths, config.stage_blocks, strict=True):
            stride = 2 if self.stages else 1
            self.stages.append(stage(channels, width, blocks, stride, config.groups))
            channels = width
        self.patch_proj = nn.Conv2d(channels, config.width, 1)
        made = {"dtype": torch.float32, "device": torch.get_default_device()}  # which may be the meta device
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width, **made))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width, **made))
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.layers))
        self.readouts = nn.ModuleList(Readout(config.width, halves=tap == config.taps[-1]) for tap in config.taps)
        tapped = (*config.stage_widths[:-1], *(config.width for _ in config.taps))
        channels, deepest = config.fusion_width, len(tapped) - 1
        self.reduce = nn.ModuleList(nn.Conv2d(width, channels, 3, padding=1, bias=False) for width in tapped)
        self.fusion = nn.ModuleList(Fusion(channels, deepest=number == deepest) for number in range(len(tapped)))
        self.head = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(channels, channels // 2, 3, padding=1),
                upsample=nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True),
                conv2=nn.Conv2d(channels // 2, config.head_width, 3, padding=1),
                activation1=nn.ReLU(),
                conv3=nn.Conv2d(config.head_width, 1, 1),
                activation2=nn.ReLU(),
            )
        )

    def positions(self, height: int, width: int) -> Tensor:
        """The position embedding for a grid of tokens of this size, resized from the one that was trained.

        returns  (1, 1 + height*width, D); the first belongs to the token of the whole picture

        Dosovitskiy et al. (2021), section 3.2, "Fine-tuning and higher resolution".
        """
        whole, grid = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        grid = grid.transpose(1, 2).unflatten(-1, (self.grid, self.grid))  # (1, T, D) -> (1, D, grid, grid)
        grid = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)
        return torch.cat([whole, grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, image: Tensor) -> Tensor:
        """Estimate how near each point of a picture is.

        image    (B, 3, H, W) in [-1, 1], H and W multiples of 32, best with one side near 384
        returns  (B, 1, H, W) inverse depth, at least 0: large is near, in no unit

        Raises ValueError for other sides.
        """
        height, width = image.shape[-2:]
        if height % SIDE_MULTIPLE or width % SIDE_MULTIPLE:
            raise ValueError(f"sides must be multiples of {SIDE_MULTIPLE} for the depth network, got {width}x{height}")
        x, tapped = self.stem(image), []
        for blocks in self.stages:
            x = blocks(x)
            tapped.append(x)
        tapped.pop()  # the last stage goes on as tokens
        height, width = x.shape[-2:]
        tokens = self.patch_proj(x).flatten(2).transpose(1, 2)  # (B, D, H/16, W/16) -> (B, T, D)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.positions(height, width)
        for number, layer in enumerate(self.layers):
            tokens = layer(tokens)
            if number in self.taps:
                tapped.append(self.readouts[self.taps.index(number)](tokens, height, width))
        x = None
        for features, reduce, fusion in reversed(list(zip(tapped, self.reduce, self.fusion, strict=True))):
            x = fusion(reduce(features), x)
        return self.head(x)
