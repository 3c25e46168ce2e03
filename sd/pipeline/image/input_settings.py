"""How an input picture and its mask are prepared.

Checked before any picture or weight is read; used in resizing, masks and outpainting.
"""

from dataclasses import dataclass, fields

from sd.config import LARGEST_SIDE
from sd.pipeline.errors import SettingError, nearest, shortened
from sd.pipeline.settings import is_of_type, require_type

MEGAPIXELS = 64  # of the largest picture that is read unless asked otherwise: it takes 1 GB of memory
RESIZE_NAMES = {
    "crop": "Crop and resize",
    "pad": "Resize and fill",
    "stretch": "Just resize",
}  # as other tools say it
SIDES = ("left", "right", "top", "bottom")
MASKED_CONTENTS = ("original", "fill")


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """How many pixels a picture grows by on each side: multiples of 8, not all 0. Raises SettingError."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    def __post_init__(self):
        for side in SIDES:
            pixels = getattr(self, side)
            if not is_of_type(pixels, int):
                shown = shortened(pixels)
                raise SettingError("expand", f"{side}={shown} is not a whole number of pixels, such as {side}=128.")
            require_type("expand", pixels, int, "int")
            if not 0 <= pixels < LARGEST_SIDE:
                raise SettingError("expand", f"{side}={pixels} is out of range: 0 to {LARGEST_SIDE - 8}.")
            if pixels % 8:
                below = pixels - pixels % 8
                raise SettingError(
                    "expand", f"{side}={pixels} is not a multiple of 8. Nearest: {below} or {below + 8}."
                )
        if not any(getattr(self, side) for side in SIDES):
            raise SettingError("expand", "names no pixels to add. Example: left=128,right=64.")

    @classmethod
    def parse(cls, text: str) -> "Expansion":
        """From "left=128,right=64": any of left, right, top and bottom, each once. Raises SettingError."""
        require_type("expand", text, str, "str, such as left=128,right=64")
        given: dict[str, int] = {}
        for part in text.split(","):
            side, equals, number = (word.strip() for word in part.partition("="))
            if not equals:
                raise SettingError("expand", f"{part.strip()[:60]!r} is not SIDE=PIXELS. Example: left=128,right=64.")
            if side not in SIDES:
                raise SettingError("expand", f"{side[:60]!r} {nearest(side, SIDES)}")
            if side in given:
                raise SettingError("expand", f"{side} is given twice.")
            if not (number.isascii() and number.removeprefix("-").isdigit() and len(number) <= 6):
                raise SettingError(
                    "expand", f"{side}={number[:20]} is not a whole number of pixels, such as {side}=128."
                )
            given[side] = int(number)
        return cls(**given)

    def __str__(self) -> str:
        return ",".join(f"{side}={getattr(self, side)}" for side in SIDES if getattr(self, side))


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """How a picture and its mask are prepared. Raises SettingError for invalid values.

    resize_mode     what happens to a picture of another shape: crop, pad or stretch
    invert_mask     repaint the black part instead of the white one
    mask_threshold  0 keeps grey levels; 1 to 255: this level and brighter ones become white, all others black
    mask_blur       radius in pixels, the standard deviation of a Gaussian; 0 to 64
    only_masked     work on the region around the mask only, enlarged to the whole working size
    mask_padding    pixels of the picture around the mask in that region; 0 to 1024
    masked_content  what the repainted part begins with, at a strength below 1: original, or fill, the colours around it
    expand          new area around the picture, or None
    overlap         pixels of the old picture over which the new area fades out; 0 to 256
    invert_depth    dark is near in the depth map that is given, instead of far
    """

    resize_mode: str = "crop"
    invert_mask: bool = False
    mask_threshold: int = 0
    mask_blur: float = 4.0
    only_masked: bool = False
    mask_padding: int = 32
    masked_content: str = "original"
    expand: Expansion | None = None
    overlap: int = 32
    invert_depth: bool = False

    def __post_init__(self):
        for field in fields(self):
            expected = getattr(field.type, "__name__", "Expansion or None")
            require_type(field.name, getattr(self, field.name), field.type, expected)
        for name, allowed in (("resize_mode", RESIZE_NAMES), ("masked_content", MASKED_CONTENTS)):
            if (value := getattr(self, name)) not in allowed:
                raise SettingError(name, f"{value:.60} {nearest(value, allowed)}")
        if self.expand is not None and self.masked_content != "original":
            raise SettingError("masked_content", "does nothing with expand, which fills the new area anyway.")
        largest = {"mask_threshold": 255, "mask_blur": 64, "mask_padding": 1024, "overlap": 256}
        for name, limit in largest.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise SettingError(name, f"{value} is out of range: 0 to {limit}.")
