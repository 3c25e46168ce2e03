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


def eps_from_x_0(x_0: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise in x_t, given the clean latents: Ho et al. (2020), eq. 4 solved for eps."""
    return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()


EPS_FROM: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # what a UNet predicts -> the noise, given x_t
    "eps": lambda eps, x_t, alpha_bar: eps,
    "v": eps_from_v,
    "edm": lambda output, x_t, alpha_bar: eps_from_v(-output, x_t, alpha_bar),  # see `sd.sampling.continuous`
    "x0": eps_from_x_0,
}


def guide(positive: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: go further in the direction that the prompt changes the prediction.

    Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022), eq. 6 with guidance_scale = 1 + w.
    """
    return negative + guidance_scale * (positive - negative)


def guide_edit(both: Tensor, picture: Tensor, neither: Tensor, guidance_scale: float, image_guidance: float) -> Tensor:
    """Guidance with two conditions: one scale for the instruction, the other for the picture that is edited.

    both, picture, neither  predictions with picture and instruction, with the picture alone, and without either

    Brooks et al., "InstructPix2Pix: Learning to Follow Image Editing Instructions" (2023), eq. 3, with guidance_scale =
    s_T and image_guidance = s_I.
    """
    return neither + image_guidance * (picture - neither) + guidance_scale * (both - picture)


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

    unet               a callable (x_t, timestep, context) -> prediction; it gets the vector, too, if there is one
    prediction         what it predicts, a key of `EPS_FROM`
    table              (timesteps,) alpha_bar by timestep
    context            (B, S, D) of the prompts, in the UNet's dtype and on its device; with a vector (B, V) for each of
                       them, a pair
    negative_context   the same of what to move away from
    guidance_scale     1: no guidance, so the negative context is unused and the work is halved
    image_guidance     of a UNet that edits a picture, see `guide_edit`; at 1, the prediction without the picture is not
                       needed. Else the first third of the rows is that one, for which the UNet must leave it out
    guidance_rescale   0 to 1, see `rescale_guidance`
    guidance_interval  the lowest and the highest sigma with guidance; at others the work is halved. Kynkäänniemi et
                       al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
                       Diffusion Models" (2024)
    """

    def __init__(
        self,
        unet: Callable[..., Tensor],
        prediction: str,
        table: Tensor,
        context: Tensor | tuple[Tensor, ...],
        negative_context: Tensor | tuple[Tensor, ...] | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        image_guidance: float = 1.0,
    ):
        if prediction not in EPS_FROM:
            raise ValueError(f"prediction must be one of {', '.join(EPS_FROM)}, got {prediction!r}")
        self.predictions = 3 if image_guidance != 1 else 2 if guidance_scale != 1 else 1  # for each picture
        if self.predictions > 1 and negative_context is None:
            raise ValueError("guidance needs a negative context: without a negative prompt, that of the empty prompt")
        self.unet, self.prediction, self.table = unet, prediction, table
        self.guidance_scale, self.image_guidance = guidance_scale, image_guidance
        self.guidance_rescale, self.guidance_interval = guidance_rescale, guidance_interval
        self.set_context(context, negative_context)

    def set_context(
        self, context: Tensor | tuple[Tensor, ...], negative_context: Tensor | tuple[Tensor, ...] | None = None
    ) -> None:
        """Change the prompts, between two steps."""
        texts = [*[negative_context] * (self.predictions - 1), context]
        pairs = (text if isinstance(text, tuple) else (text,) for text in texts)
        self.given = [torch.cat(each) for each in zip(*pairs, strict=True)]  # the context, and the vector

    def __call__(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """x_t (B, 4, H, W) float32, alpha_bar () float64 -> eps (B, 4, H, W) float32, on the device of x_t"""
        lowest, highest = self.guidance_interval
        predictions = self.predictions if lowest <= sigma_of(alpha_bar) <= highest else 1
        x = torch.cat([x_t] * predictions)
        given = [each[-len(x) :] for each in self.given]  # without guidance, only the prompts', which is the last part
        timestep = x_t.new_full((), timestep_at(self.table, alpha_bar).item())  # copying a tensor would block a GPU
        output = self.unet(x.to(given[0].dtype), timestep, *given).to(x_t.dtype)
        if predictions > 1:
            *others, positive = output.chunk(predictions)
            if predictions == 2:
                output = guide(positive, *others, self.guidance_scale)
            else:
                neither, picture = others
                output = guide_edit(positive, picture, neither, self.guidance_scale, self.image_guidance)
            if self.guidance_rescale:
                output = rescale_guidance(output, positive, self.guidance_rescale)
        return EPS_FROM[self.prediction](output, x_t, alpha_bar)
