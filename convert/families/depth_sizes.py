"""The config of a depth network, from the shapes of its tensors and from the settings of a diffusers folder."""

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt

from convert.errors import UnsupportedFileError, WeightMismatchError, shown
from convert.files.limits import LIMITS
from convert.layouts.depth_names import BACKBONES, BLOCKS
from sd.config import DPT_HYBRID, DepthConfig

Shapes = Mapping[str, tuple[int, ...]]

BACKBONE = BACKBONES[0]
HEAD_WIDTH = DPT_HYBRID.width // DPT_HYBRID.heads  # at every width
STAGES, TAPS = len(DPT_HYBRID.stage_widths), len(DPT_HYBRID.taps)
FIXED = {  # of transformers' DPTConfig
    "is_hybrid": True,
    "readout_type": "project",
    "hidden_act": "gelu",
    "reassemble_factors": [1, 1, 1, 0.5],
    "neck_ignore_stages": [0, 1],
    "use_batch_norm_in_fusion_residual": False,
    "qkv_bias": True,
    "num_channels": 3,
    "patch_size": 16,
}


def depth_config(shapes: Shapes) -> DepthConfig:
    """From the shapes of the depth network, named without its prefix; what no shape shows is DPT-Hybrid's.

    Raises WeightMismatchError for shapes that no such network has.
    """

    def axes(name: str, count: int) -> tuple[int, ...]:
        if name not in shapes:
            raise WeightMismatchError(
                f"has a depth network without {name}: it is incomplete, or not a DPT-Hybrid, the only kind that is "
                "supported."
            )
        if len(shapes[name]) != count or 0 in shapes[name]:
            raise WeightMismatchError(
                f"has a depth network whose {name} has the shape {shown(str(list(shapes[name])))}; {count} axes are "
                "expected, none of them 0."
            )
        return shapes[name]

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})

    stages = [f"{BACKBONE}.stages.{stage}.blocks." for stage in range(count(f"{BACKBONE}.stages."))]
    width = axes("pretrained.model.patch_embed.proj.weight", 4)[0]
    config = replace(
        DPT_HYBRID,
        stem_width=axes(f"{BACKBONE}.stem.conv.weight", 4)[0],
        stage_widths=tuple(axes(f"{stage}0.conv3.weight", 4)[0] for stage in stages),
        stage_blocks=tuple(count(stage) for stage in stages),
        width=width,
        hidden_width=axes(f"{BLOCKS}0.mlp.fc1.weight", 2)[0],
        layers=count(BLOCKS),
        heads=max(1, width // HEAD_WIDTH),
        grid=isqrt(axes("pretrained.model.pos_embed", 3)[1] - 1),
        fusion_width=axes("scratch.refinenet1.out_conv.weight", 4)[0],
        head_width=axes("scratch.output_conv.2.weight", 4)[0],
    )
    check_depth(config)
    return config


def check_depth(config: DepthConfig) -> None:
    """Raises WeightMismatchError for numbers that no such network has."""
    widths, blocks, taps = config.stage_widths, config.stage_blocks, config.taps
    normed = (config.stem_width, *(width // 4 for width in widths))
    rising = all(before < after for before, after in zip((-1, *taps), (*taps, config.layers), strict=True))
    for right, what in (
        (len(widths) == len(blocks) == STAGES, f"{len(widths)} stages; {STAGES} are expected"),
        (0 < config.layers <= LIMITS.text_layers, f"{config.layers} layers; 1 to {LIMITS.text_layers} can be used"),
        (
            len(taps) == TAPS and rising,
            f"{config.layers} layers that reads the output of layers {shown(str(list(taps)))}, counted from 0; "
            f"{TAPS} of 0 to {config.layers - 1} are expected, in rising order",
        ),
        (
            all(0 < found <= LIMITS.text_layers for found in blocks),
            f"{shown(str(blocks))} blocks in its stages; 1 to {LIMITS.text_layers} can be used",
        ),
        (config.heads > 0 and config.width % config.heads == 0, f"{config.heads} heads for a width of {config.width}"),
        (
            config.groups > 0 and all(width > 0 and width % config.groups == 0 for width in normed),
            f"{shown(str(normed))} channels in its norms, which {config.groups} groups must divide",
        ),
        (0 < config.grid <= 1024, f"a grid of {config.grid} positions; 1 to 1024 can be used"),
    ):
        if not right:
            raise WeightMismatchError(f"has a depth network with {what}.")


def with_depth_settings(seen: DepthConfig, settings: Mapping[str, object]) -> DepthConfig:
    """The config read from shapes, completed by the settings of a folder's depth_estimator: heads, groups and taps.

    Its layer_norm_eps is not read: that of the published folder is not the one that the weights were trained with.

    Raises UnsupportedFileError for another kind of network, WeightMismatchError for settings that contradict the
    weights.
    """
    stated = {name: value for name, value in settings.items() if value is not None}
    for name, value in FIXED.items():
        if stated.get(name, value) != value:
            raise UnsupportedFileError(
                f"has a depth_estimator with {name} = {shown(str(stated[name]), 60)}; only {value} is supported."
            )
    backbone = stated.get("backbone_config", {})
    backbone = backbone if isinstance(backbone, dict) else {}
    taps, heads = stated.get("backbone_out_indices"), stated.get("num_attention_heads", seen.heads)
    if taps is not None:
        if not (type(taps) is list and len(taps) == 2 + TAPS and all(type(tap) is int for tap in taps)):
            raise WeightMismatchError(
                f"has a depth_estimator config whose backbone_out_indices is {shown(str(taps), 60)}; a list of "
                f"{2 + TAPS} whole numbers is expected."
            )
        seen = replace(seen, taps=tuple(taps[2:]))
    groups = backbone.get("num_groups", seen.groups)
    if not (type(heads) is type(groups) is int):
        raise WeightMismatchError("has a depth_estimator config whose heads and groups are not whole numbers.")
    config = replace(seen, heads=heads, groups=groups)
    for name, value in depth_sizes(config).items():
        if stated.get(name, value) != value:
            raise WeightMismatchError(
                f"has a depth_estimator config that contradicts its weights: {name} is "
                f"{shown(str(stated[name]), 60)}, the weights have {value}."
            )
    check_depth(config)
    return config


def depth_sizes(config: DepthConfig) -> dict[str, object]:
    """The settings that follow from shapes, by transformers' names."""
    return {
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.layers,
        "neck_hidden_sizes": [*config.stage_widths[:-1], *(config.width for _ in config.taps)],
        "fusion_hidden_size": config.fusion_width,
    }


def depth_settings(config: DepthConfig) -> dict[str, object]:
    """All settings of a depth_estimator, by transformers' names."""
    return {
        **FIXED,
        **depth_sizes(config),
        "num_attention_heads": config.heads,
        "image_size": config.native_size,
        "backbone_out_indices": [0, 1, *config.taps],
        "backbone_featmap_shape": [1, config.stage_widths[-1], config.grid, config.grid],
        "layer_norm_eps": 1e-6,  # that of the training; transformers' default is 1e-12
        "backbone_config": {
            "model_type": "bit",
            "layer_type": "bottleneck",
            "global_padding": "same",
            "embedding_dynamic_padding": True,
            "embedding_size": config.stem_width,
            "hidden_sizes": list(config.stage_widths),
            "depths": list(config.stage_blocks),
            "num_groups": config.groups,
            "out_features": [f"stage{number + 1}" for number in range(len(config.stage_widths))],
        },
    }
