"""How the pipeline calls the networks: directly.

`sd.load` passes `sd.runtime.execution.Execution` instead, which has the same calls and is faster. It also supports
adapters, and the settings that change how the networks compute: seamless tiling, reused features and merged tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from sd.networks.text_encoder import TextEncoder
from sd.networks.unet import UNet
from sd.networks.vae import VAE
from sd.pipeline.settings import SettingError, Settings

if TYPE_CHECKING:
    from sd.networks.depth import DepthNetwork
    from sd.networks.text_tower import TextTower
    from sd.networks.tiny_vae import TinyVAE
    from sd.pipeline.stable_diffusion import StableDiffusion

T = TypeVar("T")
Predict = Callable[..., Tensor]  # (x, timestep, context), and the vector if there is one -> what the UNet predicts

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision_name(dtype: torch.dtype) -> str:
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def dtype_of(network: nn.Module) -> torch.dtype:
    """The precision in which a network computes. `sd.load` notes it as `runs_in` where weights rest in another."""
    return getattr(network, "runs_in", None) or next(network.parameters()).dtype


def widen(network: nn.Module) -> None:
    """From now on, a network computes in float32."""
    network.float()
    if hasattr(network, "runs_in"):
        network.runs_in = torch.float32


class NonFiniteError(ArithmeticError):
    """A network returned NaN or infinite values, from which no picture can be made.

    part     the attribute of `LatentDiffusion` that holds the network
    network  of the model or of its refiner
    """

    def __init__(self, part: str, network: nn.Module):
        words = {"text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
        words |= {"unet": "UNet", "vae": "VAE", "tiny_vae": "tiny VAE", "depth_network": "depth network"}
        dtype = dtype_of(network)
        super().__init__(f"the {words[part]} gave NaN or infinite values in {precision_name(dtype)}")
        self.part, self.network = part, network


def finite(values: Tensor, part: str, network: nn.Module) -> Tensor:
    """The same values. Raises NonFiniteError if one of them is NaN or infinite."""
    if not values.isfinite().all():
        raise NonFiniteError(part, network)
    return values


class undisturbed(torch.no_grad):
    """No gradients, and no autocast that the program around has entered: the precision is the networks' own."""

    def __enter__(self) -> None:
        super().__enter__()
        self._off = ExitStack()
        for device in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device):
                self._off.enter_context(torch.autocast(device, enabled=False))

    def __exit__(self, *error: object) -> None:
        self._off.close()
        super().__exit__(*error)


class Runner:
    """Calls the networks. Each call raises NonFiniteError instead of returning NaN or infinite values."""

    def device(self, network: nn.Module) -> torch.device:
        """The device on which a network computes."""
        return next(network.parameters()).device

    def in_use(self) -> AbstractContextManager[None]:
        """Within this context, in all threads, adapters stay as they are."""
        return nullcontext()

    @property
    def adapters(self) -> tuple:
        """The adapters that a model has, see `sd.runtime.adapters`."""
        return ()

    def apply(self, model: "StableDiffusion", adapters: Sequence) -> None:
        """Change the networks of a model by adapters, see `StableDiffusion.apply`."""
        raise SettingError("adapters", "need a model from sd.load; this one calls networks as they are.")

    def learn(self, model: "StableDiffusion", files: Sequence) -> None:
        """Teach a model the words in files, see `StableDiffusion.learn`."""
        raise SettingError("embeddings", "need a model from sd.load; this one has sd.pipeline.learning.teach.")

    def encode_text(self, text_encoder: TextEncoder, tokens: Tensor, *, skip_layers: int = 0) -> Tensor:
        """tokens (B, 77) -> (B, 77, D)"""
        return finite(text_encoder(tokens, skip_layers=skip_layers), "text_encoder", text_encoder)

    def encode_in_tower(
        self, tower: "TextTower", tokens: Tensor, part: str, *, skip_layers: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """tokens (B, 77) -> context (B, 77, D), pooled (B, P) if the tower has it; `part` as in NonFiniteError"""
        context, pooled = tower.encode(tokens, skip_layers=skip_layers)
        return finite(context, part, tower), None if pooled is None else finite(pooled, part, tower)

    def predictor(self, unet: UNet, settings: Settings, pictures: int) -> Predict:
        """The UNet as one run of a sampler calls it, with these settings and this number of pictures in the batch."""
        for name in ("tile", "merge_tokens"):
            if getattr(settings, name):
                raise SettingError(name, "needs the runner that sd.load hands in; this one calls networks as they are.")
        if settings.reuse_features > 1:
            raise SettingError("reuse_features", "needs the runner that sd.load hands in.")
        return unet

    def run(self, unet: UNet, steps: Iterable[tuple[Tensor, T]]) -> Iterator[tuple[Tensor, T]]:
        """The results of a sampler's steps, checked: latents (B, 4, H, W), and one further value."""
        for latents, value in steps:
            yield finite(latents, "unet", unet), value

    def encode(self, vae: VAE, image: Tensor, tile: str = "") -> Tensor:
        """image (B, 3, 8H, 8W) in [-1, 1] -> the mean of the unscaled latents (B, 4, H, W)"""
        return finite(vae.encode(image)[0], "vae", vae)

    def decode(self, vae: "VAE | TinyVAE", latents: Tensor, tile: str = "") -> Tensor:
        """Latents (B, 4, H, W), as this VAE takes them -> image (B, 3, 8H, 8W) in about [-1, 1]"""
        return finite(vae.decode(latents), "vae" if isinstance(vae, VAE) else "tiny_vae", vae)

    def estimate_depth(self, depth_network: "DepthNetwork", image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1], at a size of the network's -> inverse depth (B, 1, H, W)"""
        return finite(depth_network(image), "depth_network", depth_network)

    def send(self, values: Tensor, device: torch.device) -> Tensor:
        """Copy values from the CPU to that device."""
        return values.to(device)

    def notes(self, settings: Settings) -> dict[str, object]:
        """What is stored in a picture about how it was run."""
        return {}
