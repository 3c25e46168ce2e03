"""What changes in the sampling loop where a run begins with a picture: image to image, and inpainting.

Image to image begins part of the way down, with the picture made as noisy as it is there: Meng et al., "SDEdit: Guided
Image Synthesis and Editing with Stochastic Differential Equations" (2022), algorithm 1. Inpainting repaints a part of
it: with an ordinary network by keeping the rest on its course, with one trained for it by showing it the rest.

Shape letters: B pictures, H W latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Start:
    """The picture that a run begins with, at the size that the networks work at.

    image        (1, 3, 8H, 8W) in [-1, 1]
    latents      (B or 1, 4, H, W) scaled, float32, in place of an image
    mask         (1, 1, 8H, 8W) in [0, 1]: 1 is made anew, 0 is kept; None: all of it is made anew
    latent_mask  (1, 1, H, W), the same of the latents; None where the other is
    """

    image: Tensor | None = None
    latents: Tensor | None = None
    mask: Tensor | None = None
    latent_mask: Tensor | None = None


def keeping(
    predict_eps: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, mask: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser that knows what is to be kept: there, it gives the very noise that leads back to x_0.

    x_0   (1, 4, H, W)  latents of the picture
    mask  (1, 1, H, W)  1 is made anew, 0 is kept

    However a sampler goes through the noise levels, what is kept then stays on the way from its noise to x_0: the same
    as putting the noisy x_0 back after every step (Lugmayr et al., "RePaint", 2022, eq. 8), with the same noise.
    """

    def predict(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        known = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()  # Ho et al. (2020), eq. 4 solved for eps
        return mask * predict_eps(x_t, alpha_bar) + (1 - mask) * known

    return predict


def shown(unet: Callable[[Tensor, Tensor, Tensor], Tensor], mask: Tensor, kept: Tensor) -> Callable:
    """A UNet of nine channels, told by five of them what is kept of the picture.

    mask  (1, 1, H, W)  1 is made anew
    kept  (1, 4, H, W)  latents of the picture with what is made anew painted grey

    Rombach et al. (2022), section 4.5; the order of the channels is that of the published inpainting checkpoints.
    """
    beside = torch.cat([mask, kept], dim=1)

    def predict(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return unet(torch.cat([x, beside.to(x.dtype).expand(len(x), -1, -1, -1)], dim=1), timestep, context)

    return predict
