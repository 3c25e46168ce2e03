"""From what was trained to an adapter file, in the spelling that everything reads: kohya's."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from convert.adapters.adapter import open_adapter, read_adapter
from convert.files.safetensors_writer import write_safetensors
from convert.files.tensors import as_tensor, raw_bytes
from convert.layouts.adapter_names import adapted_family, kohya_names
from convert.layouts.names import original_names
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
    names, v1 = kohya_names(adapted_family(config)), original_names(config)
    state = {}
    for layer, down, up, alpha in layers:
        axes = (1,) * v1[f"{layer}.weight"].unit_axes if down.ndim == 2 else ()  # a 1x1 convolution in v1 files
        state[f"{names[layer]}.lora_down.weight"] = down.reshape(down.shape + axes)
        state[f"{names[layer]}.lora_up.weight"] = up.reshape(up.shape + axes)
        state[f"{names[layer]}.alpha"] = torch.tensor(alpha)
    write_halves(path, state, metadata)


def read_lora(path: Path, config: ModelConfig) -> dict[str, dict[str, Tensor]]:
    """The parts of each layer of a LoRA or LoCon, "down" and "up", in float32: what `save_lora` wrote.

    Raises CheckpointError for other files, ValueError for other kinds of adapters.
    """
    with open_adapter(path) as file:
        changes = read_adapter(file, config).changes
        if other := {change.kind for change in changes} - {"lora"}:
            raise ValueError(
                f"{path} is no LoRA ({', '.join(sorted(other))}); training begins with LoRA or LoCon only."
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
        write_halves(path, {"emb_params": vectors}, metadata)
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


def write_halves(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors in float16, in the order of their names, as kohya's scripts do."""
    halves = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in sorted(state.items())}
    entries = {name: ("float16", tuple(value.shape)) for name, value in halves.items()}
    data = [raw_bytes(value) for value in halves.values()]
    digest = hashlib.sha256()
    for piece in data:
        digest.update(piece)
    with written_whole(path, force=True) as file:
        write_safetensors(file, entries, data, {**metadata, "sshs_model_hash": digest.hexdigest()})
