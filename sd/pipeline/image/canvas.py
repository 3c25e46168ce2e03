"""Bring an input picture to the working size, and the result back: before and after image to image and inpainting."""

from dataclasses import dataclass, replace

from PIL import Image

from sd.pipeline.image.input_settings import InputSettings
from sd.pipeline.image.masks import has_hole, masked_region, match, paste_back, prepare
from sd.pipeline.image.outpainting import expand
from sd.pipeline.image.reading import PictureError, flatten
from sd.pipeline.image.resizing import Placement, Size, fit, natural

HOLE_HINT = " This picture has a transparent part: to repaint that, give the picture as its own mask."


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """picture (RGB), mask (L, of the same size, 255 is repainted, or None), and their place at the working size.

    begins_with  what the run begins with in place of the picture (RGB, of the same size), or None
    reads_depth  whether the model also reads the depth of the picture
    depth_map    of floats (F), of the same size, large is near; None: it is estimated
    """

    picture: Image.Image
    mask: Image.Image | None
    placement: Placement
    begins_with: Image.Image | None = None
    reads_depth: bool = False
    depth_map: Image.Image | None = None

    @property
    def working_picture(self) -> Image.Image:
        return self.placement.place(self.begins_with or self.picture)

    @property
    def working_mask(self) -> Image.Image | None:
        return None if self.mask is None else self.placement.place(self.mask)

    @property
    def working_depth(self) -> Image.Image | None:
        return None if self.depth_map is None else self.placement.place(self.depth_map)

    def finish(self, made: Image.Image) -> Image.Image:
        """The networks' picture -> the result: without padding, or pasted into the whole picture."""
        if self.mask is None:
            return self.placement.cut(made)
        return paste_back(self.picture, made, self.mask, self.placement)


def size_from(size: Size | None, width: int | None, height: int | None) -> Size | None:
    """The working size that is asked for in either form. Raises ValueError for one side or both forms, TypeError."""
    if width is not None or height is not None:
        if size is not None:
            raise ValueError("give either size=(width, height), or width and height, not both")
        if width is None or height is None:
            raise ValueError("width and height go together here; give both, or neither for the picture's own size")
        size = (width, height)
    if size is None:
        return None
    if not (isinstance(size, tuple | list) and len(size) == 2 and all(hasattr(side, "__index__") for side in size)):
        raise TypeError(f"a working size is (width, height) in whole pixels, such as (512, 512); got {size!r}")
    return tuple(size)


def image_to_image(picture: Image.Image, size: Size | None, native: int, settings: InputSettings) -> Canvas:
    """The canvas for image to image, which changes all of a picture.

    size    the working size; None for one that fits the picture
    native  side of the squares that the model was trained on
    """
    placement = natural(picture.size, native) if size is None else fit(picture.size, size, settings.resize_mode)
    return Canvas(picture=picture, mask=None, placement=placement)


def depth_to_image(
    picture: Image.Image, depth_map: Image.Image | None, size: Size | None, native: int, settings: InputSettings
) -> Canvas:
    """The canvas for a picture with the depth of another.

    depth_map  of floats (F), large is near; None: the depth is estimated from the picture

    Raises PictureError if the depth map has another shape than the picture.
    """
    canvas = image_to_image(picture, size, native, settings)
    depth_map = depth_map and match(depth_map, picture.size, "depth map")
    return replace(canvas, reads_depth=True, depth_map=depth_map)


def inpainting(
    picture: Image.Image, mask: Image.Image | None, size: Size | None, native: int, settings: InputSettings
) -> Canvas:
    """The canvas for repainting where the mask is white, or for what the settings add around the picture.

    picture  RGB, or RGBA, which is laid on white

    Raises PictureError if nothing would be repainted, or if a part of it would be cropped.
    """
    if (mask is None) == (settings.expand is None):
        hole = HOLE_HINT if mask is None and has_hole(picture) else ""
        raise PictureError(f"inpainting takes either a mask or sides to expand. Give one of the two.{hole}")
    picture = flatten(picture, "white")
    if settings.expand is None:
        mask = prepare(
            match(mask, picture.size),
            invert=settings.invert_mask,
            threshold=settings.mask_threshold,
            blur=settings.mask_blur,
        )
    else:
        picture, mask = expand(picture, settings.expand, settings.overlap)
    if settings.only_masked:
        placement = masked_region(mask, size or (native, native), settings.mask_padding)
    elif size is None:
        placement = natural(picture.size, native)
    else:
        placement = fit(picture.size, size, settings.resize_mode)
    if not placement.covers(mask):
        raise PictureError(
            "a part of what is to be repainted would be cropped off. Use --resize-mode pad, or --only-masked."
        )
    begins_with = None
    if settings.masked_content == "fill":
        from sd.pipeline.image.filling import filled

        begins_with = filled(picture, mask)
    return Canvas(picture=picture, mask=mask, placement=placement, begins_with=begins_with)
