"""The papers' training losses, and the random numbers of each batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.networks.vae import VAE
from sd.sampling.denoiser import EPS_FROM, guide
from sd.sampling.samplers.ddim import ddim_step
from sd.sampling.samplers.lcm import consistency
from sd.sampling.schedule import add_noise, x_0_from_eps

CPU32, CPU64 = ({"dtype": dtype, "device": "cpu"} for dtype in (torch.float32, torch.float64))


class Draws(NamedTuple):
    """The random numbers of a batch. They depend only on the seed and the step, so training resumes exactly."""

    timesteps: Tensor  # (B,) int64
    noise: Tensor  # (B, 4, H, W), added to the latents
    latent_noise: Tensor  # (B, 4, H, W), to draw latents from the VAE's distribution
    dropped: Tensor  # (B,) bool, whether the empty prompt replaces the caption


def draw(
    seed: int, step: int, shape: tuple[int, ...], timesteps: int, prompt_dropout: float, noise_offset: float = 0.0
) -> Draws:
    """The draws for one global batch of latents of this shape; data-parallel processes each take their part.

    Timesteps are stratified: the range is divided evenly among the pictures of a batch. No batch has more noisy ones by
    chance, so the loss varies less (Kingma et al., "Variational Diffusion Models", 2021, appendix I.1, is similar).

    noise_offset  standard deviation of an added noise that is constant over a picture's channel. Without it, the mean
                  of a picture stays visible at every timestep; the network learns to trust it and is misled by the pure
                  noise that sampling begins with (Guttenberg, "Diffusion with Offset Noise", 2023)
    """
    generator = torch.Generator("cpu").manual_seed(seed * 2**31 + step)
    count = shape[0]
    draws = Draws(
        timesteps=(
            (torch.arange(count, **CPU64) + torch.rand(count, generator=generator, **CPU64)) * timesteps / count
        ).long(),
        noise=torch.randn(shape, generator=generator, **CPU32),
        latent_noise=torch.randn(shape, generator=generator, **CPU32),
        dropped=torch.rand(shape[:1], generator=generator, **CPU32) < prompt_dropout,
    )
    offset = torch.randn((*shape[:2], 1, 1), generator=generator, **CPU32)
    return draws._replace(noise=draws.noise + noise_offset * offset) if noise_offset else draws


def velocity(x_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The target of v-prediction: Salimans & Ho (2022), section 4."""
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0


def snr_weights(alpha_bar: Tensor, gamma: float, floor: float, prediction: str) -> Tensor:
    """Loss weights: the many easy, almost clean timesteps must not dominate, and the noisiest must count.

    alpha_bar  (B,)
    gamma      the signal-to-noise ratio (SNR) above which a timestep counts less; 5 in the paper
    floor      the ratio below which a timestep counts more than in the plain loss in eps; 0 for none
    returns    (B,)

    The loss in x_0 is weighted by the SNR, clamped between the two. The loss in eps is SNR times that in x_0, the loss
    in v SNR + 1 times. The upper end is from Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy"
    (2023), section 3.4; the lower one from Salimans & Ho (2022), section 4 ("truncated SNR"). The floor matters for
    what a prompt decides: the colour of a picture shows in x_t until almost nothing else is left, so only the noisiest
    steps need the words, and without a floor they hardly count.
    """
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(floor, gamma) / (snr if prediction == "eps" else snr + 1)


class DenoisingLoss(nn.Module):
    """The UNet's error in predicting the noise in noisy latents, given the text: the mean over a batch.

    Ho et al. (2020), eq. 14, with the context of Rombach et al. (2022), eq. 3.
    """

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        table: Tensor,
        *,
        prediction: str = "eps",
        min_snr_gamma: float | None = None,
        snr_floor: float = 0.0,
    ):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        if prediction not in ("eps", "v"):
            raise ValueError(
                f'networks that predict "eps" or "v" can be trained, not those that predict {prediction!r}'
            )
        self.prediction, self.min_snr_gamma, self.snr_floor = prediction, min_snr_gamma, snr_floor
        self.register_buffer("table", table, persistent=False)

    def forward(
        self, latents: Tensor, tokens: Tensor, timesteps: Tensor, noise: Tensor, beside: Tensor | None = None
    ) -> Tensor:
        """latents (B, 4, H, W), scaled; tokens (B, 77); timesteps (B,); noise as latents -> scalar

        beside  (B, C, H, W)  extra input channels after the noisy latents, if the network has any
        """
        alpha_bar = self.table[timesteps]
        per_picture = alpha_bar[:, None, None, None]
        x_t = add_noise(latents, noise, per_picture)
        x = x_t if beside is None else torch.cat([x_t, beside], dim=1)
        given = self.text_encoder(tokens)  # the context, in some families with a vector
        output = self.unet(x, timesteps, *(given if isinstance(given, tuple) else (given,))).float()
        target = noise if self.prediction == "eps" else velocity(latents, noise, per_picture)
        losses = (output - target).square().mean(dim=(1, 2, 3))
        if self.min_snr_gamma is not None:
            losses = losses * snr_weights(alpha_bar, self.min_snr_gamma, self.snr_floor, self.prediction)
        return losses.mean()


class ConsistencyLoss(nn.Module):
    """How much the student's jump to x_0 changes along one step of its teacher, the mean over a batch.

    The teacher takes a DDIM step with guidance, from a noise level to the next lower one of a grid. From both ends of
    the step, the student must reach the same x_0. At the clean end that is x_t itself, see `consistency`; from there,
    it learns level by level to jump from more noise. Guidance becomes part of the student, which then needs none.

    student, teacher  callables (x_t, timesteps, context) -> prediction, of the same kind
    empty             (1, 77) tokens of the empty prompt
    guidance_scale    of the teacher: w + 1 in the paper, which has it as an input of the student; here it is fixed
    grid              levels of the teacher's path, evenly spaced; 50 in the paper, so that it skips k = 20 timesteps

    Song et al., "Consistency Models" (2023), algorithm 2; Luo et al., "Latent Consistency Models" (2023), algorithm 1,
    with sections 4.2 (guidance) and 4.3 (skipping). As in Song & Dhariwal, "Improved Techniques for Training
    Consistency Models" (2023), section 3.2 and 3.3, the target comes from the student as it is, not from an average,
    and the distance is a pseudo-Huber one.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Callable[..., Tensor],
        text_encoder: nn.Module,
        table: Tensor,
        empty: Tensor,
        *,
        prediction: str = "eps",
        guidance_scale: float = 7.5,
        grid: int = 50,
        huber: float = 1e-3,
    ):
        super().__init__()
        self.student, self.teacher, self.text_encoder = student, teacher, text_encoder
        self.prediction, self.guidance_scale, self.grid, self.huber = prediction, guidance_scale, grid, huber
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("empty", empty, persistent=False)

    def forward(self, latents: Tensor, tokens: Tensor, places: Tensor, noise: Tensor) -> Tensor:
        """latents (B, 4, H, W), scaled; tokens (B, 77); places (B,) int64 in the grid, 0 to grid - 1; noise as latents
        -> scalar
        """
        skip = len(self.table) // self.grid
        timesteps = len(self.table) - 1 - skip * (self.grid - 1 - places)
        ends = (timesteps - skip).clamp(min=0)
        alpha_bar, alpha_bar_prev = (self.table[each][:, None, None, None] for each in (timesteps, ends))
        context = self.text_encoder(tokens)
        x_t = add_noise(latents, noise, alpha_bar)
        with torch.no_grad():
            both = torch.cat([context, self.text_encoder(self.empty).expand_as(context)])
            output = self.teacher(x_t.repeat(2, 1, 1, 1), timesteps.repeat(2), both)
            guided = guide(*output.float().chunk(2), self.guidance_scale)
            eps = EPS_FROM[self.prediction](guided, x_t, alpha_bar)
            target = self.jump(ddim_step(x_t, eps, alpha_bar, alpha_bar_prev), ends, context)
        distance = self.jump(x_t, timesteps, context) - target
        return ((distance.square() + self.huber**2).sqrt() - self.huber).mean()

    def jump(self, x_t: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """The student's consistency function: (B, 4, H, W) at (B,) timesteps -> x_0."""
        timesteps = timesteps[:, None, None, None]
        alpha_bar = self.table[timesteps]
        eps = EPS_FROM[self.prediction](self.student(x_t, timesteps.flatten(), context).float(), x_t, alpha_bar)
        return consistency(x_t, x_0_from_eps(x_t, eps, alpha_bar), timesteps).float()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of the latents' distribution from the standard normal one, averaged over all values.

    Kingma & Welling (2014), appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


class AutoencodingLoss(nn.Module):
    """The error of reconstructed pictures, plus the distance of the latents from a standard normal distribution.

    Kingma & Welling (2014), eq. 7, with absolute and squared errors, and with the second part weighted as little as in
    Rombach et al. (2022), section 3.1. Two more parts make latents that a UNet learns faster and may miss by a little:

    squared  weight of the squared errors, which are large at edges, beside the absolute ones
    noise    added to the latents, as a share of their standard deviation: the decoder learns to see through it
    smooth   weight of their `roughness` above that of the picture, shrunk to their size. Without it, latents vary from
             place to place far more than pictures do, and a UNet has to get that right. Skorokhodov et al., "Improving
             the Diffusability of Autoencoders" (2025), find the same, and another remedy
    """

    def __init__(
        self, vae: VAE, *, kl_weight: float = 1e-6, squared: float = 1.0, noise: float = 0.0, smooth: float = 0.0
    ):
        super().__init__()
        self.vae, self.kl_weight, self.squared, self.noise, self.smooth = vae, kl_weight, squared, noise, smooth

    def forward(self, image: Tensor, latent_noise: Tensor) -> Tensor:
        """image (B, 3, 8H, 8W) in [-1, 1], latent_noise (B, 4, H, W) -> scalar"""
        mean, logvar = (moment.float() for moment in self.vae.encode(image))
        spread = mean.detach().std(dim=(0, 2, 3), keepdim=True)
        variance = logvar.exp() + (self.noise * spread).square()
        decoded = self.vae.decode(mean + variance.sqrt() * latent_noise).float()
        loss = F.l1_loss(decoded, image) + self.squared * F.mse_loss(decoded, image)
        loss = loss + self.kl_weight * kl_divergence(mean, logvar)
        if self.smooth:
            shrunk = F.adaptive_avg_pool2d(image, mean.shape[-2:])
            loss = loss + self.smooth * (roughness(mean) - roughness(shrunk)).clamp(min=0)
        return loss


def roughness(x: Tensor) -> Tensor:
    """The mean squared difference of neighbours, as a share of the variance within pictures: 4 in noise.

    The variance between pictures does not count. If it did, an encoder could lower this by moving the latents of whole
    pictures apart, with their details as rough as before.

    x (B, C, H, W) -> scalar
    """
    standard = x / x.var(dim=(2, 3), keepdim=True).mean(dim=0, keepdim=True).sqrt()
    return standard.diff(dim=2).square().mean() + standard.diff(dim=3).square().mean()


@torch.no_grad()
def standardise_latents(vae: VAE, means: Tensor, scale: float) -> None:
    """Change a trained VAE so that its latents, times `scale`, have mean 0 and variance 1 in every channel.

    Its pictures stay the same, so the checkpoint keeps its family's `latent_scale`.

    means  (N, 4, H, W) latents of many pictures, unscaled
    """
    rescale_latents(vae, means.mean(dim=(0, 2, 3)), 1 / (scale * means.std(dim=(0, 2, 3))))


@torch.no_grad()
def rescale_latents(vae: VAE, centre: Tensor, factor: Tensor) -> None:
    """Change a trained VAE so that its latents are `factor` times what they were above `centre`; its pictures stay the
    same: the encoder's last layer rescales the latents, the decoder's first layer undoes that.

    centre, factor  (4,), for every channel
    """
    channels = len(centre)
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:channels] *= factor[:, None, None, None]
    bias[:channels] = (bias[:channels] - centre) * factor
    bias[channels:] += 2 * factor.log()
    after = vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ centre
    after.weight /= factor[None, :, None, None]
