"""Tensors of the original layout with other names or shapes there: see `open_clip`, `depth_layout`."""

from convert.layouts.names import (
    OPTIONAL,
    PREFIXES,
    Original,
    original_names,
    text_encoder_parameters,
    text_places,
)
from convert.layouts.open_clip import PROJECTION, open_clip_names
from sd.config import ModelConfig


def joined_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Names in a whole file -> those of `original_names`: one, or several in the order in which they are joined.

    Other tensors have the same name in both.
    """
    names = {}
    for component, place in text_places(config).items():
        prefix, encoder = (PREFIXES | OPTIONAL)[component], getattr(config, component)
        if place.is_open_clip:
            names |= open_clip_names(encoder, place.original, prefix)
        elif place.original != prefix:
            found = [parameter.original for parameter in text_encoder_parameters(encoder)]
            names |= {place.original + name: (prefix + name,) for name in found}
    if config.depth:
        from convert.layouts.depth_layout import fused_names

        names |= fused_names(config.depth)
    return names


def is_transposed(name: str) -> bool:
    """Whether a file keeps the rows of this matrix as columns."""
    return name.endswith(f".{PROJECTION}")


def keys_in_files(config: ModelConfig) -> dict[str, Original]:
    """`original_names` for a reader: with the names in a whole file, and which part of a joined tensor it is."""
    keys = {}
    for name, parts in joined_names(config).items():
        of = [f" (part {number} of {len(parts)})" if len(parts) > 1 else "" for number in range(1, len(parts) + 1)]
        turned = " (transposed)" if is_transposed(name) else ""
        keys |= {part: f"{name}{words}{turned}" for part, words in zip(parts, of, strict=True)}
    return {
        ours: original._replace(name=keys.get(original.name, original.name))
        for ours, original in original_names(config).items()
    }
