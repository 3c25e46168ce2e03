"""Whose VAE a model has, by trying it: those of Stable Diffusion 1, 2 and XL have the same names and shapes.

A decoder is nearly a linear map from latents to colours. That of Stable Diffusion 1 and 2 and that of XL are known,
fitted to pictures by those who show previews that way; a decoder whose map is the other family's one was trained for
other latents, and gives wrong colours. Maps are compared by their direction: the scale of latents does not matter.
"""

from dataclasses import replace

import torch
from torch import Tensor

from convert.families.table import family_named
from sd.config import SD_V1, SDXL
from sd.pipeline.runner import NonFiniteError, undisturbed
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.pipeline.step_previews import fit_colours

# Latent channels -> red, green, blue; ComfyUI, comfy/latent_formats.py. Those that others fitted for version 1.4 have
# a cosine of 0.98 with these; the two have one of 0.52 with each other.
COLOURS = {
    "Stable Diffusion 1 and 2": (
        *((0.3512, 0.2297, 0.3227), (0.3250, 0.4974, 0.2350)),
        *((-0.2829, 0.1762, 0.2721), (-0.2120, -0.2616, -0.7177)),
    ),
    "Stable Diffusion XL": (
        *((0.3651, 0.4232, 0.4341), (-0.2533, -0.0042, 0.1068)),
        *((0.1076, 0.1111, -0.0362), (-0.3165, -0.2492, -0.2188)),
    ),
}
FAMILIES = {SD_V1.vae.latent_scale: "Stable Diffusion 1 and 2", SDXL.vae.latent_scale: "Stable Diffusion XL"}
LIKE, APART = 0.8, 0.2  # the least cosine with the other family's map, and how much more than with one's own
SAME = 0.75  # the least cosine of a tiny VAE's map and that of the VAE which it stands in for; another family's is 0.52
SIDE, AMPLITUDE = 8, 0.5  # of the latents that are decoded


def trial_latents() -> Tensor:
    """(1, 4, 8, 8): waves of several directions, apart from each other, so that a linear map can be fitted to them."""
    place = torch.arange(SIDE, dtype=torch.float32, device="cpu") * (2 * torch.pi / SIDE)
    down, right = torch.meshgrid(place, place, indexing="ij")
    waves = torch.stack([down.sin(), right.sin(), (down + right).cos(), (down - right).cos()])
    return AMPLITUDE * 2**0.5 * waves[None]


@undisturbed()
def whose(model: StableDiffusion) -> str | None:
    """The family, a key of COLOURS, whose colours the decoder gives; None where it is neither's, or not finite.

    Costs one small decoding for a VAE of the published size, nothing for others.
    """
    if model.config.vae.width != SD_V1.vae.width:
        return None  # trained by somebody for latents of their own
    latents = trial_latents()
    try:
        (picture,) = model.decode(latents.to(model.device))
    except NonFiniteError:
        return None
    fitted = fit_colours(latents[0], picture)[:-1].flatten()
    cosines = {
        name: torch.cosine_similarity(fitted, fitted.new_tensor(rows).flatten(), dim=0).item()
        for name, rows in COLOURS.items()
    }
    likest = max(cosines, key=cosines.get)
    return likest if cosines[likest] >= LIKE and 2 * cosines[likest] - sum(cosines.values()) >= APART else None


def vae_warning(model: StableDiffusion) -> str | None:
    """What may spoil the colours of a model, in a sentence: a VAE, or a scale of latents, that is not its family's."""
    usual = family_named(model.config.family).config.vae.latent_scale
    scale, found = model.config.vae.latent_scale, whose(model)
    if found and found != FAMILIES[usual]:
        return f"this VAE is one of {found}, and colours will be wrong. Give one of {FAMILIES[usual]} with --vae FILE."
    if scale != usual and not model.config.vae.latent_means:  # with which there is another scale
        return f"its latents have the scale {scale:g}, those of {FAMILIES[usual]} {usual:g}: colours may be off."
    return None


@undisturbed()
def tiny_vae_warning(model: StableDiffusion) -> str | None:
    """What to say of a model's tiny VAE if its colours are not those of the VAE; costs a small decoding by each."""
    latents, maps = trial_latents(), []
    for each in (model, replace(model, tiny_vae=None)):
        try:
            (picture,) = each.decode(latents.to(model.device))
        except NonFiniteError:
            return None
        maps.append(fit_colours(latents[0], picture)[:-1].flatten())
    if torch.cosine_similarity(*maps, dim=0).item() >= SAME:
        return None
    advice = "Leave out --tiny-vae: the model has a VAE of its own kind."
    if model.config.vae.width == SD_V1.vae.width:
        scale = family_named(model.config.family).config.vae.latent_scale
        advice = (
            f"Give {'taesdxl' if scale == SDXL.vae.latent_scale else 'taesd'}_decoder, which is for {FAMILIES[scale]}."
        )
    return (
        "its colours are not those of the model's VAE, so it was made for another one; pictures will look wrong. "
        f"{advice}"
    )
