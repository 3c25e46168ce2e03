"""Sampling that begins with an image: image to image, inpainting, and editing by instruction.

Image to image begins at a lower noise level, with the image made that noisy: Meng et al., "SDEdit: Guided Image
Synthesis and Editing with Stochastic Differential Equations" (2022), algorithm 1. Inpainting repaints a part of it:
with an ordinary network, the rest is set to the known latents; one trained for it reads the rest as further channels.
A network for editing reads the picture that way, and begins at pure noise.

Shape letters: B pictures, H W latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PredictEps = Callable[[Tensor, Tensor], Tensor]  # (x_t, alpha_bar) -> eps


@dataclass(frozen=True, kw_only=True)
class InitImage:
    """The image that a run begins with, at the size that the networks work at.

    image        (1, 3, 8H, 8W) in [-1, 1]
    latents      (B or 1, 4, H, W) scaled, float32, instead of an image
    mask         (1, 1, 8H, 8W) in [0, 1]: 1 is repainted, 0 is kept; None: all of it is repainted
    latent_mask  (1, 1, H, W), the mask of the latents; None if there is no mask
    depth        (1, 1, any height, any width), large is near, in any unit, for a network that reads it; or None
    """

    image: Tensor | None = None
    latents: Tensor | None = None
    mask: Tensor | None = None
    latent_mask: Tensor | None = None
    depth: Tensor | None = None


def keep_unmasked(predict_eps: PredictEps, x_0: Tensor, mask: Tensor) -> PredictEps:
    """A denoiser that keeps the unmasked part: there, it predicts the noise that leads back to x_0.

    x_0   (1, 4, H, W)  latents of the init image
    mask  (1, 1, H, W)  1 is repainted, 0 is kept

    With every sampler, the kept part then stays on the line from its noise to x_0. This equals putting the noisy x_0
    back after every step (Lugmayr et al., "RePaint", 2022, eq. 8), with the same noise each time.
    """

    def predict(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        known = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()  # Ho et al. (2020), eq. 4 solved for eps
        return mask * predict_eps(x_t, alpha_bar) + (1 - mask) * known

    return predict


def with_channels(unet: Callable[..., Tensor], channels: Tensor) -> Callable[..., Tensor]:
    """A UNet that reads further channels after those of x_t: Rombach et al. (2022), section 4.5.

    channels  (1, C, H, W), the same at every step
    """

    def predict(x: Tensor, timestep: Tensor, *given: Tensor) -> Tensor:
        return unet(torch.cat([x, channels.to(x.dtype).expand(len(x), -1, -1, -1)], dim=1), timestep, *given)

    return predict


def with_picture(unet: Callable[..., Tensor], latents: Tensor, pictures: int) -> Callable[..., Tensor]:
    """A UNet that reads the picture to edit after x_t: Brooks et al., "InstructPix2Pix" (2023), section 3.2.

    latents   (1, 4, H, W)  of that picture, not scaled
    pictures  B: of 3 B rows, the first B are predicted without it, with zeros in its place (section 3.2.1)
    """

    def predict(x: Tensor, timestep: Tensor, *given: Tensor) -> Tensor:
        seen = latents.to(x.dtype).expand(len(x), -1, -1, -1)
        without = max(0, len(x) - 2 * pictures)
        seen = torch.cat([torch.zeros_like(seen[:without]), seen[without:]])
        return unet(torch.cat([x, seen], dim=1), timestep, *given)

    return predict
