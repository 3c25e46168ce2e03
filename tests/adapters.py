"""Made-up adapters: the names and shapes of real ones, at any width."""

from collections.abc import Mapping
from pathlib import Path

import torch
from conftest import TINY
from safetensors.torch import save_file

from convert.layouts.adapter_names import AdaptedFamily, adapted_family, kohya_names, modules

FAMILY = adapted_family(TINY)
Shapes = dict[str, tuple[int, ...]]
CONVOLUTIONS = ("conv1", "conv2", "time_proj", "skip", "downsample.conv", "upsample.conv")  # ends of our names


def lora_shapes(family: AdaptedFamily = FAMILY, *, rank: int = 4, conv: bool = False) -> Shapes:
    """A file of kohya's scripts: attention and feed-forward; `conv`: also the residual blocks and what resamples."""
    shapes: Shapes = {}
    for ours, name in kohya_names(family).items():
        outputs, *inputs = modules(family)[ours]
        attends = (ours.startswith("text_encoder") and not ours.endswith(".projection")) or ".attention." in ours
        if not inputs or "norm" in ours or not (attends or (conv and ours.endswith(CONVOLUTIONS))):
            continue
        projects = ours.startswith("unet.") and ours.endswith(("attention.proj_in", "attention.proj_out"))
        kernel = (1, 1) if projects and family.name.startswith("sd-v1") else tuple(inputs[1:])  # a convolution in v1
        shapes |= {
            f"{name}.alpha": (),
            f"{name}.lora_down.weight": (rank, inputs[0], *kernel),
            f"{name}.lora_up.weight": (outputs, rank, *(1 for _ in kernel)),
        }
    return shapes


def lora(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: dict[str, str] | None = None,
    *,
    extra: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    size: float = 0.05,
) -> Path:
    """Write an adapter with made-up values; the alphas are half of the ranks."""
    generator = torch.Generator().manual_seed(seed)
    rank = next((shape[0] for name, shape in shapes.items() if ".lora_down." in name), 2)
    tensors = {name: (size * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
    tensors |= {name: torch.tensor(rank / 2, dtype=dtype) for name in shapes if name.endswith(".alpha")}
    tensors |= extra or {}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata)
    else:
        torch.save(tensors, path)
    return path
