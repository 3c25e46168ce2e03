"""Latents to train the UNet on: encoded batch by batch, or all at once beforehand.

Encoding a batch takes about as long as a training step on it, so pictures that are shown often are better encoded once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd.files import written_whole
from sd.networks.vae import VAE


class Pictures(Protocol):
    """Training pictures; the same step always gets the same ones."""

    def batch(self, step: int, batch_size: int, share: slice) -> tuple[Tensor, list[str]]:
        """(b, 3, H, W) in [-1, 1] and captions: one process's share of a global batch."""


class Encoded(NamedTuple):
    """The VAE's output for pictures, and their captions."""

    mean: Tensor  # (b, 4, H/8, W/8), unscaled
    logvar: Tensor  # the same
    captions: list[str]
    beside: Tensor | None = None  # (b, C, H/8, W/8), an inpainting network's extra input channels


class EncodedAsTheyCome:
    """Encodes each batch when it is needed: for an endless supply of pictures."""

    def __init__(self, vae: VAE, pictures: Pictures):
        self.vae, self.pictures = vae, pictures

    @torch.no_grad()
    def batch(self, step: int, batch_size: int, share: slice) -> Encoded:
        images, captions = self.pictures.batch(step, batch_size, share)
        return Encoded(*self.vae.encode(images.to(self.vae.quant_conv.weight.device)), captions)


class EncodedOnce:
    """A fixed number of encoded pictures, shown in a new order in every epoch.

    caption  (number, epoch) -> the picture's caption in that epoch
    made_of  which pictures they are. Raises ValueError if `encode_all` was given something else
    """

    def __init__(self, path: Path, caption: Callable[[int, int], str], seed: int, made_of: str = ""):
        with safe_open(path, "pt") as file:
            before = (file.metadata() or {}).get("made_of", made_of)
        if before != made_of:
            raise ValueError(f"{path} holds other pictures ({before}) than requested ({made_of}). Use another folder.")
        self.moments = load_file(path)
        self.caption, self.seed = caption, seed
        self.order: tuple[int, list[int]] = (-1, [])  # of the current epoch

    def batch(self, step: int, batch_size: int, share: slice) -> Encoded:
        count = len(self.moments["mean"])
        epoch, place = divmod(step, count // batch_size)
        if self.order[0] != epoch:
            generator = torch.Generator("cpu").manual_seed(self.seed * 2**31 + epoch)
            self.order = epoch, torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu").tolist()
        numbers = self.order[1][place * batch_size : (place + 1) * batch_size][share]
        tensors = {name: moments[numbers] for name, moments in self.moments.items()}
        return Encoded(**tensors, captions=[self.caption(number, epoch) for number in numbers])


@torch.no_grad()
def encode_all(
    vae: VAE,
    pictures: Pictures,
    count: int,
    path: Path,
    *,
    batch_size: int,
    on_batch: Callable[[int], object],
    look_beside: Callable[[int, Tensor], Tensor] | None = None,
    made_of: str = "",
) -> None:
    """Encode the first `count` pictures, a multiple of the batch size, and write the moments to a file.

    on_batch     called with the number of pictures after every batch
    look_beside  (number of the first picture, pictures (b, 3, H, W)) -> extra input channels for the network,
                 (b, C, H/8, W/8)
    made_of      which pictures they are; stored in the file
    """
    encoded: dict[str, list[Tensor]] = {"mean": [], "logvar": []}
    for step in range(count // batch_size):
        images, _ = pictures.batch(step, batch_size, slice(0, batch_size))
        images = images.to(vae.quant_conv.weight.device)
        moments = dict(zip(("mean", "logvar"), vae.encode(images), strict=True))
        if look_beside:
            moments["beside"] = look_beside(step * batch_size, images)
        for name, values in moments.items():
            encoded.setdefault(name, []).append(values.float().cpu())
        on_batch(batch_size)
    with written_whole(path, force=True) as file:
        tensors = {name: torch.cat(values).contiguous() for name, values in encoded.items()}
        save_file(tensors, file.name, {"made_of": made_of})
