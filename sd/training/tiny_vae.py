"""Distil a VAE into a tiny one: the decoder learns what the VAE makes of latents, the encoder of pictures.

Ollin Boer Bohan, "TAESD" (2023): the networks, and the idea. There is no adversarial part in the loss here.

Shape letters: B batch, C latent channels, H W height and width of the latents.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sd.config import TinyVAEConfig
from sd.files import written_whole
from sd.networks.tiny_vae import Block, TinyVAE
from sd.networks.vae import unscaled
from sd.pipeline.latent_diffusion import LatentDiffusion
from sd.pipeline.settings import Settings
from sd.training.latents import Pictures
from sd.training.loop import TrainingOptions, TrainingRun, process_share


def fresh_tiny_vae(config: TinyVAEConfig, seed: int) -> TinyVAE:
    """A tiny VAE with random weights: He et al., "Delving Deep into Rectifiers" (2015), eq. 10.

    The last convolution of each block starts at zero, so that at first every block passes its input on.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    network = TinyVAE(config).to(device="cpu", dtype=torch.float32)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.conv3.weight)
    return network.train()


class DistillationLoss(nn.Module):
    """How far one half of a tiny VAE is from the VAE: absolute and squared errors, and the errors of the edges.

    Edges are the differences between neighbouring values, to the right and down: blurred ones cost little in the first
    two terms, since they are few.
    """

    def __init__(self, network: nn.Module, *, edge_weight: float = 1.0):
        super().__init__()
        self.network, self.edge_weight = network, edge_weight

    def forward(self, given: Tensor, wanted: Tensor) -> Tensor:
        """given: latents (B, C, H, W), scaled, or pictures (B, 3, 8H, 8W) in [0, 1] -> scalar

        wanted  what the VAE makes of them: pictures in [0, 1], or scaled latents
        """
        made = self.network(given).float()
        edges = sum(F.l1_loss(made.diff(dim=axis), wanted.diff(dim=axis)) for axis in (-1, -2))
        return F.l1_loss(made, wanted) + F.mse_loss(made, wanted) + self.edge_weight * edges


@torch.no_grad()
def ask_vae(
    model: LatentDiffusion,
    drawn: Pictures,
    count: int,
    requests: Sequence[Settings],
    path: Path,
    *,
    scale: float,
    batch_size: int,
    on_answer: Callable[[], object],
    made_of: str,
) -> None:
    """Write what the VAE makes of pictures and of latents to a file.

    drawn     pictures, of which the first `count` are encoded, and their latents decoded
    requests  the settings of pictures by the model. The clean latents predicted at every step of their runs are
              decoded, so that the decoder also learns unfinished pictures
    scale     of the latents, see `TinyVAEConfig.latent_scale`
    on_answer called after each decoding
    made_of   which pictures they are; stored in the file

    The file holds pictures and decoded, (N, 3, 8H, 8W) uint8, and the latents of both, (N, C, H, W), scaled. There are
    more decoded pictures than encoded ones, and the latents of these come first.
    """
    answers: dict[str, list[Tensor]] = {"pictures": [], "latents": [], "decoded": []}

    def decode(latents: Tensor) -> None:
        """latents (B, C, H, W), as the VAE takes them"""
        for each in latents.split(1):  # one by one, as pictures are
            image = model.runner.decode(model.vae, each.to(model.dtypes["vae"]))
            answers["decoded"].append(as_bytes(image))
            on_answer()
        answers["latents"].append((scale * latents.float()).cpu())

    for number in range(count):
        images, _ = drawn.batch(number, 1, slice(0, 1))
        answers["pictures"].append(as_bytes(images))
        decode(model.runner.encode(model.vae, images.to(model.device, model.dtypes["vae"])))
    for start in range(0, len(requests), batch_size):
        clean: list[Tensor] = []
        for _ in model.sample(requests[start : start + batch_size], on_clean=clean.append):
            pass
        for latents in clean:
            decode(unscaled(latents, model.config.vae))
    with written_whole(path, force=True) as file:
        tensors = {name: torch.cat(values).contiguous() for name, values in answers.items()}
        save_file(tensors, file.name, {"made_of": made_of})


def as_bytes(image: Tensor) -> Tensor:
    """image (B, 3, 8H, 8W) in [-1, 1], values outside are clipped -> the same, uint8"""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def answers_in(path: Path, made_of: str) -> dict[str, Tensor]:
    """What `ask_vae` wrote. Raises ValueError if it was given something else."""
    with safe_open(path, "pt") as file:
        before = file.metadata()["made_of"]
    if before != made_of:
        raise ValueError(f"{path} holds other pictures ({before}) than requested ({made_of}). Use another folder.")
    return load_file(path)


def distillation_run(
    tiny_vae: TinyVAE,
    half: str,
    answers: dict[str, Tensor],
    options: TrainingOptions,
    folder: Path,
    *,
    batch_size: int,
    seed: int,
) -> TrainingRun:
    """Train the "decoder" or the "encoder" of a tiny VAE on what `ask_vae` wrote."""
    share = process_share(batch_size)
    given, wanted = ("latents", "decoded") if half == "decoder" else ("pictures", "latents")

    def values(name: str, numbers: Tensor) -> Tensor:
        chosen = answers[name][numbers]
        return chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cpu").manual_seed(seed * 2**31 + step)
        draws = {"generator": generator, "dtype": torch.int64, "device": "cpu"}
        numbers = torch.randint(len(answers[given]), (batch_size,), **draws)[share]
        return values(given, numbers), values(wanted, numbers)

    module = DistillationLoss(getattr(tiny_vae, half))
    return TrainingRun(module, batch, options, folder, batch_size=batch_size, seed=seed)
