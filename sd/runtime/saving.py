"""From networks to a checkpoint file in the original layout."""

from pathlib import Path

import torch
from torch import Tensor, nn

from convert.actions.original_writer import original_state_dict, write_original
from convert.layouts.wrapping import numbers_of
from sd.config import ModelConfig


def save_model(
    path: Path,
    config: ModelConfig,
    networks: dict[str, nn.Module],
    averaged: dict[str, Tensor],
    *,
    step: int,
    dtype: torch.dtype,
    merge: bool,
) -> None:
    """Write a model in the original layout.

    averaged  the averaged weights that there are, by our names
    merge     True: they replace the plain ones; False: both are written
    """
    weights = {
        f"{component}.{name}": value.detach()
        for component, network in networks.items()
        for name, value in network.named_parameters()
    }
    merged = {name: value.to("cpu", dtype) for name, value in {**weights, **averaged}.items()}
    plain = {name: value.to("cpu", dtype) for name, value in weights.items()}
    state = original_state_dict(config, merged if merge else plain, None if merge else merged, updates=step)
    write_original(path, state, force=True, global_step=step, **numbers_of(config))
