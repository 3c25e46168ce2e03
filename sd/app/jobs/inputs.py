"""The picture that a run begins with, its mask or depth map: read, sized for the networks, noted in what is made."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sd.app.errors import UsageError
from sd.app.jobs.request import JobRequest
from sd.pipeline.image.canvas import Canvas, depth_to_image, image_to_image, inpainting
from sd.pipeline.image.input_settings import RESIZE_NAMES, InputSettings
from sd.pipeline.image.masks import RULES, faint_note, mask_from, rule_for
from sd.pipeline.image.reading import MEGAPIXELS, flatten, read_rgba
from sd.pipeline.settings import Settings

if TYPE_CHECKING:
    from sd.config import ModelConfig


@dataclass(frozen=True)
class Inputs:
    """An init image (RGB or RGBA), a mask (L) and a depth map (F) that were read, and the request that names them.

    notes  what there is to say about how they are used
    """

    request: JobRequest
    picture: Image.Image
    mask: Image.Image | None
    notes: tuple[str, ...] = ()
    depth: Image.Image | None = None

    @property
    def settings(self) -> InputSettings:
        return self.request.inputs or InputSettings()

    def canvas(self, native: int) -> Canvas:
        """Both at the working size: the size asked for, else the picture's own or near the model's native size."""
        size = working_size(self.request.settings)
        if self.request.task == "inpainting":
            return inpainting(self.picture, self.mask, size, native, self.settings)
        picture = flatten(self.picture, "white")
        if self.request.task == "depth to image":
            return depth_to_image(picture, self.depth, size, native, self.settings)
        return image_to_image(picture, size, native, self.settings)

    def check_depth(self, config: "ModelConfig") -> None:
        """Raises UsageError if the run needs a depth map that neither the request nor the model gives."""
        if self.request.task == "depth to image" and self.depth is None and config.depth is None:
            raise UsageError(
                f"{self.request.model.file.name} has no depth network to estimate the depth. Give a depth map with "
                "--depth IMAGE."
            )

    def labels(self) -> dict[str, object]:
        """What a made picture says of them, by the names that other tools have for it."""
        settings = self.settings
        found: dict[str, object] = {}
        if working_size(self.request.settings):
            found["Resize mode"] = RESIZE_NAMES[settings.resize_mode]
        if self.request.task != "inpainting":
            return found
        if settings.expand is not None:
            return found | {"Outpaint": str(settings.expand), "Outpaint overlap": settings.overlap}
        found["Mask blur"] = f"{settings.mask_blur:g}"
        if settings.invert_mask:
            found["Mask mode"] = "Inpaint not masked"
        if settings.mask_threshold:
            found["Mask threshold"] = settings.mask_threshold
        if settings.masked_content != "original":
            found["Masked content"] = settings.masked_content
        if settings.only_masked:
            found |= {"Inpaint area": "Only masked", "Masked area padding": settings.mask_padding}
        return found

    def exact(self) -> dict[str, object]:
        """The same exactly, with the files' names and hashes."""
        request, settings = self.request, self.settings
        names = ["resize_mode"]
        if request.task == "inpainting":
            names += ["only_masked", "mask_padding"]
            names += ["overlap"] if settings.expand else ["invert_mask", "mask_threshold", "mask_blur"]
        names += ["masked_content"] if settings.masked_content != "original" else []
        found = {"init": file_facts(request.init), **{name: getattr(settings, name) for name in names}}
        if settings.expand:
            found["expand"] = str(settings.expand)
        elif request.mask is not None:
            found["mask"] = file_facts(request.mask)
        if request.depth is not None:
            found |= {"depth": file_facts(request.depth), "invert_depth": settings.invert_depth}
        return found


def read_inputs(request: JobRequest) -> Inputs:
    """Raises PictureError for a file that cannot be read, UsageError or SettingError for an impossible size."""
    working_size(request.settings)
    allow(request.max_megapixels)
    picture = read_rgba(request.init, megapixels=request.max_megapixels)
    if request.mask is None:
        white = f"{request.init.name}: transparent parts are laid on white"
        depth = None if request.depth is None else read_depth(request)
        return Inputs(request, picture, None, () if picture.mode == "RGB" else (white,), depth)
    mask = read_rgba(request.mask, colour_managed=False, megapixels=request.max_megapixels)
    rule = rule_for(mask, picture)
    mask = mask_from(mask, rule)
    notes = [RULES[rule], None if request.inputs and request.inputs.mask_threshold else faint_note(mask)]
    return Inputs(request, picture, mask, tuple(f"{request.mask.name}: {note}" for note in notes if note))


def read_depth(request: JobRequest) -> Image.Image:
    from sd.pipeline.image.depth_maps import given_depth_map

    invert = bool(request.inputs and request.inputs.invert_depth)
    return given_depth_map(request.depth, invert=invert, megapixels=request.max_megapixels)


def allow(megapixels: float) -> None:
    """Let Pillow read pictures of that many megapixels, if that is more than usual. Holds for the process."""
    if megapixels > MEGAPIXELS:
        Image.MAX_IMAGE_PIXELS = None  # what is read here has the limit that was asked for


def working_size(settings: Mapping[str, object]) -> tuple[int, int] | None:
    """The size that is asked for, None where there is none. Raises SettingError for one that is not possible."""
    width, height = settings.get("width"), settings.get("height")
    if (width is None) != (height is None):
        raise UsageError("--width and --height go together here. Give both, or none for the picture's own size.")
    if width is None:
        return None
    Settings(prompt="", seed=0, width=width, height=height)  # raises SettingError
    return width, height


def file_facts(path: Path) -> dict[str, str]:
    """What a made picture says of a file that it was made from."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
