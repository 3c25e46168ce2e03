"""Write a checkpoint in the exact original layout, with made-up weights: its pictures are noise.

    python scripts/benchmarks/make_checkpoint.py full.ckpt              # Stable Diffusion v1, 4.27 GB, float32
    python scripts/benchmarks/make_checkpoint.py tiny.ckpt --size tiny  # the same layout, narrow: 69 MB
    python scripts/benchmarks/make_checkpoint.py xl.safetensors --family sdxl --precision fp16  # 6.94 GB
    python scripts/benchmarks/make_checkpoint.py taesd.safetensors --family taesd  # a tiny VAE, as diffusers names it

Real weights cannot be shipped with the code. Such a file has everything else that an original has: the container, the
names, shapes and precisions, the training framework's objects in the pickle. It serves to test loading and speed.
"""

import argparse
import math
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from convert.actions.original_writer import original_state_dict, write_original
from convert.layouts.depth_layout import PREFIX, unused_parameters
from convert.layouts.names import OPEN_CLIP, OPEN_CLIP_LAYERS, generation
from convert.layouts.open_clip import LAYER
from convert.layouts.tiny_vae_names import tiny_vae_parameters
from sd.config import FAMILIES, TAESD, DepthConfig, ModelConfig, TextEncoderConfig
from sd.networks.build import build_networks, parameter_shapes
from sd.pipeline.runner import PRECISIONS


def tiny(config: ModelConfig) -> ModelConfig:
    """The same architecture, narrow enough for a test."""
    unet, encoders = config.unet, [config.text_encoder, config.text_encoder_2]
    by_width = len(set(unet.heads)) > 1  # each head has 64 channels
    first, second = (encoder and tiny_text_encoder(encoder) for encoder in encoders)
    multipliers, depths = unet.multipliers, unet.depths
    if unet.vector_width:  # many transformer blocks, which take most of the space
        multipliers, depths = tuple(min(each, 2) for each in multipliers), tuple(min(each, 2) for each in depths)
    pooled = sum(encoder.pooled_width for encoder in encoders if encoder)
    return replace(
        config,
        text_encoder=first,
        text_encoder_2=second,
        unet=replace(
            unet,
            width=64 if by_width else 32,
            multipliers=multipliers,
            heads=multipliers if by_width else unet.heads,
            context_width=sum(encoder.width for encoder in (first, second) if encoder),
            depths=depths,
            middle_depth=min(unet.middle_depth, 2),
            vector_width=unet.vector_width and unet.vector_width - pooled + 64,
        ),
        vae=replace(config.vae, width=32),
        depth=config.depth and tiny_depth(config.depth),
    )


def tiny_text_encoder(config: TextEncoderConfig) -> TextEncoderConfig:
    layers = 2 + config.skipped_layers
    small = replace(config, width=64, hidden_width=256, layers=layers, heads=1)
    return replace(small, pooled_width=config.pooled_width and 64)


def tiny_depth(config: DepthConfig) -> DepthConfig:
    """All layers, since no shape shows which of them are read."""
    small = replace(config, stem_width=32, stage_widths=(128, 128, 128), stage_blocks=(2, 1, 1), grid=4)
    return replace(small, width=64, hidden_width=128, heads=1, fusion_width=32)


def made_up(name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """One parameter, of a size that keeps activations at about unit variance."""
    values = torch.randn(tuple(shape), generator=generator, device=generator.device)
    if name.endswith("bias"):
        return 0.05 * values
    if "norm" in name:
        return 1 + 0.1 * values
    if name.endswith("head.conv3.weight"):  # of the depth network, which then sees depths above 0
        values = values.abs()
    return values * (0.5 if "embedding" in name else math.sqrt(1 / math.prod(shape[1:])))


def made_up_weights(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under our names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(build_networks(config))
    return {name: made_up(name, shape, generator).to(dtype) for name, shape in shapes.items()}


def made_up_state_dict(
    config: ModelConfig, seed: int = 0, *, dtype: torch.dtype = torch.float32, ema: bool = False
) -> dict[str, Tensor]:
    """All tensors of an original file; with `ema`, also the averaged weights."""
    averaged = made_up_weights(config, seed + 1, dtype) if ema else None
    state = original_state_dict(config, made_up_weights(config, seed, dtype), averaged, updates=470_000)
    own = generation(config)
    if own.unused_layers:
        state |= unused_of_open_clip(config, dtype)
    elif scales := [f"{place.original}logit_scale" for place in own.texts if place.is_open_clip]:
        state |= dict.fromkeys(scales, torch.tensor(4.6, dtype=dtype))
    return state | unused_of_depth(config.depth, dtype) if config.depth else state


def made_up_tiny_vae(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of both halves of TAESD, under the names of diffusers' AutoencoderTiny."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{half}.layers.{parameter.diffusers}": made_up(parameter.ours, parameter.shape, generator).to(dtype)
        for half in ("encoder", "decoder")
        for parameter in tiny_vae_parameters(TAESD, half)
    }


def unused_of_open_clip(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """What files have of OpenCLIP's text encoder and the model never runs: a layer more, and a projection."""
    text, width = config.text_encoder, config.text_encoder.width
    last = f"{OPEN_CLIP_LAYERS}{text.layers}."
    shapes = {f"{last}{module}.bias": (width,) for module in LAYER}
    shapes |= {f"{last}{module}.weight": (width, width) for module in LAYER}
    shapes |= {f"{last}{norm}.weight": (width,) for norm in ("ln_1", "ln_2")}
    shapes |= {f"{last}mlp.c_fc.weight": (text.hidden_width, width), f"{last}mlp.c_fc.bias": (text.hidden_width,)}
    shapes |= {f"{last}mlp.c_proj.weight": (width, text.hidden_width)}
    shapes |= {f"{last}attn.in_proj_weight": (3 * width, width), f"{last}attn.in_proj_bias": (3 * width,)}
    shapes |= {f"{OPEN_CLIP}text_projection": (width, width), f"{OPEN_CLIP}logit_scale": ()}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def unused_of_depth(config: DepthConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """What files have of the depth network and nothing uses."""
    generator = torch.Generator().manual_seed(2)
    return {
        PREFIX + parameter.original: torch.randn(parameter.shape, generator=generator).to(dtype)
        for parameter in unused_parameters(config)
    }


@contextmanager
def pretended_lightning() -> Iterator[type]:
    """The class that original files name in their pickle, without the training framework it belongs to."""
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
    """Save like the original training code, with its framework's callback among the training state."""
    if path.suffix == ".safetensors":  # holds tensors only
        write_original(path, state, force=force)
        return
    with pretended_lightning() as callback:
        write_original(
            path,
            state,
            force=force,
            **{"epoch": 0, "global_step": 470_000, "pytorch-lightning_version": "1.4.2"},
            callbacks={
                callback: {
                    "monitor": "val/loss_simple_ema",
                    "best_model_score": torch.tensor(0.1234),
                    "dirpath": "logs",
                }
            },
            optimizer_states=[],
            lr_schedulers=[],
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="a .ckpt or .safetensors")
    parser.add_argument("--family", choices=[*FAMILIES, "taesd"], default="sd-v1", help="(default: sd-v1)")
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="(default: full)")
    parser.add_argument("--lcm", action="store_true", help="the UNet takes the guidance scale as an input")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="(default: fp32)")
    parser.add_argument("--ema", action="store_true", help="add averaged UNet weights")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args()
    dtype = PRECISIONS[args.precision]
    if args.family == "taesd":
        if args.lcm or args.ema or args.size == "tiny" or args.out.suffix != ".safetensors":
            parser.error("a tiny VAE comes in one size, as OUT.safetensors, without --lcm and --ema")
        state = made_up_tiny_vae(args.seed, dtype)
    else:
        config = FAMILIES[args.family]
        config = tiny(config) if args.size == "tiny" else config
        if args.lcm:
            config = replace(config, unet=replace(config.unet, guidance_width=256))
        state = made_up_state_dict(config, args.seed, dtype=dtype, ema=args.ema)
    try:
        save_original(args.out, state, force=args.force)
    except OSError as error:
        parser.error(str(error))
    print(args.out)


if __name__ == "__main__":
    main()
