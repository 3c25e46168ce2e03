"""Between network and sampler: what the UNet predicts, for a prompt, as the noise in x_t."""

from collections.abc import Callable

import torch
from torch import Tensor


def eps_from_v(v: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise, from a network that predicts the velocity v = sqrt(alpha_bar) * eps - sqrt(1 - alpha_bar) * x_0.

    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), appendix D.
    """
    return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x_t


def guide(eps: Tensor, eps_negative: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: go further in the direction in which the prompt changes the prediction.

    Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022), eq. 6 with guidance_scale = 1 + w.
    """
    return eps_negative + guidance_scale * (eps - eps_negative)


class Denoiser:
    """Predicts the noise in x_t for the prompts of a batch: what every sampler calls.

    unet              a callable (x_t, timestep, context) -> prediction
    prediction        what it predicts: "eps" or "v"
    table             (timesteps,) alpha_bar by timestep
    context           (B, S, D) of the prompts, in the dtype and on the device that the network runs in
    negative_context  (B, S, D) of what to move away from
    guidance_scale    1 means no guidance: the negative context is not used and the work is halved
    """

    def __init__(
        self,
        unet: Callable[[Tensor, Tensor, Tensor], Tensor],
        prediction: str,
        table: Tensor,
        context: Tensor,
        negative_context: Tensor | None = None,
        guidance_scale: float = 1.0,
    ):
        if prediction not in ("eps", "v"):
            raise ValueError(f'prediction must be "eps" or "v", got {prediction!r}')
        if guidance_scale != 1 and negative_context is None:
            raise ValueError("guidance needs a negative context: that of the empty prompt, if there is no other")
        self.unet, self.prediction, self.table = unet, prediction, table.double()
        self.guidance_scale = guidance_scale
        self.guided = guidance_scale != 1
        self.set_context(context, negative_context)

    def set_context(self, context: Tensor, negative_context: Tensor | None = None) -> None:
        """Go on with other prompts, between two steps."""
        self.context = torch.cat([negative_context, context]) if self.guided else context

    def __call__(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """x_t (B, 4, H, W) float32, timestep () int64 -> eps (B, 4, H, W) float32, on the device of x_t"""
        x = torch.cat([x_t, x_t]) if self.guided else x_t
        output = self.unet(x.to(self.context.dtype), timestep.to(x.device), self.context).to(x_t.dtype)
        if self.prediction == "v":
            output = eps_from_v(output, x, self.table[timestep])
        if not self.guided:
            return output
        eps_negative, eps = output.chunk(2)
        return guide(eps, eps_negative, self.guidance_scale)
