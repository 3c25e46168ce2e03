"""What the networks are trained to do: the losses of the papers, and the batches' random numbers."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.networks.vae import VAE, sample_latents
from sd.sampling.schedule import add_noise


class Draws(NamedTuple):
    """The random numbers of a batch. They depend on the seed and the step alone, so training resumes exactly."""

    timesteps: Tensor  # (B,) int64
    noise: Tensor  # (B, 4, H, W), what x_t is made noisy with
    latent_noise: Tensor  # (B, 4, H, W), to draw latents from the VAE's distribution
    dropped: Tensor  # (B,) bool, whose prompt is replaced by the empty one


def draw(
    seed: int, step: int, shape: tuple[int, ...], timesteps: int, prompt_dropout: float, noise_offset: float = 0.0
) -> Draws:
    """The draws for one global batch of latents of this shape; data-parallel processes each take their part.

    Each picture's timestep is drawn from a range of its own, the ranges together being all timesteps: no batch has by
    chance more of the noisy ones, so its loss varies less (Kingma et al., "Variational Diffusion Models", 2021,
    appendix I.1, has a similar rule).

    noise_offset  deviation of a part of the noise that is the same all over a picture. White noise leaves the mean of
                  a picture visible at every timestep, so that a network learns to trust it, and at the start of
                  sampling finds it in noise; with this part it cannot (Guttenberg, "Diffusion with Offset Noise", 2023)
    """
    generator = torch.Generator().manual_seed(seed * 2**31 + step)
    count = shape[0]
    draws = Draws(
        timesteps=(
            (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) * timesteps / count
        ).long(),
        noise=torch.randn(shape, generator=generator),
        latent_noise=torch.randn(shape, generator=generator),
        dropped=torch.rand(shape[:1], generator=generator) < prompt_dropout,
    )
    offset = torch.randn((*shape[:2], 1, 1), generator=generator)
    return draws._replace(noise=draws.noise + noise_offset * offset) if noise_offset else draws


def velocity(x_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The target of v-prediction: Salimans & Ho (2022), section 4."""
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0


def snr_weights(alpha_bar: Tensor, gamma: float, floor: float, prediction: str) -> Tensor:
    """Weights that keep the many easy, almost clean timesteps from dominating, and the noisiest from being forgotten.

    alpha_bar  (B,)
    gamma      the signal-to-noise ratio beyond which a timestep counts less; 5 in the paper
    floor      the ratio below which it counts more than the loss in eps would have it; 0 for none
    returns    (B,)

    The loss in x_0 is weighted by the ratio, kept between the two; that in eps is SNR times as large, and that in v
    SNR + 1 times. Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (2023), section 3.4, has
    the upper end; Salimans & Ho (2022), section 4, the lower one ("truncated SNR"). The lower one matters for what a
    prompt decides: the colour of a whole picture can be told from x_t until almost nothing is left of it, so that only
    the noisiest steps need the words, and without a floor these hardly count.
    """
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(floor, gamma) / (snr if prediction == "eps" else snr + 1)


class DenoisingLoss(nn.Module):
    """How badly the UNet tells the noise in noisy latents, given the text: the mean over a batch.

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
        self.prediction, self.min_snr_gamma, self.snr_floor = prediction, min_snr_gamma, snr_floor
        self.register_buffer("table", table, persistent=False)

    def forward(
        self, latents: Tensor, tokens: Tensor, timesteps: Tensor, noise: Tensor, beside: Tensor | None = None
    ) -> Tensor:
        """latents (B, 4, H, W), scaled; tokens (B, 77); timesteps (B,); noise as latents -> scalar

        beside  (B, C, H, W)  what the network is shown behind the noisy latents, if it has channels for that
        """
        alpha_bar = self.table[timesteps]
        per_picture = alpha_bar[:, None, None, None]
        x_t = add_noise(latents, noise, per_picture)
        shown = x_t if beside is None else torch.cat([x_t, beside], dim=1)
        output = self.unet(shown, timesteps, self.text_encoder(tokens)).float()
        target = noise if self.prediction == "eps" else velocity(latents, noise, per_picture)
        losses = (output - target).square().mean(dim=(1, 2, 3))
        if self.min_snr_gamma is not None:
            losses = losses * snr_weights(alpha_bar, self.min_snr_gamma, self.snr_floor, self.prediction)
        return losses.mean()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Distance of the latents' distribution from the standard normal one, by latent value, averaged.

    Kingma & Welling (2014), appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


class AutoencodingLoss(nn.Module):
    """How badly a picture comes back from its latents, and how far the latents are from standard normal ones.

    Kingma & Welling (2014), eq. 7, with absolute and squared errors, and the small weight of the second part of
    Rombach et al. (2022), section 3.1.
    """

    def __init__(self, vae: VAE, *, kl_weight: float = 1e-6):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, image: Tensor, latent_noise: Tensor) -> Tensor:
        """image (B, 3, 8H, 8W) in [-1, 1], latent_noise (B, 4, H, W) -> scalar"""
        mean, logvar = (moment.float() for moment in self.vae.encode(image))
        decoded = self.vae.decode(sample_latents(mean, logvar, latent_noise)).float()
        reconstruction = F.l1_loss(decoded, image) + F.mse_loss(decoded, image)
        return reconstruction + self.kl_weight * kl_divergence(mean, logvar)


@torch.no_grad()
def standardise_latents(vae: VAE, means: Tensor, scale: float) -> None:
    """Change a trained VAE so that its latents, times `scale`, have mean 0 and variance 1 in every channel.

    Its pictures stay the same: what the last layer of the encoder is made to do to the latents, the first layer of the
    decoder undoes. So the checkpoint keeps its family's constant.

    means  (N, 4, H, W) latents of many pictures, unscaled
    """
    channels = means.shape[1]
    centre = means.mean(dim=(0, 2, 3))
    factor = 1 / (scale * means.std(dim=(0, 2, 3)))
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:channels] *= factor[:, None, None, None]
    bias[:channels] = (bias[:channels] - centre) * factor
    bias[channels:] += 2 * factor.log()
    after = vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ centre
    after.weight /= factor[None, :, None, None]
