"""What a run gets in addition to its prompts: an init image, a mask, depth, and further channels for the UNet.

Shape letters: B pictures, H W latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sd.config import ModelConfig
from sd.sampling.init_image import InitImage, PredictEps, keep_unmasked, with_channels, with_picture
from sd.sampling.schedule import Step, add_noise


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Text to image has none of them.

    x_0       (1 or B, 4, H, W)  latents of the init image, scaled, float32
    mask      (1, 1, H, W)       1 is repainted, 0 is kept; for a UNet that was not trained for inpainting
    channels  (1, C, H, W)       for a UNet that was: it reads them after x_t
    edited    (1, 4, H, W)       latents of the picture to edit, not scaled; a UNet that edits reads them after x_t
    """

    x_0: Tensor | None = None
    mask: Tensor | None = None
    channels: Tensor | None = None
    edited: Tensor | None = None

    def initial(self, noise: Tensor, steps: list[Step], skipped: int) -> Tensor:
        """x_t at the first step that is run: pure noise, or the noisy init image if steps are skipped."""
        return noise if not skipped else add_noise(self.x_0, noise, steps[skipped].alpha_bar)

    def unet(self, predict: Callable[..., Tensor], pictures: int) -> Callable[..., Tensor]:
        """The UNet with its further channels, if it has any, for a batch of that many pictures."""
        if self.edited is not None:
            return with_picture(predict, self.edited, pictures)
        return predict if self.channels is None else with_channels(predict, self.channels)

    def denoiser(self, predict_eps: PredictEps) -> PredictEps:
        """The denoiser, which leaves the unmasked part unchanged."""
        return predict_eps if self.mask is None else keep_unmasked(predict_eps, self.x_0, self.mask)


EncodeImage = Callable[[Tensor], Tensor]  # image (1, 3, 8H, 8W) in [-1, 1] -> scaled latents (1, 4, H, W)


def mask_and_masked_latents(init: InitImage, encode_image: EncodeImage) -> Tensor:
    """(1, 5, H, W), in the order of the published inpainting checkpoints."""
    masked_latents = encode_image(init.image * (init.mask < 0.5))
    return torch.cat([(init.latent_mask.to(masked_latents.device) >= 0.5).float(), masked_latents], dim=1)


def depth_of_latents(init: InitImage, encode_image: EncodeImage) -> Tensor:
    """(1, 1, H, W) from -1, far, to 1, near"""
    from sd.pipeline.image.depth_maps import latent_depth

    size = init.latents.shape[-2:] if init.image is None else [side // 8 for side in init.image.shape[-2:]]
    return latent_depth(init.depth, tuple(size))


@dataclass(frozen=True)
class Extra:
    """What a UNet of a family reads after the latents."""

    tasks: tuple[str, ...]  # that such a UNet can do
    channels: Callable[[InitImage, EncodeImage], Tensor] | None = None


EXTRA = {  # number of channels that a UNet reads after the latents -> what they are for; a family adds its own here
    0: Extra(("text to picture", "image to image", "inpainting")),
    1: Extra(("depth to image",), depth_of_latents),
    4: Extra(("editing",)),
    5: Extra(("inpainting",), mask_and_masked_latents),
}


def conditions_for(
    config: ModelConfig, init: InitImage | None, encode_image: EncodeImage, *, edits: bool = False
) -> Conditions:
    """The conditions of a run with this model.

    edits  the init image is edited by instruction

    Raises ValueError if the model's UNet reads other channels than the task provides.
    """
    task = "text to picture" if init is None else "image to image" if init.mask is None else "inpainting"
    if init is not None and init.depth is not None:
        task = "depth to image"
    if edits:
        if task != "image to image":
            raise ValueError("image_guidance is for editing a picture as a whole; give a picture and no mask")
        task = "editing"
    latents, given = config.vae.latent_channels, config.unet.in_channels
    allowed = [latents + number for number, extra in EXTRA.items() if task in extra.tasks]
    if given not in allowed:
        raise ValueError(
            f"{task} needs a model whose UNet takes {' or '.join(map(str, allowed))} channels, "
            f"this one ({config.family}) takes {given}"
        )
    if init is None:
        return Conditions()
    x_0 = init.latents if init.image is None else encode_image(init.image)
    if edits:
        return Conditions(edited=x_0 / config.vae.latent_scale)
    make_channels = EXTRA[given - latents].channels
    if make_channels is not None:
        return Conditions(x_0=x_0, channels=make_channels(init, encode_image).to(x_0.device))
    return Conditions(x_0=x_0, mask=None if init.mask is None else init.latent_mask.to(x_0.device))
