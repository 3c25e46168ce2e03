"""Give a UNet more input channels: how every training for a task with further inputs begins.

The weights of the new channels start at zero, as for the published inpainting checkpoints:
runwayml/stable-diffusion-inpainting, model card.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from sd.config import ModelConfig, get_config
from sd.networks.unet import UNet


def wider_config(config: ModelConfig, task: str, channels: int) -> ModelConfig:
    """The same model with further input channels for a task: "inpainting", "edit" or "depth".

    A model that has them already is trained further, so its config comes back as it is.

    Raises ValueError if there is no such family, as for a model that has further channels for another task.
    """
    if config.family.endswith(f"-{task}"):
        return config
    family = get_config(f"{config.family}-{task}").family
    return replace(config, family=family, unet=replace(config.unet, in_channels=config.unet.in_channels + channels))


@torch.no_grad()
def widened(unet: UNet, config: ModelConfig) -> UNet:
    """A copy of a UNet with more input channels. It predicts the same, whatever the new channels contain.

    config  of the model with the wider UNet
    """
    wider = UNet(config.unet)
    state = unet.state_dict()
    name = "input_blocks.0.conv.weight"
    more = config.unet.in_channels - state[name].shape[1]
    state[name] = F.pad(state[name], (0, 0, 0, 0, 0, more))
    wider.load_state_dict(state)
    return wider.to(unet.out.conv.weight.device)
