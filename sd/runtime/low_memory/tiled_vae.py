"""The VAE in tiles, so that its memory does not grow with the size of the picture.

At the resolution of the latents, the whole picture is processed at once: features there take a 16th, or less, of the
memory they take at that of the pixels, and the attention in the middle needs all of them. Between the two, one layer
runs at a time, tile by tile; the features of the whole picture wait in temporary files.

So nothing is estimated or blended: convolutions read a tile with a margin, and group norms use the mean and variance of
the whole picture. The result is the same up to the order of floating-point sums, and no layer runs twice.

B batch, C channels, G groups of a group norm, H W height and width.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.networks.vae import VAE, Decoder, Downsample, Encoder, ResidualBlock, Upsample
from sd.runtime.patching import patched


def decode_tiled(vae: VAE, latents: Tensor, *, tile: int = 64, axes: str = "") -> Tensor:
    """`VAE.decode` in the memory of one tile, without gradients.

    latents  (B, 4, H, W), unscaled; decoded as usual if they fit one tile
    tile     side of the largest tile, in latents
    axes     the axes along which the VAE is currently patched by `sd.runtime.seamless.seamless`
    returns  image (B, 3, 8H, 8W), about [-1, 1]

    Raises ValueError for a tile without latents, and OSError without room for the temporary files: for SD v1 in
    float32, 131 KB per latent, 2.1 GB for 1024x1024 pixels.
    """
    if tile < 1:
        raise ValueError(f"tile must be 1 latent or more, got {tile}")
    if max(latents.shape[-2:]) <= tile:
        return vae.decode(latents)
    with patched({vae.decoder: lambda x: _decode(vae.decoder, x, tile, axes)}):
        return vae.decode(latents)


def encode_tiled(vae: VAE, image: Tensor, *, tile: int = 512, axes: str = "") -> tuple[Tensor, Tensor]:
    """`VAE.encode` in the memory of one tile, without gradients.

    image       (B, 3, 8H, 8W) in [-1, 1]; encoded as usual if it fits one tile
    tile, axes  as in `decode_tiled`; the tile in pixels
    returns     mean and log-variance of the latents, each (B, 4, H, W)

    Raises ValueError for a tile without latents and for sides that are not multiples of 8, and OSError without room for
    the temporary files: for SD v1 in float32, 66 KB per latent, 1.1 GB for 1024x1024 pixels.
    """
    factor = 2 ** (len(vae.encoder.down) - 1)
    height, width = image.shape[-2:]
    if tile < factor:
        raise ValueError(f"tile must be {factor} pixels or more (one latent), got {tile}")
    if max(height, width) <= tile:
        return vae.encode(image)
    if height % factor or width % factor:
        allowed = f"multiples of {factor} (one latent per {factor}x{factor})"
        raise ValueError(f"image sides must be {allowed}, got {width}x{height}")
    with patched({vae.encoder: lambda x: _encode(vae.encoder, x, tile, axes)}):
        return vae.encode(image)


@torch.no_grad()
def _decode(decoder: Decoder, x: Tensor, tile: int, axes: str) -> Tensor:
    """`Decoder.forward`, in tiles after the first level's residual blocks. tile in latents."""
    tiles = Tiles(*(-(-side // tile) for side in x.shape[-2:]), axes, x.device)
    first, *levels = reversed(decoder.up)
    x = tiles.through(first.resample, first.residuals(decoder.mid(decoder.conv_in(x))))
    for level in levels:
        for block in level.residuals:
            x = _residual(block, x, tiles)
        if isinstance(level.resample, Upsample):
            x = tiles.through(level.resample, x)
    return _normalised_convolution(decoder.norm_out, decoder.conv_out, x, tiles).to(tiles.device)


@torch.no_grad()
def _encode(encoder: Encoder, x: Tensor, tile: int, axes: str) -> Tensor:
    """`Encoder.forward`, in tiles up to the last level's residual blocks. tile in pixels."""
    tiles = Tiles(*(-(-side // tile) for side in x.shape[-2:]), axes, x.device)
    *levels, last = encoder.down
    x = tiles.through(encoder.conv_in, x)
    for level in levels:
        for block in level.residuals:
            x = _residual(block, x, tiles)
        x = tiles.through(level.resample, x)
    x = encoder.mid(last.residuals(x.to(tiles.device)))
    return encoder.conv_out(F.silu(encoder.norm_out(x)))


def _residual(block: ResidualBlock, x: Tensor, tiles: "Tiles") -> Tensor:
    """`ResidualBlock.forward`; without a convolution in the shortcut, the result takes the place of x."""
    h = _normalised_convolution(block.norm1, block.conv1, x, tiles)
    x = x if isinstance(block.skip, nn.Identity) else tiles.through(block.skip, x)
    return _normalised_convolution(block.norm2, block.conv2, h, tiles, onto=x)


def _normalised_convolution(
    norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, tiles: "Tiles", onto: Tensor | None = None
) -> Tensor:
    with patched({norm: normalising(norm, *tiles.statistics(x, norm.num_groups))}):
        return tiles.through(nn.Sequential(norm, nn.SiLU(), conv), x, onto)


@dataclass(frozen=True)
class Tiles:
    """How a picture is divided, in the same way at every resolution.

    rows, columns  numbers of tiles; the sides of tiles differ by at most one position
    axes           any of "x" and "y": along these, the picture continues at its opposite edge
    device         where tiles are computed
    """

    rows: int
    columns: int
    axes: str
    device: torch.device

    def of(self, height: int, width: int) -> Iterator[tuple[range, range]]:
        """Rows and columns of each tile."""
        return product(split(height, self.rows), split(width, self.columns))

    def through(self, layer: nn.Module, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Apply a layer to x (B, C, H, W) tile by tile. The result is in a temporary file, or is added to `onto`."""
        height, width = x.shape[-2:]
        result = onto
        for rows, columns in self.of(scaled(layer, height), scaled(layer, width)):
            above, before = reads(layer, rows), reads(layer, columns)
            above = above if "y" in self.axes else inside(above, height)
            before = before if "x" in self.axes else inside(before, width)
            tile = layer(cut(x, above, before).to(self.device))
            top, left = rows.start - scaled(layer, above.start), columns.start - scaled(layer, before.start)
            tile = tile[..., top : top + len(rows), left : left + len(columns)]
            if result is None:
                result = in_file((*tile.shape[:2], scaled(layer, height), scaled(layer, width)), tile.dtype)
            place = result[..., rows.start : rows.stop, columns.start : columns.stop]
            place.copy_(tile if onto is None else place.to(self.device) + tile)
        return result

    def statistics(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each picture and group, each (B, G) in float64."""
        moments = torch.zeros(2, len(x), groups, dtype=torch.float64, device="cpu")
        for rows, columns in self.of(*x.shape[-2:]):
            tile = x[..., rows.start : rows.stop, columns.start : columns.stop].to(self.device)
            tile = tile.unflatten(1, (groups, -1)).float()  # (B, C, H, W) -> (B, G, C / G, H, W)
            mean = tile.mean((2, 3, 4), keepdim=True)
            variance = (tile - mean).square().mean((2, 3, 4))
            mean, variance = mean.flatten(1).cpu().double(), variance.cpu().double()
            moments += torch.stack([mean, variance + mean**2]) * (len(rows) * len(columns) / x[0, 0].numel())
        return moments[0], moments[1] - moments[0] ** 2


def normalising(norm: nn.GroupNorm, mean: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
    """The forward function of a group norm, with mean and variance given, each (B, G).

    Wu & He, "Group Normalization" (2018), eq. 1 and 6.
    """
    repeats = norm.num_channels // norm.num_groups
    mean, deviation = (values.repeat_interleave(repeats, dim=1) for values in (mean, (variance + norm.eps).sqrt()))
    scale = norm.weight.cpu() / deviation
    shift = norm.bias.cpu() - mean * scale
    scale, shift = (values[..., None, None].float().to(norm.weight.device) for values in (scale, shift))  # (B, C, 1, 1)
    return lambda x: torch.addcmul(shift, x, scale).to(x.dtype)


def split(side: int, count: int) -> list[range]:
    return [range(start, stop) for start, stop in pairwise(side * i // count for i in range(count + 1))]


def reads(layer: nn.Module, positions: range) -> range:
    """The input positions that a layer needs for these outputs; each has one 3x3 or 1x1 convolution."""
    start, stop = positions.start, positions.stop
    if isinstance(layer, Upsample):  # doubles positions before its convolution
        return range((start - 1) // 2, stop // 2 + 1)
    if isinstance(layer, Downsample):  # stride 2, each window begins at 2 * position
        return range(2 * start, 2 * stop + 1)
    return range(start - 1, stop + 1)


def scaled(layer: nn.Module, position: int) -> int:
    """The output position of a layer for an input position."""
    if isinstance(layer, Upsample):
        return 2 * position
    return position // 2 if isinstance(layer, Downsample) else position


def inside(positions: range, side: int) -> range:
    return range(max(positions.start, 0), min(positions.stop, side))


def cut(x: Tensor, rows: range, columns: range) -> Tensor:
    """These rows and columns of (B, C, H, W), wrapping around at the edges."""
    height, width = x.shape[-2:]
    if inside(rows, height) == rows and inside(columns, width) == columns:
        return x[..., rows.start : rows.stop, columns.start : columns.stop]
    rows = torch.tensor([row % height for row in rows], dtype=torch.int64, device=x.device)
    columns = torch.tensor([column % width for column in columns], dtype=torch.int64, device=x.device)
    return x[..., rows[:, None], columns]


def folder_on_disk() -> str:
    """The folder for temporary files: TMPDIR, or /var/tmp, since many systems keep /tmp in memory."""
    own = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return tempfile.gettempdir() if own or not os.access("/var/tmp", os.W_OK) else "/var/tmp"


def in_file(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in a memory-mapped temporary file, which has no name and is deleted with the tensor."""
    size = math.prod(shape) * dtype.itemsize
    folder = folder_on_disk()
    with tempfile.TemporaryFile(prefix="sd-", dir=folder) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a sparse file could fill the disk later, which ends the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as problem:
            raise OSError(
                f"{size / 1e9:.1f} GB of a picture in tiles do not fit into {folder} "
                f"({problem.strerror}). Make room there, or name another folder in TMPDIR."
            ) from problem
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).reshape(shape)
