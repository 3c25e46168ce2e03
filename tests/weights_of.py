"""The weights of a loaded model, beside those of the file that it came from."""

import torch
from conftest import TINY

from convert.layouts.names import ema_name, original_names

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
