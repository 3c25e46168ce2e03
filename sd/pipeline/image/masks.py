"""Masks: which pixels are repainted. White (255) is repainted, black (0) is kept bit for bit, grey is mixed.

mask = prepare(match(mask_from(read_rgba(path, colour_managed=False)), picture.size), blur=4)
placement = masked_region(mask, (512, 512), padding=32)      # or fit(...), natural(...) for the whole picture
made = ... placement.place(picture), latent_mask(placement.place(mask)) ...
result = paste_back(picture, made, mask, placement)
"""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from sd.pipeline.image.reading import PictureError, flatten
from sd.pipeline.image.resizing import Placement, Size, fit, resized

FAINT = 32  # a mask without brighter levels lets at most an eighth of the new picture through
INVISIBLE = 8  # a blurred mask without brighter levels changes nothing that can be seen
SAMPLE = 256  # pixels of a side that are looked at to tell photographs from drawings
RULES = {  # how a picture becomes a mask -> what to tell, None for the plain way
    "levels": None,
    "strokes": "the strokes in the mask are repainted, whatever their colour; its empty part is kept",
    "drawing": "white in the mask is repainted; its black and its transparent parts are kept",
    "hole": "the mask is a picture with a transparent part, and that part is repainted",
}


def has_hole(picture: Image.Image) -> bool:
    """Whether some pixel of a picture (RGB or RGBA) is more transparent than not."""
    return picture.mode == "RGBA" and picture.getchannel("A").getextrema()[0] < 128


def mask_from(picture: Image.Image, rule: str | None = None) -> Image.Image:
    """A picture (RGB or RGBA) -> a mask (L), by a rule of `RULES`; by default the one that fits."""
    rule = rule or rule_for(picture)
    if rule == "strokes":
        return picture.getchannel("A")
    if rule == "hole":
        return ImageChops.invert(picture.getchannel("A"))
    return flatten(picture, "black").convert("L")


def rule_for(picture: Image.Image, init: Image.Image | None = None) -> str:
    """How a picture (RGB or RGBA) is meant as a mask: the name of a rule of `RULES`.

    init  the picture that is to be repainted (RGB or RGBA)

    levels   no pixel is transparent, or hardly: grey levels
    hole     as transparent as the init picture; or a photograph: many colours, or flat ones on more than half of it
    strokes  everything visible has one colour; or few colours on an empty layer
    drawing  black and white
    """
    if picture.mode == "RGB":
        return "levels"
    opacity = picture.getchannel("A")
    if opacity.getextrema()[0] > 255 - FAINT:
        return "levels"
    is_of_init = init is not None and init.mode == "RGBA" and init.size == picture.size
    if is_of_init and ImageChops.difference(opacity, init.getchannel("A")).getbbox() is None:
        return "hole"
    if _has_one_colour(picture):
        return "strokes"
    width, height = (min(side, SAMPLE) for side in picture.size)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.NEAREST)).reshape(-1, 4)
    visible = pixels[pixels[:, 3] >= 128, :3]
    if not len(visible):
        return "strokes"
    is_grey = np.ptp(visible.astype(np.int16), axis=1) <= 8
    is_end = (visible.max(axis=1) <= 16) | (visible.min(axis=1) >= 239)
    if is_grey.all() and is_end.mean() >= 0.5:
        return "drawing"
    counts = np.sort(np.unique(visible, axis=0, return_counts=True)[1])
    is_flat = counts[-8:].sum() >= 0.9 * len(visible)
    return "strokes" if is_flat and len(visible) < len(pixels) / 2 else "hole"


def _has_one_colour(picture: Image.Image) -> bool:
    """Whether no pixel (RGBA) looks more than one level different from the most opaque one, on any background."""
    pixels = np.asarray(picture)
    solid = pixels.reshape(-1, 4)[pixels[:, :, 3].argmax(), :3].astype(np.int16)
    for row in range(0, len(pixels), 64):  # in parts: the numbers take more memory than the picture
        part = pixels[row : row + 64].astype(np.int32)
        if (np.abs(part[:, :, :3] - solid) * part[:, :, 3:]).max() > 255:
            return False
    return True


def faint_note(mask: Image.Image) -> str | None:
    """What to tell of a mask (L) that lets less than half of the new picture through everywhere."""
    brightest = mask.getextrema()[1]
    if not FAINT <= brightest < 128:
        return None
    return (
        f"its brightest level is {brightest} of 255, so at most {brightest / 2.55:.0f} % of the new picture shows; "
        "--mask-threshold N makes levels from N on white"
    )


def match(mask: Image.Image, size: Size, name: str = "mask") -> Image.Image:
    """The mask, or depth map, at the size of its picture. Raises PictureError if it has another shape."""
    (width, height), (wanted_width, wanted_height) = mask.size, size
    # sides that were rounded to whole pixels differ by half a pixel
    if abs(width * wanted_height - height * wanted_width) > (wanted_width + wanted_height) / 2:
        raise PictureError(
            f"the {name} is {width}x{height} and the picture {wanted_width}x{wanted_height}. "
            f"Give a {name} of the same size, or at least of the same shape."
        )
    return resized(mask, size)


def prepare(mask: Image.Image, *, invert: bool = False, threshold: int = 0, blur: float = 0) -> Image.Image:
    """Invert a mask (L), make it black and white, then blur it, as far as asked for.

    threshold  0 keeps grey levels; 1 to 255: this level and brighter ones become white, all others black
    blur       radius in pixels, the standard deviation of a Gaussian; no pixel farther than three of it changes

    Raises PictureError if nothing is left to repaint, or if a threshold leaves nothing to keep.
    """
    brightest = mask.getextrema()[1]
    if 0 < brightest < FAINT and not threshold:
        kept = f"inverting it would repaint {'all' if brightest < INVISIBLE else 'nearly all'} of the picture"
        raise PictureError(
            f"the mask's brightest level is {brightest} of 255, so "
            + (kept if invert else "next to nothing would be repainted")
            + f". If its levels are labels, or 1 for true, --mask-threshold {255 if invert else 1} makes it black and "
            "white."
        )
    darkest = mask.getextrema()[0]
    if invert:
        mask = ImageChops.invert(mask)
    if threshold:
        mask = mask.point([255 if level >= threshold else 0 for level in range(256)])
    turned = "after inverting it, " if invert else ""
    below = f" at threshold {threshold}" if threshold else ""
    levels = f" Its levels are {darkest} to {brightest}." if threshold else ""
    if mask.getbbox() is None:
        raise PictureError(
            f"{turned}the mask is black everywhere{below}, so nothing would be repainted.{levels} Paint white what is "
            f"to change{'' if invert else ', or invert the mask with --invert-mask'}."
        )
    if threshold and darkest != brightest and mask.getextrema()[0] == 255:
        raise PictureError(
            f"{turned}the mask is white everywhere{below}, so nothing would be kept.{levels} Give a higher threshold."
        )
    if not blur:
        return mask
    blurred = mask.filter(ImageFilter.GaussianBlur(blur))
    if blurred.getextrema()[1] < INVISIBLE <= mask.getextrema()[1]:
        raise PictureError(f"what is white in the mask is so small that --mask-blur {blur:g} wipes it out. Use less.")
    return blurred


def latent_mask(mask: Image.Image, factor: int = 8) -> np.ndarray:
    """The mask of the latents: a latent is repainted as much as the most repainted of its pixels.

    mask     (L) of the working size, sides multiples of the factor
    factor   pixels per latent along one side
    returns  (H / factor, W / factor) float32 in [0, 1]; `> 0` gives every latent that any repainted pixel depends on

    Raises ValueError for other sizes.
    """
    width, height = mask.size
    if width % factor or height % factor:
        raise ValueError(
            f"mask sides must be multiples of {factor} (one latent per {factor}x{factor}), got {width}x{height}"
        )
    cells = np.asarray(mask).reshape(height // factor, factor, width // factor, factor)
    return cells.max(axis=(1, 3)).astype(np.float32) / 255


def masked_region(mask: Image.Image, working: Size, padding: int) -> Placement:
    """Place the region around the mask at the working size, as large as possible.

    mask     (L) as large as the picture, not black everywhere
    padding  pixels of the picture around the bounds of the mask

    The region grows to the shape of the working size, and moves to stay inside the picture. If the picture is too
    narrow for that shape, the rest of the working size is padding.
    """
    bounds = mask.getbbox()
    assert bounds is not None, "prepare refuses a mask that is black everywhere"
    left, top = (max(0, low - padding) for low in bounds[:2])
    right, bottom = (min(side, high + padding) for side, high in zip(mask.size, bounds[2:], strict=True))
    width, height = right - left, bottom - top
    width, height = (
        max(width, _ceil(height * working[0], working[1])),
        max(height, _ceil(width * working[1], working[0])),
    )
    left, right = _grown(left, right, width, mask.width)
    top, bottom = _grown(top, bottom, height, mask.height)
    size = right - left, bottom - top
    has_shape = abs(size[0] * working[1] - size[1] * working[0]) <= max(working)  # to a pixel
    inside = fit(size, working, "stretch" if has_shape else "pad")
    return replace(inside, picture=mask.size, taken=(left, top, right, bottom))


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _grown(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """The interval from low to high, grown equally at both ends, but kept between 0 and the limit."""
    length = min(length, limit)
    start = min(max(0, low - (length - (high - low)) // 2), limit - length)
    return start, start + length


def composite(picture: Image.Image, made: Image.Image, mask: Image.Image) -> Image.Image:
    """The new picture where the mask is white, the old one, bit for bit, where it is black.

    picture, made  RGB, 8 bits, of one size
    mask           L, of that size; a level m gives (m * made + (255 - m) * picture) / 255, rounded
    """
    return Image.composite(made, picture, mask)


def paste_back(picture: Image.Image, made: Image.Image, mask: Image.Image, placement: Placement) -> Image.Image:
    """Paste a result of the working size into the whole picture; where the mask is 0, not a bit changes.

    picture, mask  RGB and L, as large as the placement's picture
    made           RGB, of the working size
    """
    whole = picture.copy()
    whole.paste(placement.back(made), placement.taken[:2])
    return composite(picture, whole, mask)
