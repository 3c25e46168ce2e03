"""Between UNet and sampler: from the UNet's predictions, with and without the prompt, to the noise in x_t."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sd.sampling.schedule import sigma_of, timestep_at


def eps_from_v(v: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise, given the velocity v = sqrt(alpha_bar) * eps - sqrt(1 - alpha_bar) * x_0.

    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), section 4 and appendix D.
    """
    return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x_t


def guide(positive: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: go further in the direction that the prompt changes the prediction.

    Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022), eq. 6 with guidance_scale = 1 + w.
    """
    return negative + guidance_scale * (positive - negative)


def rescale_guidance(guided: Tensor, positive: Tensor, guidance_rescale: float) -> Tensor:
    """Undo the rise in standard deviation that guidance causes, which makes pictures too bright.

    guided, positive  (B, 4, H, W)  predictions with guidance, and for the prompt alone
    guidance_rescale  0 changes nothing, 1 scales the guided prediction to the deviation of the positive one

    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), eq. 15 and 16.
    """
    positive_std, guided_std = (prediction.std(dim=(1, 2, 3), keepdim=True) for prediction in (positive, guided))
    rescaled = guided * positive_std / guided_std
    return guidance_rescale * rescaled + (1 - guidance_rescale) * guided


class Denoiser:
    """Predicts the noise in x_t for the prompts of a batch; samplers call it as `predict_eps`.

    unet               a callable (x_t, timestep, context) -> prediction
    prediction         what it predicts: "eps" or "v"
    table              (timesteps,) alpha_bar by timestep
    context            (B, S, D) of the prompts, in the UNet's dtype and on its device
    negative_context   (B, S, D) of what to move away from
    guidance_scale     1: no guidance, so the negative context is unused and the work is halved
    guidance_rescale   0 to 1, see `rescale_guidance`
    guidance_interval  the lowest and the highest sigma with guidance; at others the work is halved. Kynkäänniemi et
                       al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
                       Diffusion Models" (2024)
    """

    def __init__(
        self,
        unet: Callable[[Tensor, Tensor, Tensor], Tensor],
        prediction: str,
        table: Tensor,
        context: Tensor,
        negative_context: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
    ):
        if prediction not in ("eps", "v"):
            raise ValueError(f'prediction must be "eps" or "v", got {prediction!r}')
        if guidance_scale != 1 and negative_context is None:
            raise ValueError("guidance needs a negative context: without a negative prompt, that of the empty prompt")
        self.unet, self.prediction, self.table = unet, prediction, table
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.guided, self.guidance_interval = guidance_scale != 1, guidance_interval
        self.set_context(context, negative_context)

    def set_context(self, context: Tensor, negative_context: Tensor | None = None) -> None:
        """Change the prompts, between two steps."""
        self.context = torch.cat([negative_context, context]) if self.guided else context

    def __call__(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """x_t (B, 4, H, W) float32, alpha_bar () float64 -> eps (B, 4, H, W) float32, on the device of x_t"""
        lowest, highest = self.guidance_interval
        guided = self.guided and lowest <= sigma_of(alpha_bar) <= highest
        x = torch.cat([x_t, x_t]) if guided else x_t
        context = self.context[-len(x) :]  # without guidance, only the prompts', which is the last part
        timestep = x_t.new_full((), timestep_at(self.table, alpha_bar).item())  # copying a tensor would block a GPU
        output = self.unet(x.to(context.dtype), timestep, context).to(x_t.dtype)
        if guided:
            negative, positive = output.chunk(2)
            output = guide(positive, negative, self.guidance_scale)
            if self.guidance_rescale:
                output = rescale_guidance(output, positive, self.guidance_rescale)
        return eps_from_v(output, x_t, alpha_bar) if self.prediction == "v" else output
