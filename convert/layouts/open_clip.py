"""OpenCLIP's names of a text encoder, as in files of Stable Diffusion 2, and those of CLIP that we know it by.

OpenCLIP keeps the weights of q, k and v of a layer in one tensor, one below the other. Here they are three views of it.
What the model never runs stays beside it under its own name: the last layer, and the projection into the space that
texts share with pictures.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from convert.files.records import TensorRecord
from convert.layouts.names import OPEN_CLIP as ROOT
from convert.layouts.names import OPEN_CLIP_LAYERS, PREFIXES
from sd.config import OPEN_CLIP_H, ModelConfig

CLIP = PREFIXES["text_encoder"]
ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
LAYER = {  # relative to one layer, without .weight and .bias
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
FUSED = {f"attn.in_proj_{leaf}": [f"self_attn.{part}_proj.{leaf}" for part in "qkv"] for leaf in ("weight", "bias")}


def has_open_clip(config: ModelConfig) -> bool:
    """Whether original files of a model's family have OpenCLIP's names."""
    return config.family.startswith("sd-v2")


def as_clip(tensors: Mapping[str, TensorRecord]) -> Iterator[tuple[str, str, TensorRecord]]:
    """Each tensor by the name that it has here, and by CLIP's; one that holds q, k and v is there three times."""
    last = _unused_layer(tensors)
    for name, record in tensors.items():
        in_layer = name.startswith(OPEN_CLIP_LAYERS)
        layer, _, inner = name.removeprefix(OPEN_CLIP_LAYERS).partition(".")
        if (end := name.removeprefix(ROOT)) in ENDS and end != name:
            yield name, CLIP + ENDS[end], record
        elif not in_layer or layer == last:
            yield name, name, record
        elif inner in FUSED and has_thirds(record):
            for part, clip in enumerate(FUSED[inner]):
                yield name, f"{CLIP}encoder.layers.{layer}.{clip}", third(record, part)
        elif (module := inner.rpartition("."))[0] in LAYER:
            yield name, f"{CLIP}encoder.layers.{layer}.{LAYER[module[0]]}.{module[2]}", record
        else:
            yield name, name, record


def _unused_layer(tensors: Mapping[str, TensorRecord]) -> str:
    """The number of the last layer, if the model never runs it; "" for files that were written without it."""
    found = {
        name.removeprefix(OPEN_CLIP_LAYERS).partition(".")[0] for name in tensors if name.startswith(OPEN_CLIP_LAYERS)
    }
    count = len(found)
    whole = count > OPEN_CLIP_H.layers if count >= OPEN_CLIP_H.layers else f"{ROOT}text_projection" in tensors
    return str(max((int(layer) for layer in found if layer.isdecimal()), default=0)) if whole else ""


def has_thirds(record: TensorRecord) -> bool:
    return bool(record.shape) and record.shape[0] % 3 == 0


def third(record: TensorRecord, part: int) -> TensorRecord:
    """One of three equal parts of a tensor, along its first axis."""
    rows = record.shape[0] // 3
    return replace(record, shape=(rows, *record.shape[1:]), offset=record.offset + part * rows * record.stride[0])


def open_clip_names(layers: int) -> dict[str, tuple[str, ...]]:
    """OpenCLIP's names in a whole file -> CLIP's: one, or those of q, k and v in the order in which they are joined.

    layers  that the model runs
    """
    names = {ROOT + theirs: (CLIP + clip,) for theirs, clip in ENDS.items()}
    for layer in range(layers):
        ours, theirs = f"{CLIP}encoder.layers.{layer}.", f"{OPEN_CLIP_LAYERS}{layer}."
        for leaf in ("weight", "bias"):
            names |= {f"{theirs}{module}.{leaf}": (f"{ours}{clip}.{leaf}",) for module, clip in LAYER.items()}
        names |= {theirs + fused: tuple(ours + clip for clip in parts) for fused, parts in FUSED.items()}
    return names
