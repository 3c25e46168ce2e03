"""Between the networks' tensors and picture files."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sd.files import written_whole


def to_images(image: Tensor) -> list[Image.Image]:
    """image (B, 3, H, W) in [-1, 1], values outside are clipped -> B pictures of 8 bits a channel"""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def save_png(picture: Image.Image, path: Path, texts: dict[str, str], *, force: bool = False) -> None:
    """Write a PNG with text chunks: complete, or not at all.

    Raises FileExistsError where there is such a file already, unless forced.
    """
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    with written_whole(path, force=force) as file:
        picture.save(file, "PNG", pnginfo=info)


def contact_sheet(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All pictures on one sheet, row by row; about as many rows as columns unless those are given."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = (max(side) for side in zip(*(picture.size for picture in pictures), strict=True))
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
