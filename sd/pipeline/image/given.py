"""What a Python program gives as a picture: a path, a PIL image or an array."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from sd.pipeline.image.reading import MEGAPIXELS, as_rgba, check_size, decoding, read_rgba

ALLOWED = "a path, a PIL image or a uint8 array of shape (H, W), (H, W, 3) or (H, W, 4)"
Given = str | os.PathLike | Image.Image | np.ndarray


def given_picture(
    given: Given, name: str = "picture", *, colour_managed: bool = True, megapixels: float = MEGAPIXELS
) -> Image.Image:
    """A picture in any form that is allowed: RGBA if some pixel is not opaque, otherwise RGB.

    given           a path, a PIL image, or an array: uint8 greys, RGB or RGBA, or bool, where True is white
    name            of the argument, for errors
    colour_managed  whether colours are converted to sRGB
    megapixels      of the largest picture that is read

    Raises PictureError for a file that is not exactly one picture, TypeError for anything else.
    """
    if isinstance(given, str | os.PathLike):
        return read_rgba(Path(given), colour_managed=colour_managed, megapixels=megapixels)
    if isinstance(given, np.ndarray):
        given = _from_array(given, name)
    if not isinstance(given, Image.Image):
        kind = type(given)
        shown = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"{name} is of type {shown}. Give {ALLOWED}.")
    check_size(f"the {name}", given.size, megapixels)
    with decoding(f"the {name}"):
        given.load()
        return as_rgba(f"the {name}", given, colour_managed=colour_managed)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """Raises TypeError for shapes and types that are not allowed."""
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        hint = ""
        if array.dtype.kind == "f":
            hint = " Nothing says which number is white: if it is 1, give (255 * array).round().astype('uint8')."
        raise TypeError(f"{name} is an array of {array.dtype}. Give {ALLOWED}.{hint}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise TypeError(f"{name} is an array of shape {array.shape}. Give {ALLOWED}.")
    return Image.fromarray(np.ascontiguousarray(array))
