"""Write a checkpoint in the exact original layout, with made-up weights: its pictures are noise.

    python scripts/make_checkpoint.py full.ckpt              # Stable Diffusion v1, 4.27 GB, float32
    python scripts/make_checkpoint.py tiny.ckpt --size tiny  # the same layout, narrow: 30 MB

Real weights cannot be shipped with the code. A file like this one has everything else that an original has: the
container, the names, shapes and precisions, the training framework's objects in the pickle. It is what loading and
speed are tested with.
"""

import argparse
import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from convert.checkpoint import POSITION_IDS
from convert.names import ema_name, original_names
from sd.config import SD_V1, SD_V1_EDIT, SD_V1_INPAINTING, ModelConfig, ScheduleConfig
from sd.files import written_whole
from sd.networks import build_networks, parameter_shapes
from sd.schedule import alphas_cumprod

FAMILIES = {config.family: config for config in (SD_V1, SD_V1_INPAINTING, SD_V1_EDIT)}
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def tiny(config: ModelConfig) -> ModelConfig:
    """The same architecture, narrow enough for a test."""
    return replace(
        config,
        text_encoder=replace(config.text_encoder, width=64, hidden_width=256, layers=2, heads=1),
        unet=replace(config.unet, width=32, context_width=64),
        vae=replace(config.vae, width=32),
        native_size=512,
    )


def made_up_weights(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under our names, of a size that keeps what passes through the networks at about unit variance."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(build_networks(config)).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            values *= 0.05
        elif "norm" in name:
            values = 1 + 0.1 * values
        elif "embedding" in name:
            values *= 0.5
        else:
            values *= math.sqrt(1 / math.prod(shape[1:]))
        weights[name] = values.to(dtype)
    return weights


def schedule_buffers(config: ScheduleConfig) -> dict[str, Tensor]:
    """The twelve tables that the original training code saves beside the weights: Ho et al. (2020), eq. 4 to 7."""
    bars = alphas_cumprod(config).double()
    previous = torch.cat([torch.ones(1), bars[:-1]])
    betas = 1 - bars / previous
    variance = betas * (1 - previous) / (1 - bars)
    tables = {
        "betas": betas,
        "alphas_cumprod": bars,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": bars.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bars).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - bars).log(),
        "sqrt_recip_alphas_cumprod": (1 / bars).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bars - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - bars),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - bars),
    }
    return {name: table.float() for name, table in tables.items()}


def original_state_dict(
    config: ModelConfig, seed: int = 0, *, dtype: torch.dtype = torch.float32, ema: bool = False
) -> dict[str, Tensor]:
    """All tensors of an original file, under its names; with the averaged weights, too, if asked for."""
    names = original_names(config)
    weights = made_up_weights(config, seed, dtype)
    state = schedule_buffers(config.schedule)
    for ours, values in weights.items():
        name, axes = names[ours]
        state[name] = values.reshape(values.shape + (1,) * axes)
    state["model_ema.decay"] = torch.tensor(0.9999)
    state["model_ema.num_updates"] = torch.tensor(470_000, dtype=torch.int32)
    if ema:
        averaged = made_up_weights(config, seed + 1, dtype)
        for ours in weights:
            if ours.startswith("unet."):
                name = names[ours].name
                state[ema_name(name)] = averaged[ours].reshape(state[name].shape)
    state[POSITION_IDS] = torch.arange(config.text_encoder.context_length)[None]
    return state


@contextmanager
def pretended_lightning() -> Iterator[type]:
    """The class whose name original files hold in their pickle, without the training framework it belongs to."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    packages = [name.rsplit(".", depth)[0] for depth in range(3)]
    callback = type("ModelCheckpoint", (), {"__module__": name})
    kept = {package: sys.modules.get(package) for package in packages}
    try:
        for package in packages:
            sys.modules[package] = types.ModuleType(package)
        sys.modules[name].ModelCheckpoint = callback
        yield callback
    finally:
        for package, module in kept.items():
            if module is None:
                del sys.modules[package]
            else:
                sys.modules[package] = module


def save_original(path: Path, state: dict[str, Tensor], *, force: bool = False) -> None:
    """As the original training code saved it: `.ckpt`, a pickle in a zip; or the later `.safetensors`."""
    if path.suffix == ".safetensors":
        with written_whole(path, force=force) as file:
            save_file({name: values.contiguous() for name, values in state.items()}, file.name)
        return
    with pretended_lightning() as callback, written_whole(path, force=force) as file:
        score = torch.tensor(0.1234)
        checkpoint = {
            "epoch": 0,
            "global_step": 470_000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": state,
            "callbacks": {callback: {"monitor": "val/loss_simple_ema", "best_model_score": score, "dirpath": "logs"}},
            "optimizer_states": [],
            "lr_schedulers": [],
        }
        torch.save(checkpoint, file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="a .ckpt or .safetensors")
    parser.add_argument("--family", choices=FAMILIES, default="sd-v1", help="(default: sd-v1)")
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="(default: full)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="(default: fp32)")
    parser.add_argument("--ema", action="store_true", help="with the averaged UNet weights beside the plain ones")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args()
    config = FAMILIES[args.family]
    config = tiny(config) if args.size == "tiny" else config
    state = original_state_dict(config, args.seed, dtype=PRECISIONS[args.precision], ema=args.ema)
    save_original(args.out, state, force=args.force)
    print(args.out)


if __name__ == "__main__":
    main()
