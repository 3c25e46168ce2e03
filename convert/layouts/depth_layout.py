"""The depth network in files: what one tensor holds of several of ours, and what nothing uses."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from convert.files.records import TensorRecord
from convert.layouts.depth_names import BACKBONES, BLOCKS, CLASSIFIER, depth_rows, unused_rows
from convert.layouts.names import DEPTH_ESTIMATOR, DEPTH_NETWORK, Parameter, expand
from convert.layouts.open_clip import has_thirds, third
from sd.config import DPT_HYBRID, DepthConfig

PREFIX = DEPTH_NETWORK[1]  # of the original layout
FUSED = re.compile(rf"{re.escape(PREFIX + BLOCKS)}\d+\.attn\.qkv\.(weight|bias)", re.ASCII)


def depth_parameters(config: DepthConfig) -> Iterator[Parameter]:
    """Every parameter of our network, in the order in which it uses them."""
    for table, paths, sizes in depth_rows(config):
        yield from expand(table, paths, **sizes)


def unused_parameters(config: DepthConfig) -> Iterator[Parameter]:
    """What nothing uses: its name of ours is empty, and that of transformers, where its files do not have it."""
    for table, paths, sizes in unused_rows(config):
        for found in expand(table, paths, **sizes):
            yield found._replace(ours="", **({"diffusers": ""} if table is CLASSIFIER else {}))


def unused_names(config: DepthConfig) -> dict[str, str]:
    """Names in an original file of what nothing uses, where a folder has them too -> `depth_estimator.…` there."""
    return {PREFIX + p.original: f"{DEPTH_ESTIMATOR}.{p.diffusers}" for p in unused_parameters(config) if p.diffusers}


def apart(tensors: Mapping[str, TensorRecord]) -> Iterator[tuple[str, str, TensorRecord]]:
    """Each tensor by its name in a file, and by that of the table; one that holds q, k and v is there three times."""
    for name, record in tensors.items():
        if FUSED.fullmatch(name) and has_thirds(record):
            for part, letter in enumerate("qkv"):
                yield name, name.replace(".qkv.", f".{letter}."), third(record, part)
        else:
            yield name, name, record


def fused_names(config: DepthConfig) -> dict[str, tuple[str, ...]]:
    """Names in a whole file of what is joined there -> the names in the table, in the order of the rows."""
    layers = (f"{PREFIX}{BLOCKS}{layer}.attn" for layer in range(config.layers))
    return {
        f"{layer}.qkv.{leaf}": tuple(f"{layer}.{letter}.{leaf}" for letter in "qkv")
        for layer in layers
        for leaf in ("weight", "bias")
    }


def counted_config(names: list[str], limit: int) -> DepthConfig | None:
    """A config with as many stages, blocks and layers as names of transformers count; None if they are of none.

    limit  how many of each are looked at
    """
    start = f"{DEPTH_ESTIMATOR}.{BACKBONES[1]}.encoder.stages."

    def count(prefix: str) -> int:
        found = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
        return min(len(found), limit)

    stages = count(start)
    if not stages:
        return None
    taps = count(f"{DEPTH_ESTIMATOR}.neck.fusion_stage.layers.") - (stages - 1)
    return replace(
        DPT_HYBRID,
        stage_widths=(DPT_HYBRID.width,) * stages,
        stage_blocks=tuple(count(f"{start}{stage}.layers.") for stage in range(stages)),
        layers=count(f"{DEPTH_ESTIMATOR}.dpt.encoder.layer."),
        taps=tuple(range(max(0, taps))),
    )
