"""What the web UI's API does with finished pictures: read their settings, and enlarge them."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sd.app.errors import UsageError
from sd.app.web.a1111_lists import UPSCALERS
from sd.app.web.a1111_values import OFF, chosen, number, refuse
from sd.app.web.formats import as_base64
from sd.app.web.http import in_thread, json_body
from sd.app.web.uploads import uploads
from sd.config import LARGEST_SIDE
from sd.pipeline.errors import nearest
from sd.pipeline.image.stored_settings.settings_line import parts_of

if TYPE_CHECKING:
    from PIL import Image

TEXTS = ("parameters", "UserComment")  # where the web UI writes settings
REPAIRS = ("gfpgan_visibility", "codeformer_visibility")


async def png_info(request: Request) -> Response:
    return JSONResponse(await in_thread(settings_in_picture, body_of(await json_body(request)).get("image")))


def settings_in_picture(image: object) -> dict[str, object]:
    """The text of settings in a picture, all texts in it, and the former taken apart."""
    from sd.pipeline.image.stored_settings.texts import read_foreign_texts

    with uploads() as folder:
        texts = read_foreign_texts(folder.add_text("image", image))
        folder.cleanup()
    info = next((texts[name] for name in TEXTS if name in texts), "")
    parts = parts_of(info)
    parameters = {"Prompt": parts.prompt, "Negative prompt": parts.negative_prompt, **parts.values} if info else {}
    del texts["pixels"]
    return {"info": info, "items": texts, "parameters": parameters}


async def extra_single_image(request: Request) -> Response:
    body = body_of(await json_body(request))
    return JSONResponse({"html_info": "", "image": await in_thread(enlarged, body, body.get("image"))})


async def extra_batch_images(request: Request) -> Response:
    body = body_of(await json_body(request))
    rows = body.get("imageList")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError('imageList must be a list of objects such as {"data": "...", "name": "a.png"}.')
    images = [await in_thread(enlarged, body, row.get("data")) for row in rows]
    return JSONResponse({"html_info": "", "images": images})


def body_of(body: object) -> dict[str, object]:
    if not isinstance(body, dict):
        raise UsageError("the body must be a JSON object.")
    return body


def enlarged(body: Mapping[str, object], image: object) -> str:
    """A picture at another size, by a filter: there are no networks for that here."""
    from sd.pipeline.image.reading import read_rgba

    for name in REPAIRS:
        refuse(name, body.get(name), OFF, "networks that repair faces are not supported")
    if number(body, "extras_upscaler_2_visibility", 0.0, float):
        refuse("upscaler_2", chosen(body, "upscaler_2"), OFF, "results of two are not mixed")
    name = chosen(body, "upscaler_1") or "None"
    if name not in UPSCALERS:
        raise UsageError(f"upscaler_1 {name[:60]} {nearest(name, UPSCALERS)}")
    with uploads() as folder:
        picture = read_rgba(folder.add_text("image", image))
        folder.cleanup()
    if name != "None":
        picture = resized(picture, body, name)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return as_base64(file.getvalue())


def resized(picture: "Image.Image", body: Mapping[str, object], name: str) -> "Image.Image":
    """By a factor, or to a size: then cropped to its shape, or as large as fits into it."""
    from PIL import Image

    wanted = [number(body, f"upscaling_resize_{side}", 512) for side in "wh"]
    factor = number(body, "upscaling_resize", 2.0, float)
    to_size, crop = number(body, "resize_mode", 0) == 1, body.get("upscaling_crop", True)
    if to_size:
        factors = [side / own for side, own in zip(wanted, picture.size, strict=True)]
        factor = max(factors) if crop else min(factors)
    size = [max(1, round(side * factor)) if 0 < factor < LARGEST_SIDE else 0 for side in picture.size]
    if not all(0 < side <= LARGEST_SIDE for side in [*size, *(wanted if to_size else ())]):
        raise UsageError(f"upscaling_resize asks for a picture that is not possible: sides are 1 to {LARGEST_SIDE}.")
    picture = picture.resize(size, Image.Resampling[name.upper()])
    if to_size and crop:
        left, top = ((side - side_wanted) // 2 for side, side_wanted in zip(size, wanted, strict=True))
        return picture.crop((left, top, left + wanted[0], top + wanted[1]))
    return picture


ROUTES = (
    ("POST", "/sdapi/v1/png-info", png_info),
    ("POST", "/sdapi/v1/extra-single-image", extra_single_image),
    ("POST", "/sdapi/v1/extra-batch-images", extra_batch_images),
)
