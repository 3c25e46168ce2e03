"""The three networks of a model, built but still empty."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sd.config import ModelConfig
from sd.networks.text_encoder import TextEncoder
from sd.networks.unet import UNet
from sd.networks.vae import VAE


class Unfilled(TorchFunctionMode):
    """New weights are left as they are: on the meta device there is nothing to fill, and torch takes two seconds to
    import what it would do that with."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build_networks(config: ModelConfig) -> dict[str, nn.Module]:
    """The networks by their names in a file of ours, on the meta device: all names and shapes, no memory, no values."""
    with torch.device("meta"), Unfilled():
        networks = {
            "text_encoder": TextEncoder(config.text_encoder),
            "unet": UNet(config.unet),
            "vae": VAE(config.vae),
        }
    for network in networks.values():
        network.requires_grad_(False).eval()
    return networks


def parameter_shapes(networks: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by its name in a file of ours: `unet.… vae.… text_encoder.…`."""
    return {
        f"{component}.{name}": tuple(parameter.shape)
        for component, network in networks.items()
        for name, parameter in network.named_parameters()
    }
