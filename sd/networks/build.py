"""Build the networks of a model, without values yet."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sd.config import ModelConfig, TextEncoderConfig
from sd.networks.text_encoder import TextEncoder
from sd.networks.unet import UNet
from sd.networks.vae import VAE


class SkipInitialisation(TorchFunctionMode):
    """Leave new weights as they are.

    On the meta device there is nothing to initialise, yet torch would spend two seconds importing what it does it with.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build_networks(config: ModelConfig) -> dict[str, nn.Module]:
    """The networks by the names that our files use, on the meta device: names and shapes, no memory, no values."""
    with torch.device("meta"), SkipInitialisation():
        networks = {
            "text_encoder": text_encoder_of(config.text_encoder),
            "unet": UNet(config.unet),
            "vae": VAE(config.vae),
        }
        if config.text_encoder_2:
            networks["text_encoder_2"] = text_encoder_of(config.text_encoder_2)
        if config.depth:
            from sd.networks.depth import DepthNetwork

            networks["depth_network"] = DepthNetwork(config.depth)
    for network in networks.values():
        network.requires_grad_(False).eval()
    return networks


def text_encoder_of(config: TextEncoderConfig) -> TextEncoder:
    """The text encoder that a config describes; one of which an inner layer is read is a class of its own."""
    if not config.skipped_layers:
        return TextEncoder(config)
    from sd.networks.text_tower import TextTower

    return TextTower(config)


def parameter_shapes(networks: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by its name in our files: `unet.… vae.… text_encoder.…`."""
    return {
        f"{component}.{name}": tuple(parameter.shape)
        for component, network in networks.items()
        for name, parameter in network.named_parameters()
    }
