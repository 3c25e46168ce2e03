"""Tensors of the original layout that hold several of ours, one below the other: see `open_clip`, `depth_layout`."""

from convert.layouts.open_clip import has_open_clip, open_clip_names
from sd.config import ModelConfig


def joined_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Names in a whole file -> those of `original_names`: one, or several in the order in which they are joined.

    Other tensors have the same name in both.
    """
    names = open_clip_names(config.text_encoder.layers) if has_open_clip(config) else {}
    if config.depth:
        from convert.layouts.depth_layout import fused_names

        names |= fused_names(config.depth)
    return names
