"""Every parameter of the depth network: our name, the original's, transformers', and its shape.

The original is the depth network in the files of Stable Diffusion 2 depth, where `depth_model.model.` stands before
these names. Transformers' is the `DPTForDepthEstimation` in a diffusers folder's `depth_estimator`, whose file has
these names.

The original keeps the queries, keys and values of a layer in one tensor, `attn.qkv`, one below the other. In this
table, its parts have names of their own, `attn.q` and so on: see `convert.layouts.depth_layout`. Ours are apart, as
transformers' are, so that the depth network uses the attention of all other networks.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from sd.config import DepthConfig

if TYPE_CHECKING:
    from convert.layouts.names import Table

Rows = Iterator[tuple["Table", tuple[str, str, str], dict[str, int]]]  # what `convert.layouts.names.expand` takes
BLOCKS = "pretrained.model.blocks."
BACKBONES = "pretrained.model.patch_embed.backbone", "dpt.embeddings.backbone.bit"
CLASSES = 1000  # of ImageNet, on which the transformer was trained first

STEM: "Table" = (
    ("conv.weight", "conv.weight", "convolution.weight", ("width", 3, 7, 7)),
    ("norm", "norm", "norm", ("width",)),
)
BOTTLENECK: "Table" = (
    ("conv1.weight", "conv1.weight", "conv1.weight", ("middle", "channels", 1, 1)),
    ("norm1", "norm1", "norm1", ("middle",)),
    ("conv2.weight", "conv2.weight", "conv2.weight", ("middle", "middle", 3, 3)),
    ("norm2", "norm2", "norm2", ("middle",)),
    ("conv3.weight", "conv3.weight", "conv3.weight", ("width", "middle", 1, 1)),
    ("norm3", "norm3", "norm3", ("width",)),
)
SHORTCUT: "Table" = (  # of the first block of a stage
    ("conv.weight", "conv.weight", "conv.weight", ("width", "channels", 1, 1)),
    ("norm", "norm", "norm", ("width",)),
)
PATCH_PROJ: "Table" = (
    ("patch_proj", "pretrained.model.patch_embed.proj", "dpt.embeddings.projection", ("width", "channels", 1, 1)),
)
LAYER: "Table" = (
    ("norm1", "norm1", "layernorm_before", ("width",)),
    ("attention.q", "attn.q", "attention.attention.query", ("width", "width")),
    ("attention.k", "attn.k", "attention.attention.key", ("width", "width")),
    ("attention.v", "attn.v", "attention.attention.value", ("width", "width")),
    ("attention.out", "attn.proj", "attention.output.dense", ("width", "width")),
    ("norm2", "norm2", "layernorm_after", ("width",)),
    ("feed_forward.proj_in", "mlp.fc1", "intermediate.dense", ("hidden", "width")),
    ("feed_forward.proj_out", "mlp.fc2", "output.dense", ("width", "hidden")),
)
PROJECT: "Table" = (("project", "0.project.0", "0", ("width", "twice")),)  # of a readout
READOUT: "Table" = (
    ("conv", "3", "projection", ("width", "width", 1, 1)),
    ("downsample", "4", "resize", ("width", "width", 3, 3)),  # in the last one only
)
RESIDUAL_UNIT: "Table" = (
    ("conv1", "conv1", "convolution1", ("fusion", "fusion", 3, 3)),
    ("conv2", "conv2", "convolution2", ("fusion", "fusion", 3, 3)),
)
OUT: "Table" = (("out", "out_conv", "projection", ("fusion", "fusion", 1, 1)),)
HEAD: "Table" = (
    ("conv1", "0", "0", ("half", "fusion", 3, 3)),
    ("conv2", "2", "2", ("last", "half", 3, 3)),
    ("conv3", "4", "4", (1, "last", 1, 1)),
)
# In the files, and used by nothing.
NORM: "Table" = (("norm", "pretrained.model.norm", "dpt.layernorm", ("width",)),)
CLASSIFIER: "Table" = (("head", "pretrained.model.head", "", (CLASSES, "width")),)
TOKENS: "Table" = (
    ("class_token", "pretrained.model.cls_token", "dpt.embeddings.cls_token", (1, 1, "width")),
    (
        "position_embedding",
        "pretrained.model.pos_embed",
        "dpt.embeddings.position_embeddings",
        (1, "positions", "width"),
    ),
)


def depth_rows(config: DepthConfig) -> Rows:
    """The tables of every parameter of our network, in the order in which it uses them."""
    sizes = {"width": config.width, "twice": 2 * config.width, "hidden": config.hidden_width}
    sizes |= {"fusion": config.fusion_width, "half": config.fusion_width // 2, "last": config.head_width}
    original, theirs = BACKBONES
    yield STEM, ("stem", f"{original}.stem", f"{theirs}.embedder"), {"width": config.stem_width}
    for number, (before, width) in enumerate(pairwise((config.stem_width, *config.stage_widths))):
        for block in range(config.stage_blocks[number]):
            paths = (
                f"stages.{number}.{block}",
                f"{original}.stages.{number}.blocks.{block}",
                f"{theirs}.encoder.stages.{number}.layers.{block}",
            )
            channels = width if block else before
            yield BOTTLENECK, paths, {"channels": channels, "middle": width // 4, "width": width}
            if not block:
                shortcut = f"{paths[0]}.shortcut", f"{paths[1]}.downsample", f"{paths[2]}.downsample"
                yield SHORTCUT, shortcut, {"channels": channels, "width": width}
    yield PATCH_PROJ, ("", "", ""), {"channels": config.stage_widths[-1], "width": config.width}
    yield TOKENS, ("", "", ""), sizes | {"positions": 1 + config.grid**2}
    for layer in range(config.layers):
        paths = f"layers.{layer}", f"{BLOCKS}{layer}", f"dpt.encoder.layer.{layer}"
        yield LAYER, paths, sizes
    tapped = len(config.stage_widths) - 1  # stages whose output goes to the fusion as it is
    for readout in range(len(config.taps)):
        index = tapped + readout
        ours, path = f"readouts.{readout}", f"pretrained.act_postprocess{index + 1}"
        yield PROJECT, (ours, path, f"neck.reassemble_stage.readout_projects.{index}"), sizes
        table = READOUT if readout == len(config.taps) - 1 else READOUT[:1]
        yield table, (ours, path, f"neck.reassemble_stage.layers.{index}"), sizes
    widths = (*config.stage_widths[:-1], *(config.width for _ in config.taps))
    for index, channels in enumerate(widths):
        names = f"reduce.{index}.weight", f"scratch.layer{index + 1}_rn.weight", f"neck.convs.{index}.weight"
        yield ((*names, ("fusion", "channels", 3, 3)),), ("", "", ""), sizes | {"channels": channels}
    for index in range(len(widths)):
        paths = _fusion(index, len(widths))
        for unit in (1, 2) if index < len(widths) - 1 else (2,):  # the deepest has nothing to add to
            yield RESIDUAL_UNIT, _residual(paths, unit), sizes
        yield OUT, paths, sizes
    yield HEAD, ("head", "scratch.output_conv", "head.head"), sizes


def unused_rows(config: DepthConfig) -> Rows:
    """The tables of what is in the files and nothing uses, so that our network has none of it.

    They are the norm after the last layer, one residual unit of the deepest fusion, which has no deeper feature map to
    add to, and the classifier of an earlier training. Transformers' files do not have the classifier: its name there is
    empty.
    """
    count = len(config.stage_widths) - 1 + len(config.taps)
    sizes = {"width": config.width, "fusion": config.fusion_width}
    yield NORM, ("", "", ""), sizes
    yield RESIDUAL_UNIT, _residual(_fusion(count - 1, count), 1), sizes
    yield CLASSIFIER, ("", "", ""), sizes


def _fusion(index: int, count: int) -> tuple[str, str, str]:
    """A fusion block, of which transformers counts the deepest first."""
    return f"fusion.{index}", f"scratch.refinenet{index + 1}", f"neck.fusion_stage.layers.{count - 1 - index}"


def _residual(fusion: tuple[str, str, str], unit: int) -> tuple[str, str, str]:
    ours, original, theirs = fusion
    return f"{ours}.residual{unit}", f"{original}.resConfUnit{unit}", f"{theirs}.residual_layer{unit}"
