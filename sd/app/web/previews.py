"""Small pictures of what each step predicts, cheap enough to be made while the next step waits."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from sd.pipeline.image.tensors import to_images, to_tensor
from sd.pipeline.step_previews import fit_colours, quick_image

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sd.pipeline.stable_diffusion import StableDiffusion

LARGEST_SIDE = 256


def preview_of(model: "StableDiffusion") -> "Callable[[Tensor], Image.Image]":
    """A function from clean latents (4, H/8, W/8) to a preview: decoded by the tiny VAE, if the model has one.

    Without one, a linear map from latents to colours, fitted to what the VAE makes of a chart of colours.
    """
    from PIL import Image

    if model.tiny_vae:
        return lambda clean: model.decode(clean[None])[0]
    chart = colour_chart(model.config.native_size)
    colours = fit_colours(model.encode_image(to_tensor(chart))[0], chart)

    def preview(clean: "Tensor") -> Image.Image:
        (small,) = to_images(quick_image(clean, colours))
        factor = min(model.config.vae.factor, max(1, LARGEST_SIDE // max(small.size)))
        return small.resize((small.width * factor, small.height * factor), Image.Resampling.BICUBIC)

    return preview


def colour_chart(side: int) -> "Image.Image":
    """Patches of all mixtures of five levels of red, green and blue: 128 of them, the last three black."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(picture)
    width, height = side / 16, side / 8
    levels = (0, 64, 128, 191, 255)
    for number in range(125):
        colour = tuple(levels[number // 5**place % 5] for place in range(3))
        left, top = number % 16 * width, number // 16 * height
        draw.rectangle((left, top, left + width, top + height), fill=colour)
    return picture
