"""Convert between the networks' tensors and picture files."""

import io
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sd.files import written_whole
from sd.sampling.init_image import InitImage


def to_images(image: Tensor) -> list[Image.Image]:
    """image (B, 3, H, W) in [-1, 1], values outside are clipped -> B pictures of 8 bits a channel"""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture (RGB) -> (1, 3, H, W) in [-1, 1]; a mask (L) -> (1, 1, H, W) in [0, 1]"""
    values = torch.from_numpy(np.array(picture, dtype=np.float32))
    return values[None, None] / 255 if values.ndim == 2 else values.permute(2, 0, 1)[None] / 127.5 - 1


def init_image_from(picture: Image.Image, mask: Image.Image | None) -> InitImage:
    """The init image of a run, from a picture and its mask at the working size."""
    if mask is None:
        return InitImage(image=to_tensor(picture))
    from sd.pipeline.image.masks import latent_mask

    of_latents = torch.from_numpy(latent_mask(mask))[None, None]
    return InitImage(image=to_tensor(picture), mask=to_tensor(mask), latent_mask=of_latents)


def save_png(picture: Image.Image, path: str | PathLike, texts: Mapping, *, force: bool = False) -> None:
    """Write a PNG with text chunks, by their names: complete, or not at all.

    Raises FileExistsError if the file exists, unless forced.
    """
    with written_whole(Path(path), force=force) as file:
        file.write(png_bytes(picture, texts))


def png_bytes(picture: Image.Image, texts: Mapping) -> bytes:
    """The PNG that `save_png` writes."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def contact_sheet(
    pictures: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] = ()
) -> Image.Image:
    """All pictures on one sheet, row by row; by default with about as many rows as columns.

    labels  what to write under each picture, if anything
    """
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width, height = (max(side) for side in zip(*(picture.size for picture in pictures), strict=True))
    strips = []
    if labels:
        from sd.pipeline.image.labels import label

        strips = [label(text, width) for text in labels]
    row = height + max((strip.height for strip in strips), default=0)
    sheet = Image.new("RGB", (columns * width, rows * row))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * row))
    for i, strip in enumerate(strips):
        sheet.paste(strip, (i % columns * width, i // columns * row + height))
    return sheet
