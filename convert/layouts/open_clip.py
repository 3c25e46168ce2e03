"""OpenCLIP's names of a text encoder, as in files of Stable Diffusion 2 and XL, and those of CLIP that we know it by.

OpenCLIP keeps the weights of q, k and v of a layer in one tensor, one below the other. Here they are three views of it.
The projection into the space that texts share with pictures stands there with its rows as columns. XL uses it; version
2 never runs it or the last layer, so these stay beside the model under their own names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from convert.files.records import TensorRecord
from convert.layouts.names import GENERATIONS, OPEN_CLIP_LAYERS, PREFIXES, SECOND_TEXT, TextPlace
from convert.layouts.names import OPEN_CLIP as ROOT
from sd.config import OPEN_CLIP_H, TextEncoderConfig

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
PROJECTION, LAYERS = "text_projection", "transformer.resblocks."
PLACES: dict[str, tuple[TextPlace, str]] = {  # where original files keep a text encoder -> what stands before its names
    place.original: (place, prefix)
    for row in GENERATIONS.values()
    for place, prefix in zip(row.texts, (PREFIXES["text_encoder"], SECOND_TEXT[1]), strict=False)
}
POSITION_IDS = "embeddings.position_ids"  # no weight


def as_clip(tensors: Mapping[str, TensorRecord]) -> Iterator[tuple[str, str, TensorRecord]]:
    """Each tensor by the name that it has here, and by CLIP's; one that holds q, k and v is there three times."""
    last = _unused_layer(tensors)
    for name, record in tensors.items():
        root = next((each for each in PLACES if name.startswith(each)), None)
        if root is None or (root == ROOT and name.startswith((f"{ROOT}{PROJECTION}", f"{OPEN_CLIP_LAYERS}{last}."))):
            yield name, name, record
            continue
        (place, prefix), rest = PLACES[root], name.removeprefix(root)
        found = _of_open_clip(rest, record) if place.is_open_clip else [(rest, record)] * (rest != POSITION_IDS)
        for clip, part in found:
            yield name, prefix + clip, part
        if not found:
            yield name, name, record


def _of_open_clip(name: str, record: TensorRecord) -> list[tuple[str, TensorRecord]]:
    """Names of CLIP's text encoder, and views of a tensor of OpenCLIP's that they stand for; none where it has none."""
    layer, _, inner = name.removeprefix(LAYERS).partition(".")
    start = f"encoder.layers.{layer}."
    if name in ENDS:
        return [(ENDS[name], record)]
    if name == PROJECTION and len(record.shape) == 2:
        return [(f"{PROJECTION}.weight", transposed(record))]
    if not name.startswith(LAYERS):
        return []
    if inner in FUSED and has_thirds(record):
        return [(start + clip, third(record, part)) for part, clip in enumerate(FUSED[inner])]
    module, _, leaf = inner.rpartition(".")
    return [(f"{start}{LAYER[module]}.{leaf}", record)] if module in LAYER else []


def _unused_layer(tensors: Mapping[str, TensorRecord]) -> str:
    """The number of the last layer, if version 2 never runs it; no number for files that were written without it."""
    found = {
        name.removeprefix(OPEN_CLIP_LAYERS).partition(".")[0] for name in tensors if name.startswith(OPEN_CLIP_LAYERS)
    }
    count = len(found)
    whole = count > OPEN_CLIP_H.layers if count >= OPEN_CLIP_H.layers else f"{ROOT}{PROJECTION}" in tensors
    return str(max((int(layer) for layer in found if layer.isdecimal()), default=0)) if whole else "none"


def transposed(record: TensorRecord) -> TensorRecord:
    """A matrix with its rows as columns."""
    return replace(record, shape=record.shape[::-1], stride=record.stride[::-1])


def has_thirds(record: TensorRecord) -> bool:
    return bool(record.shape) and record.shape[0] % 3 == 0


def third(record: TensorRecord, part: int) -> TensorRecord:
    """One of three equal parts of a tensor, along its first axis."""
    rows = record.shape[0] // 3
    return replace(record, shape=(rows, *record.shape[1:]), offset=record.offset + part * rows * record.stride[0])


def open_clip_names(config: TextEncoderConfig, root: str = ROOT, prefix: str = CLIP) -> dict[str, tuple[str, ...]]:
    """OpenCLIP's names in a whole file -> CLIP's: one, or those of q, k and v in the order in which they are joined.

    root, prefix  what stands before either
    """
    names = {root + theirs: (prefix + clip,) for theirs, clip in ENDS.items()}
    if config.pooled_width:
        names[root + PROJECTION] = (f"{prefix}{PROJECTION}.weight",)
    for layer in range(config.layers):
        ours, theirs = f"{prefix}encoder.layers.{layer}.", f"{root}{LAYERS}{layer}."
        for leaf in ("weight", "bias"):
            names |= {f"{theirs}{module}.{leaf}": (f"{ours}{clip}.{leaf}",) for module, clip in LAYER.items()}
        names |= {theirs + fused: tuple(ours + clip for clip in parts) for fused, parts in FUSED.items()}
    return names
