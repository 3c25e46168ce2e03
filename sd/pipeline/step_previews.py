"""The clean picture predicted at each step of a run: decoded by a VAE, or by a linear map from the latents."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from sd.pipeline.image.tensors import to_images, to_tensor
from sd.pipeline.latent_diffusion import LatentDiffusion


def fit_colours(latents: Tensor, picture: Image.Image) -> Tensor:
    """The linear map from latents to colours that is nearest to the VAE's decoder.

    latents  (4, H, W)
    picture  decoded from them, RGB, of any size
    returns  (5, 3) float64: weights of the four channels and, last, a constant; colours are in [-1, 1]

    Least squares over the H * W positions: the colour of a position is the mean of the pixels that lie in it.
    """
    height, width = latents.shape[-2:]
    colours = to_tensor(picture.resize((width, height), Image.Resampling.BOX))[0].flatten(1).T.double()  # (H*W, 3)
    return torch.linalg.lstsq(_with_constant(latents), colours, driver="gelsd").solution


def quick_image(latents: Tensor, colours: Tensor) -> Tensor:
    """latents (4, H, W) and the map from `fit_colours` -> image (1, 3, H, W), about [-1, 1]"""
    height, width = latents.shape[-2:]
    return (_with_constant(latents) @ colours).T.unflatten(1, (height, width))[None].float()


def _with_constant(latents: Tensor) -> Tensor:
    """(4, H, W) -> (H*W, 5)"""
    rows = latents.detach().cpu().double().flatten(1).T
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64, device="cpu")], dim=1)


def step_pictures(
    model: LatentDiffusion, clean: Sequence[Tensor], picture: Image.Image, kind: str, tile: str = ""
) -> list[Image.Image]:
    """One picture for each step of a picture's run, all at the size of the finished one.

    clean    the latents (4, H, W) predicted at each step; smaller ones in a first pass
    picture  the finished picture, before it is cut or pasted
    kind     "vae" decodes each; "fast" uses the linear map that fits this picture, or the model's tiny VAE
    """
    if kind == "vae" or model.tiny_vae:
        made = [model.decode(latents[None], tile)[0] for latents in clean]
    else:
        colours = fit_colours(clean[-1], picture) if clean else None
        made = [to_images(quick_image(latents, colours))[0] for latents in clean]
    return [one if one.size == picture.size else one.resize(picture.size, Image.Resampling.BICUBIC) for one in made]
