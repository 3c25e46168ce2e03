"""The pictures of a request to OpenAI's API: which part of one is repainted, and what a variation shows."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.families.table import family_named
from sd.app.web.formats import as_base64
from sd.app.web.openai_fields import FieldError
from sd.app.web.uploads import Uploads
from sd.config import ModelConfig
from sd.pipeline.errors import PictureError
from sd.pipeline.settings import IMAGE_GUIDANCE

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Given:
    """A file of a form."""

    name: str
    data: bytes


def add_pictures(fields: dict[str, Any], files: list[Given], config: ModelConfig, folder: Uploads) -> None:
    """Add to a job's fields the picture to begin with, its mask, and what is to be done with them.

    What is transparent in the mask is repainted; in a mask without such a part, what is white. Without a mask, what is
    transparent in the picture is. Without that, too, the whole picture changes: as it is told by a model for editing.
    """
    from sd.pipeline.image.masks import has_hole, mask_from

    images, masks = ([file.data for file in files if file.name == name] for name in ("image", "mask"))
    if unknown := [file.name for file in files if file.name not in ("image", "mask")]:
        raise FieldError(unknown[0], "cannot be used: an edit has an image and a mask.")
    if len(images) != 1 or len(masks) > 1:
        name, number = ("image", len(images)) if len(images) != 1 else ("mask", len(masks))
        raise FieldError(name, f"must be one picture, got {number}.")
    path = folder.add("image", images[0])
    picture = opened("image", path, folder)
    fields["init"] = as_base64(images[0])
    if "prompt" not in fields:
        fields["prompt"] = prompt_of(path)
    if masks:
        mask = opened("mask", folder.add("mask", masks[0]), folder, colour_managed=False)
        masks = [png(mask_from(mask, "hole")) if has_hole(mask) else masks[0]]
    elif has_hole(picture):
        masks = [png(mask_from(picture, "hole"))]
    if masks:
        fields |= {"task": "inpaint", "mask": as_base64(masks[0])}
    elif "editing" in family_named(config.family).tasks:
        fields["task"] = "edit"
        fields.setdefault("image_guidance", IMAGE_GUIDANCE)
        fields.pop("strength", None)
    else:
        fields["task"] = "img2img"


def opened(name: str, path: Path, folder: Uploads, **options: bool) -> "Image.Image":
    """RGB or RGBA. Raises FieldError for what is no picture."""
    from sd.pipeline.image.reading import read_rgba

    try:
        return read_rgba(path, **options)
    except PictureError as error:
        raise FieldError(name, folder.without_paths(str(error)), whole=True) from None


def prompt_of(path: Path) -> str:
    """The prompt that a picture carries; empty if it carries none."""
    from sd.pipeline.image.stored_settings.other_programs import NoSettings, settings_of_texts
    from sd.pipeline.image.stored_settings.texts import read_foreign_texts

    try:
        return settings_of_texts(read_foreign_texts(path)).settings.get("prompt", "")
    except NoSettings:
        return ""


def png(picture: "Image.Image") -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
