"""The weights of a loaded model, and those of a file."""

import torch
from conftest import TINY

from convert.checkpoint import match_shapes, read_checkpoint
from convert.files.reader import open_checkpoint
from convert.files.tensors import as_tensor
from convert.layouts.names import ema_name, original_names, parameter_shapes

PARTS = ("text_encoder", "unet", "vae")


def parameters(model):
    return {f"{part}.{name}": value for part in PARTS for name, value in getattr(model, part).state_dict().items()}


def expected(state, *, ema=False):
    """Our parameters from the original ones, by the tables alone."""
    tensors = {}
    for ours, (name, axes) in original_names(TINY).items():
        value = state[ema_name(name) if ema and ours.startswith("unet.") else name]
        tensors[ours] = value.reshape(value.shape[: value.dim() - axes])
    return tensors


def equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def stored(path, weights="auto"):
    """The weights in a file or folder of any layout, by our names and in our shapes."""
    with open_checkpoint(path) as file:
        checkpoint = read_checkpoint(file, weights=weights)
        found = match_shapes(checkpoint, parameter_shapes(checkpoint.config)).tensors
        return {name: as_tensor(file, record).clone() for name, record in found.items()}
