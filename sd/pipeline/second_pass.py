"""Two passes: a small picture first, whose layout the model is good at, then the same one larger, with details.

The sizes and steps of the second pass, which is image to image. Nothing here needs torch.
"""

import math
import re

UPSCALES = {"latent": "Latent", "image": "Lanczos"}  # ours -> as other tools write it
MOST_DIFFERENT = 1.05  # ratio of the shapes of the two passes

Size = tuple[int, int]  # width, height


def parse(value: float | str | list | tuple) -> float | Size:
    """A factor (2, "2", "2x"), or a size ("1024x768", [1024, 768]). Raises ValueError with what is allowed."""
    if isinstance(value, str):
        size = re.fullmatch(r"([0-9]{1,5})[xX×]([0-9]{1,5})", value.strip())
        factor = re.fullmatch(r"([0-9]{1,3}(\.[0-9]{1,6})?)[xX×]?", value.strip())
        if size:
            return int(size[1]), int(size[2])
        if factor:
            return float(factor[1])
    elif isinstance(value, list | tuple):
        if len(value) == 2:
            return tuple(value)
    else:
        return float(value)
    shown = f"{value:.40}" if isinstance(value, str) else value
    raise ValueError(f"{shown} is neither a factor such as 2 nor a size such as 1024x768.")


def second_size(value: float | str | list | tuple, width: int, height: int) -> Size:
    """The size of the second pass after a first one of this width and height. Raises ValueError where it cannot be."""
    wanted = parse(value)
    if isinstance(wanted, float):
        if not 1 < wanted <= 16:
            raise ValueError(f"{wanted:g} is out of range: a factor above 1, up to 16.")
        return 8 * round(width * wanted / 8), 8 * round(height * wanted / 8)
    shown = f"{wanted[0]}x{wanted[1]}"
    if any(side % 8 for side in wanted):
        near = "x".join(str(max(8, 8 * round(side / 8))) for side in wanted)
        raise ValueError(f"{shown} has a side that is no multiple of 8. Nearest: {near}.")
    if wanted[0] < width or wanted[1] < height or wanted == (width, height):
        raise ValueError(f"{shown} is not larger than the first pass, {width}x{height}.")
    shape = (wanted[0] / wanted[1]) / (width / height)
    if not 1 / MOST_DIFFERENT < shape < MOST_DIFFERENT:
        raise ValueError(
            f"{shown} has another shape than the first pass, {width}x{height}. Leave width and height out, or give "
            "some of that shape."
        )
    return wanted


def first_size(value: float | str | list | tuple | None, native: int) -> Size:
    """The size of the first pass where none is asked for: as many pixels as the model was trained on, in that shape."""
    try:
        wanted = 1.0 if value is None else parse(value)
    except ValueError:
        wanted = 1.0  # refused with the other settings
    if isinstance(wanted, float) or min(wanted) < 1:
        return native, native
    scale = math.sqrt(native**2 / (wanted[0] * wanted[1]))
    return tuple(max(64, 8 * round(side * scale / 8)) for side in wanted)
