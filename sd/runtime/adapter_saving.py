"""From what was trained to an adapter file, in the spelling that everything reads: kohya's."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from convert.adapters.adapter import open_adapter, read_adapter
from convert.adapters.values import to_write
from convert.adapters.writing import Module, Values, write_adapter, write_hashed
from convert.files.tensors import as_tensor
from convert.layouts.adapter_names import adapted_family
from sd.config import ModelConfig
from sd.files import written_whole


def save_lora(
    path: Path,
    config: ModelConfig,
    layers: Iterable[tuple[str, Tensor, Tensor, float]],
    metadata: Mapping[str, str],
) -> None:
    """Write a LoRA or LoCon in float16.

    layers    each layer's name, `unet.… text_encoder.…`, down, up, and alpha
    metadata  `ss_*` and `modelspec.*`; `sshs_model_hash` is added, the sha256 of everything behind the header
    """
    modules = [
        Module(target=layer, kind="lora", parts={"down": halved(down), "up": halved(up)}, rank=len(down), alpha=alpha)
        for layer, down, up, alpha in layers
    ]
    write_adapter(path, modules, adapted_family(config), "kohya", metadata, force=True)


def read_lora(path: Path, config: ModelConfig) -> dict[str, dict[str, Tensor]]:
    """The parts of each layer of a LoRA or LoCon, "down" and "up", in float32: what `save_lora` wrote.

    Raises CheckpointError for other files, ValueError for other kinds of adapters.
    """
    with open_adapter(path) as file:
        changes = read_adapter(file, config).changes
        if other := {change.kind for change in changes} - {"lora"}:
            raise ValueError(
                f"{path} is not a LoRA ({', '.join(sorted(other))}); training begins with LoRA or LoCon only."
            )
        return {
            change.target: {part: as_tensor(file, record).float() for part, record in change.tensors.items()}
            for change in changes
        }


def save_embedding(path: Path, vectors: Tensor, metadata: Mapping[str, str], *, step: int) -> None:
    """Write the vectors (n, D) of a learned word: `.safetensors` as kohya's scripts do, in float16, or `.pt`.

    A `.pt` is in the layout of AUTOMATIC1111's web UI, in float32. In both, the word is the file's name.
    """
    if path.suffix == ".safetensors":
        write_hashed(path, {"emb_params": halved(vectors)}, metadata, force=True)
        return
    values = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors.detach().float().cpu().clone()},
        "name": path.stem,
        "step": step,
        "sd_checkpoint": None,
        "sd_checkpoint_name": metadata["ss_sd_model_name"],
    }
    with written_whole(path, force=True) as file:
        torch.save(values, file)


def halved(values: Tensor) -> Values:
    """In float16."""
    return to_write(values.detach().to("cpu", torch.float16))
