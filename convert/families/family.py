"""The config of a model, read from the names and shapes of its tensors alone.

Files of the same layout at other widths are recognised too. No shape shows the number of attention heads, so it
comes from the family: a wrong number would load cleanly and give noise.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from convert.errors import UnsupportedFileError, WeightMismatchError, counted, shown, shown_list
from convert.families.recognition import beside, recognise_names
from convert.families.table import MODELS, row_named
from convert.files.limits import LIMITS
from convert.layouts.names import DEPTH_NETWORK, GUIDANCE, PREFIXES, SECOND_TEXT
from sd.config import SD_V1, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig

Shapes = Mapping[str, tuple[int, ...]]

PARTS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}  # that every model has, in words
ALONE = PARTS | {SECOND_TEXT[0]: "second text encoder"}  # that may stand in a file of their own
COMPONENTS = ALONE | {DEPTH_NETWORK[0]: "depth network"}
TEXTS = ("text_encoder", SECOND_TEXT[0])
TITLES = {"sd-v1": "Stable Diffusion 1", "sd-v2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
HEAD_WIDTH = SD_V1.text_encoder.width // SD_V1.text_encoder.heads  # of CLIP and OpenCLIP, at every width


def recognise(shapes: Shapes, family: str | None = None) -> ModelConfig:
    """The config of the model whose tensors have these original names and shapes.

    family  if it is known from elsewhere

    Raises UnsupportedFileError for another kind of file, WeightMismatchError where a part of the model is missing or
    has a shape that no such model has.
    """
    found = recognise_names(shapes)
    if found.refusal:
        raise UnsupportedFileError(found.refusal)
    present = [part for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in shapes)]
    if not shapes:
        raise UnsupportedFileError("holds no tensors, so it is not a checkpoint.")
    if not present:
        raise UnsupportedFileError(
            f"holds {counted(len(shapes), 'tensor')}, none with the name of a weight of Stable Diffusion 1, 2 or XL. "
            f"Their names: {shown_list(sorted(shapes))}."
        )
    if missing := [words for part, words in PARTS.items() if part not in present]:
        there = " and a ".join(PARTS[part] for part in present)
        others = beside(shapes, tuple(PARTS[part] for part in present))
        more = (
            f", and {counted(len(others), 'tensor')} of no network, such as {shown(others[0], 100)}" if others else ""
        )
        advice = ", or put a VAE into it with sd convert --vae FILE" if missing == [PARTS["vae"]] else ""
        raise WeightMismatchError(
            f"has no {' and no '.join(missing)}: its {len(shapes)} tensors are only those of a {there}{more}. Use a "
            f"complete checkpoint{advice}."
        )
    base = row.config if (row := row_named(family) or found.family) and row.config else SD_V1
    prefixes = PREFIXES | (dict([SECOND_TEXT]) if base.text_encoder_2 else {})
    sizes = {part: READ_SIZES[part](_strip(shapes, prefix), base) for part, prefix in prefixes.items()}
    unet, texts = sizes["unet"], [sizes[part] for part in TEXTS if part in sizes]
    if unet.context_width != (width := sum(text.width for text in texts)):
        givers = "text encoder gives" if len(texts) == 1 else "text encoders give"
        raise WeightMismatchError(
            f"holds parts that do not belong together: its UNet attends to text vectors {unet.context_width} wide, "
            f"its {givers} {width}."
        )
    pooled, usual = (sum(text.pooled_width for text in each) for each in (texts, _texts(base)))
    if unet.vector_width - pooled != base.unet.vector_width - usual:
        raise WeightMismatchError(
            f"holds parts that do not belong together: its UNet is given {unet.vector_width} numbers beside the text, "
            f"of which {base.unet.vector_width - usual} are sizes; its text encoder gives {pooled}."
        )
    if row is None or unet.in_channels != row.channels:
        title = next((title for name, title in TITLES.items() if base.family.startswith(name)), base.family)
        allowed = sorted({each.channels for each in MODELS if each.config and each.title.startswith(title)})
        raise UnsupportedFileError(
            f"has a UNet that takes {unet.in_channels} channels; a {title} model takes {', '.join(map(str, allowed))}."
        )
    depth = _strip(shapes, DEPTH_NETWORK[1])
    if depth:
        from convert.families.depth_sizes import depth_config

        depth = depth_config(depth)
    config = replace(row.config, **sizes, depth=depth or None)
    check_counts(config)
    return config


def _texts(config: ModelConfig) -> list[TextEncoderConfig]:
    return [text for part in TEXTS if (text := getattr(config, part))]


def part_config(part: str, shapes: Shapes, model: ModelConfig = SD_V1) -> ModelConfig:
    """A model's config with one part read from these shapes, named without the part's prefix.

    Raises WeightMismatchError for shapes that no such model has.
    """
    config = replace(model, **{part: READ_SIZES[part](shapes, model)})
    check_counts(config)
    return config


def check_counts(config: ModelConfig) -> None:
    """Refuse more repeats than any model has, before anything is made for each of them.

    Raises WeightMismatchError.
    """
    unet, vae = config.unet, config.vae
    counts = [
        ("UNet levels", len(unet.multipliers), 1, LIMITS.levels),
        ("UNet residuals per level", unet.residuals_per_level, 1, LIMITS.residuals_per_level),
        ("transformer blocks in the middle", unet.middle_depth, 0, LIMITS.depth),
        *(("transformer blocks per residual", depth, 0, LIMITS.depth) for depth in unet.depths),
        ("VAE levels", len(vae.multipliers), 1, LIMITS.levels),
        ("VAE residuals per level", vae.residuals_per_level, 1, LIMITS.residuals_per_level),
        *(("text encoder layers", text.layers, text.skipped_layers + 1, LIMITS.text_layers) for text in _texts(config)),
    ]
    for what, found, least, most in counts:
        if not least <= found <= most:
            raise WeightMismatchError(f"has {shown(str(found))} {what}; {least} to {most} can be used.")
    if not len(unet.multipliers) == len(unet.depths) == len(unet.heads):
        raise WeightMismatchError("has a UNet with different numbers of levels, depths and heads.")
    if config.depth:
        from convert.families.depth_sizes import check_depth

        check_depth(config.depth)


def check_complete(missing: list[str], total: int) -> None:
    """Raises WeightMismatchError if names of weights are missing."""
    if missing:
        raise WeightMismatchError(
            f"lacks {len(missing)} of the {total} weights: {shown_list(missing)}. Use a complete checkpoint."
        )


def unet_config(shapes: Shapes, family: ModelConfig) -> UNetConfig:
    """From the shapes of the UNet, named without its prefix, and what shapes do not show from the family."""
    width, in_channels = _shape(shapes, "input_blocks.0.0.weight", 4)[:2]
    levels: list[list[tuple[int, int]]] = [[]]  # (channels, transformer blocks) of the residuals of each level
    depth = _transformer_blocks(shapes)
    index = 1
    while True:
        residual = f"input_blocks.{index}.0.in_layers.2.weight"
        if residual in shapes:
            levels[-1].append((_shape(shapes, residual, 4)[0], depth[f"input_blocks.{index}.1"]))
        elif f"input_blocks.{index}.0.op.weight" in shapes:
            levels.append([])
        else:
            break
        index += 1
    if any(len(level) != len(levels[0]) or len(set(level)) != 1 for level in levels):
        raise WeightMismatchError(f"has a UNet with unequal or incomplete levels: input_blocks 1 to {index - 1}.")
    depths = tuple(level[0][1] for level in levels)
    first = next((level for level, depth in enumerate(depths) if depth), None)
    if first is None:
        raise WeightMismatchError("has a UNet without attention, which cannot see a prompt.")
    block = 1 + first * (len(levels[0]) + 1)
    context = _shape(shapes, f"input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight", 2)
    widths = [level[0][0] for level in levels]
    multipliers = _multipliers("UNet", width, widths)
    return replace(
        family.unet,
        in_channels=in_channels,
        out_channels=_shape(shapes, "out.2.weight", 4)[0],
        width=width,
        multipliers=multipliers,
        residuals_per_level=len(levels[0]),
        depths=depths,
        middle_depth=depth["middle_block.1"],
        heads=_heads(family.unet, widths),
        context_width=context[1],
        vector_width=_shape(shapes, "label_emb.0.0.weight", 2)[1] if family.unet.vector_width else 0,
        guidance_width=_shape(shapes, GUIDANCE[0][1], 2)[1] if GUIDANCE[0][1] in shapes else 0,
    )


def _heads(family: UNetConfig, widths: list[int]) -> tuple[int, ...]:
    """Attention heads by level: as many at every level, or as wide at every level."""
    if len(set(family.heads)) == 1:
        return family.heads[:1] * len(widths)
    channels = family.width * family.multipliers[0] // family.heads[0]
    if any(width % channels for width in widths):
        raise WeightMismatchError(f"has a UNet {widths[0]} wide; multiples of the {channels} of one head are expected.")
    return tuple(width // channels for width in widths)


def vae_config(shapes: Shapes, family: ModelConfig) -> VAEConfig:
    """From the shapes of the VAE, named without its prefix."""
    width, image_channels = _shape(shapes, "encoder.conv_in.weight", 4)[:2]
    levels = _count(shapes, "encoder.down.")
    widths = [_shape(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    return replace(
        family.vae,
        image_channels=image_channels,
        latent_channels=_shape(shapes, "post_quant_conv.weight", 4)[0],
        width=width,
        multipliers=_multipliers("VAE", width, widths),
        residuals_per_level=_count(shapes, "encoder.down.0.block."),
    )


def text_encoder_config(shapes: Shapes, family: ModelConfig, part: str = "text_encoder") -> TextEncoderConfig:
    """From the shapes of the CLIP text transformer, named without its prefix."""
    base = getattr(family, part)
    vocabulary, width = _shape(shapes, "embeddings.token_embedding.weight", 2)
    if vocabulary != SD_V1.text_encoder.vocabulary:
        raise WeightMismatchError(
            f"has a token embedding of {vocabulary} rows; CLIP's tokenizer has {SD_V1.text_encoder.vocabulary} ids. "
            "It was saved with added words, which is not supported."
        )
    if width % HEAD_WIDTH:
        raise WeightMismatchError(
            f"has a text encoder {width} wide, which is not a multiple of the {HEAD_WIDTH} of one head."
        )
    return replace(
        base,
        context_length=_shape(shapes, "embeddings.position_embedding.weight", 2)[0],
        width=width,
        hidden_width=_shape(shapes, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        layers=_count(shapes, "encoder.layers."),
        heads=width // HEAD_WIDTH,
        pooled_width=_shape(shapes, "text_projection.weight", 2)[0] if base.pooled_width else 0,
    )


READ_SIZES = {"unet": unet_config, "vae": vae_config, "text_encoder": text_encoder_config}
READ_SIZES |= {SECOND_TEXT[0]: partial(text_encoder_config, part=SECOND_TEXT[0])}


def _strip(shapes: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise WeightMismatchError(f"lacks the tensor {name}, which is needed to tell the size of the model.")
    if len(shapes[name]) != axes or 0 in shapes[name]:
        raise WeightMismatchError(
            f"holds {name} with the shape {list(shapes[name])}; {axes} axes are expected, none of them 0."
        )
    return shapes[name]


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow the prefix in names."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})


def _transformer_blocks(shapes: Shapes) -> Counter[str]:
    """How many each attention has, in one pass: a file may have a hundred thousand names."""
    found = set()
    for name in shapes:
        attention, inside, rest = name.partition(".transformer_blocks.")
        if inside:
            found.add((attention, rest.partition(".")[0]))
    return Counter(attention for attention, _ in found)


def _multipliers(part: str, width: int, widths: list[int]) -> tuple[int, ...]:
    if not widths or width % SD_V1.unet.groups or any(level % width for level in widths):
        raise WeightMismatchError(
            f"has a {part} whose levels have {shown(str(widths))} channels; multiples of the first are expected, "
            f"and of {SD_V1.unet.groups}, the groups of a norm."
        )
    return tuple(level // width for level in widths)
