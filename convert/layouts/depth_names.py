"""Every parameter of the depth network: our name, the original's, transformers', and its shape.

The original is the depth network in the files of Stable Diffusion 2 depth, where `PREFIX` stands before these names.
Transformers' is the `DPTForDepthEstimation` in a diffusers folder's `depth_estimator`, whose file has these names.

The original keeps the queries, keys and values of a layer in one tensor. In this table, all three of ours have its
name: they are its parts along the first axis, in the order of their rows. Ours are apart, as transformers' are, so that
the depth network uses the attention of all other networks.
"""

from collections.abc import Iterator
from itertools import pairwise

from convert.layouts.names import Parameter, Table, expand
from sd.config import DepthConfig

PREFIX = "depth_model.model."
COMPONENT = "depth_estimator"  # the folder in diffusers' layout
BACKBONES = "pretrained.model.patch_embed.backbone", "dpt.embeddings.backbone.bit"
CLASSES = 1000  # of ImageNet, on which the transformer was trained first

STEM: Table = (
    ("conv.weight", "conv.weight", "convolution.weight", ("width", 3, 7, 7)),
    ("norm", "norm", "norm", ("width",)),
)
BOTTLENECK: Table = (
    ("conv1.weight", "conv1.weight", "conv1.weight", ("middle", "channels", 1, 1)),
    ("norm1", "norm1", "norm1", ("middle",)),
    ("conv2.weight", "conv2.weight", "conv2.weight", ("middle", "middle", 3, 3)),
    ("norm2", "norm2", "norm2", ("middle",)),
    ("conv3.weight", "conv3.weight", "conv3.weight", ("width", "middle", 1, 1)),
    ("norm3", "norm3", "norm3", ("width",)),
)
SHORTCUT: Table = (  # of the first block of a stage
    ("conv.weight", "conv.weight", "conv.weight", ("width", "channels", 1, 1)),
    ("norm", "norm", "norm", ("width",)),
)
PATCH_PROJ: Table = (
    ("patch_proj", "pretrained.model.patch_embed.proj", "dpt.embeddings.projection", ("width", "channels", 1, 1)),
)
LAYER: Table = (
    ("norm1", "norm1", "layernorm_before", ("width",)),
    ("attention.q", "attn.qkv", "attention.attention.query", ("width", "width")),
    ("attention.k", "attn.qkv", "attention.attention.key", ("width", "width")),
    ("attention.v", "attn.qkv", "attention.attention.value", ("width", "width")),
    ("attention.out", "attn.proj", "attention.output.dense", ("width", "width")),
    ("norm2", "norm2", "layernorm_after", ("width",)),
    ("feed_forward.proj_in", "mlp.fc1", "intermediate.dense", ("hidden", "width")),
    ("feed_forward.proj_out", "mlp.fc2", "output.dense", ("width", "hidden")),
)
PROJECT: Table = (("project", "0.project.0", "0", ("width", "twice")),)  # of a readout
READOUT: Table = (
    ("conv", "3", "projection", ("width", "width", 1, 1)),
    ("downsample", "4", "resize", ("width", "width", 3, 3)),  # in the last one only
)
RESIDUAL_UNIT: Table = (
    ("conv1", "conv1", "convolution1", ("fusion", "fusion", 3, 3)),
    ("conv2", "conv2", "convolution2", ("fusion", "fusion", 3, 3)),
)
OUT: Table = (("out", "out_conv", "projection", ("fusion", "fusion", 1, 1)),)
HEAD: Table = (
    ("conv1", "0", "0", ("half", "fusion", 3, 3)),
    ("conv2", "2", "2", ("last", "half", 3, 3)),
    ("conv3", "4", "4", (1, "last", 1, 1)),
)
# In the files, and used by nothing.
NORM: Table = (("norm", "pretrained.model.norm", "dpt.layernorm", ("width",)),)
CLASSIFIER: Table = (("head", "pretrained.model.head", "", (CLASSES, "width")),)
TOKENS = (  # ours, the original's, transformers'; each (1, tokens, width)
    ("class_token", "pretrained.model.cls_token", "dpt.embeddings.cls_token"),
    ("position_embedding", "pretrained.model.pos_embed", "dpt.embeddings.position_embeddings"),
)


def depth_parameters(config: DepthConfig) -> Iterator[Parameter]:
    """Every parameter of our network, in the order in which it uses them."""
    sizes = {"width": config.width, "twice": 2 * config.width, "hidden": config.hidden_width}
    sizes |= {"fusion": config.fusion_width, "half": config.fusion_width // 2, "last": config.head_width}
    original, theirs = BACKBONES
    yield from expand(STEM, ("stem", f"{original}.stem", f"{theirs}.embedder"), width=config.stem_width)
    for number, (before, width) in enumerate(pairwise((config.stem_width, *config.stage_widths))):
        for block in range(config.stage_blocks[number]):
            paths = (
                f"stages.{number}.{block}",
                f"{original}.stages.{number}.blocks.{block}",
                f"{theirs}.encoder.stages.{number}.layers.{block}",
            )
            channels = width if block else before
            yield from expand(BOTTLENECK, paths, channels=channels, middle=width // 4, width=width)
            if not block:
                shortcut = f"{paths[0]}.shortcut", f"{paths[1]}.downsample", f"{paths[2]}.downsample"
                yield from expand(SHORTCUT, shortcut, channels=channels, width=width)
    yield from expand(PATCH_PROJ, ("", "", ""), channels=config.stage_widths[-1], width=config.width)
    for names, tokens in zip(TOKENS, (1, 1 + config.grid**2), strict=True):
        yield Parameter(*names, (1, tokens, config.width))
    for layer in range(config.layers):
        paths = f"layers.{layer}", f"pretrained.model.blocks.{layer}", f"dpt.encoder.layer.{layer}"
        yield from expand(LAYER, paths, **sizes)
    tapped = len(config.stage_widths) - 1  # stages whose output goes to the fusion as it is
    for readout in range(len(config.taps)):
        index = tapped + readout
        ours, path = f"readouts.{readout}", f"pretrained.act_postprocess{index + 1}"
        yield from expand(PROJECT, (ours, path, f"neck.reassemble_stage.readout_projects.{index}"), **sizes)
        table = READOUT if readout == len(config.taps) - 1 else READOUT[:1]
        yield from expand(table, (ours, path, f"neck.reassemble_stage.layers.{index}"), **sizes)
    widths = (*config.stage_widths[:-1], *(config.width for _ in config.taps))
    for index, channels in enumerate(widths):
        paths = f"reduce.{index}", f"scratch.layer{index + 1}_rn", f"neck.convs.{index}"
        yield Parameter(*(f"{path}.weight" for path in paths), (config.fusion_width, channels, 3, 3))
    for index in range(len(widths)):
        paths = _fusion(index, len(widths))
        for unit in (1, 2) if index < len(widths) - 1 else (2,):  # the deepest has nothing to add to
            yield from expand(RESIDUAL_UNIT, _residual(paths, unit), **sizes)
        yield from expand(OUT, paths, **sizes)
    yield from expand(HEAD, ("head", "scratch.output_conv", "head.head"), **sizes)


def unused_parameters(config: DepthConfig) -> Iterator[Parameter]:
    """Parameters in the files that nothing uses, so that our network has none of them: their name of ours is empty.

    They are the norm after the last layer, one residual unit of the deepest fusion, which has no deeper feature map to
    add to, and the classifier of an earlier training. Transformers' files do not have the classifier: its name there is
    empty.
    """
    count = len(config.stage_widths) - 1 + len(config.taps)
    sizes = {"width": config.width, "fusion": config.fusion_width}
    deepest = _residual(_fusion(count - 1, count), 1)
    for found in (*expand(NORM, ("", "", ""), **sizes), *expand(RESIDUAL_UNIT, deepest, **sizes)):
        yield found._replace(ours="")
    for found in expand(CLASSIFIER, ("", "", ""), **sizes):
        yield found._replace(ours="", diffusers="")


def _fusion(index: int, count: int) -> tuple[str, str, str]:
    """A fusion block, of which transformers counts the deepest first."""
    return f"fusion.{index}", f"scratch.refinenet{index + 1}", f"neck.fusion_stage.layers.{count - 1 - index}"


def _residual(fusion: tuple[str, str, str], unit: int) -> tuple[str, str, str]:
    ours, original, theirs = fusion
    return f"{ours}.residual{unit}", f"{original}.resConfUnit{unit}", f"{theirs}.residual_layer{unit}"
