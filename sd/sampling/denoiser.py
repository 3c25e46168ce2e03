"""Between network and sampler: what the UNet predicts, for a prompt, as the noise in x_t."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sd.sampling.schedule import sigma_of, timestep_at


def eps_from_v(v: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise, from a network that predicts the velocity v = sqrt(alpha_bar) * eps - sqrt(1 - alpha_bar) * x_0.

    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), section 4 and appendix D.
    """
    return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x_t


def guide(positive: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: go further in the direction in which the prompt changes the prediction.

    Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022), eq. 6 with guidance_scale = 1 + w.
    """
    return negative + guidance_scale * (positive - negative)


def rescale_guidance(guided: Tensor, positive: Tensor, guidance_rescale: float) -> Tensor:
    """Give the guided prediction back the deviation that guidance has enlarged, which makes pictures too bright.

    guided, positive  (B, 4, H, W)  predictions of the network with guidance, and for the prompt alone
    guidance_rescale  0 leaves the guided prediction as it is, 1 gives all of the prompt's deviation back

    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), eq. 15 and 16.
    """
    deviations = [prediction.std(dim=(1, 2, 3), keepdim=True) for prediction in (positive, guided)]
    rescaled = guided * deviations[0] / deviations[1]
    return guidance_rescale * rescaled + (1 - guidance_rescale) * guided


class Denoiser:
    """Predicts the noise in x_t for the prompts of a batch: what every sampler calls.

    unet              a callable (x_t, timestep, context) -> prediction
    prediction        what it predicts: "eps" or "v"
    table             (timesteps,) alpha_bar by timestep
    context           (B, S, D) of the prompts, in the dtype and on the device that the network runs in
    negative_context  (B, S, D) of what to move away from
    guidance_scale    1 means no guidance: the negative context is not used and the work is halved
    guidance_rescale  0 to 1, how much of guidance's gain in deviation is taken back
    guidance_interval the lowest and the highest sigma with guidance; at others, the work is halved. Kynkäänniemi et
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
            raise ValueError("guidance needs a negative context: that of the empty prompt, if there is no other")
        self.unet, self.prediction, self.table = unet, prediction, table
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.guided, self.guidance_interval = guidance_scale != 1, guidance_interval
        self.set_context(context, negative_context)

    def set_context(self, context: Tensor, negative_context: Tensor | None = None) -> None:
        """Go on with other prompts, between two steps."""
        self.context = torch.cat([negative_context, context]) if self.guided else context

    def __call__(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """x_t (B, 4, H, W) float32, alpha_bar () float64 -> eps (B, 4, H, W) float32, on the device of x_t"""
        lowest, highest = self.guidance_interval
        guided = self.guided and lowest <= sigma_of(alpha_bar) <= highest
        x = torch.cat([x_t, x_t]) if guided else x_t
        context = self.context[-len(x) :]  # the prompts' stands last
        timestep = x_t.new_full((), timestep_at(self.table, alpha_bar).item())  # a copy would wait for the device
        output = self.unet(x.to(context.dtype), timestep, context).to(x_t.dtype)
        if guided:
            negative, positive = output.chunk(2)
            output = guide(positive, negative, self.guidance_scale)
            if self.guidance_rescale:
                output = rescale_guidance(output, positive, self.guidance_rescale)
        return eps_from_v(output, x_t, alpha_bar) if self.prediction == "v" else output
