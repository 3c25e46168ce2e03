"""Tiny VAEs with made-up weights, by diffusers' own code, and files of them in every spelling."""

from functools import cache

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file


@cache
def theirs(seed: int = 0) -> AutoencoderTiny:
    """Of the published size. Weights are larger than PyTorch's, so that pictures are not grey."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        network = AutoencoderTiny()
        for name, parameter in network.named_parameters():
            if name.endswith("weight"):
                torch.nn.init.kaiming_normal_(parameter).mul_(0.3 if ".conv." in name else 0.7)
    return network.requires_grad_(False).eval()


def original(half: str, network: AutoencoderTiny | None = None) -> dict[str, torch.Tensor]:
    """A half as the file taesd_encoder or taesd_decoder names it: layers by number, tanh and ReLU included."""
    first = 1 if half == "decoder" else 0
    state = {}
    for name, value in getattr(network or theirs(), half).layers.state_dict().items():
        number, _, leaf = name.partition(".")
        state[f"{int(number) + first}.{leaf}"] = value
    return state


def prefixed(prefix: str, state: dict) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def both(encoder: str, decoder: str) -> dict[str, torch.Tensor]:
    return prefixed(encoder, original("encoder")) | prefixed(decoder, original("decoder"))


def written(folder, spelling: str):
    """The same weights in a file or folder of that spelling."""
    if spelling.startswith("folder"):
        theirs().save_pretrained(folder / "taesd", safe_serialization=not spelling.endswith("bin"))
        return folder / "taesd"
    path = folder / spelling
    state = SPELLINGS[spelling]()
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


SPELLINGS = {  # file name -> its tensors
    "taesd_decoder.safetensors": lambda: original("decoder"),
    "taesd_decoder.pth": lambda: original("decoder"),
    "wrapped.pt": lambda: {"state_dict": prefixed("module.", original("decoder"))},
    "comfy.safetensors": lambda: (
        both("taesd_encoder.", "taesd_decoder.") | {"vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)}
    ),
    "whole.pth": lambda: both("encoder.", "decoder."),
    "diffusion_pytorch_model.safetensors": lambda: dict(theirs().state_dict()),
}
FOLDERS = ("folder", "folder of bin")
