"""Every parameter of a model: our name, the one in the original files, the one in diffusers' folders, and its shape.

The tables are plain strings, relative to one block. Shapes come from the config alone: the networks in `sd/` have the
same ones, but they are made of torch, which takes longer to import than it takes to copy a gigabyte. Tests compare the
two.
"""

from collections.abc import Iterator
from typing import NamedTuple

from sd.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sd.networks.block_plan import BlockRow, block_plan

Row = tuple[str, str, str, tuple[str | int, ...]]
Table = tuple[Row, ...]

FIRST_CONV = "unet.input_blocks.0.conv"  # reads more channels in models for inpainting, editing and depth

# A row is a module: ours, the original's, diffusers', the shape of its weight. A bias has the first axis of the weight;
# a name that ends in .weight has none, and what has three axes is the parameter itself. Where a block changes the
# number of channels, it is from `channels` to `width`.
UNET_ENDS: Table = (
    ("time_embed.linear1", "time_embed.0", "time_embedding.linear_1", ("time", "width")),
    ("time_embed.linear2", "time_embed.2", "time_embedding.linear_2", ("time", "time")),
    ("out.norm", "out.0", "conv_norm_out", ("last",)),
    ("out.conv", "out.2", "conv_out", ("out", "last", 3, 3)),
)
LABEL: Table = (  # of families whose UNet is given a vector beside the text
    ("label_emb.linear1", "label_emb.0.0", "add_embedding.linear_1", ("time", "vector")),
    ("label_emb.linear2", "label_emb.0.2", "add_embedding.linear_2", ("time", "time")),
)
GUIDANCE: Table = (  # of UNets that were distilled with guidance
    ("cond_proj.weight", "time_embed.cond_proj.weight", "time_embedding.cond_proj.weight", ("width", "guidance")),
)
CONV: Table = (("", "", "", ("width", "channels", 3, 3)),)
DOWNSAMPLE: Table = (("conv", "op", "conv", ("width", "width", 3, 3)),)
UPSAMPLE: Table = (("conv", "conv", "conv", ("width", "width", 3, 3)),)
RESIDUAL_BLOCK: Table = (
    ("norm1", "in_layers.0", "norm1", ("channels",)),
    ("conv1", "in_layers.2", "conv1", ("width", "channels", 3, 3)),
    ("time_proj", "emb_layers.1", "time_emb_proj", ("width", "time")),
    ("norm2", "out_layers.0", "norm2", ("width",)),
    ("conv2", "out_layers.3", "conv2", ("width", "width", 3, 3)),
    ("skip", "skip_connection", "conv_shortcut", ("width", "channels", 1, 1)),  # only where they differ
)
SPATIAL_TRANSFORMER: Table = (
    ("norm", "norm", "norm", ("width",)),
    ("proj_in", "proj_in", "proj_in", ("width", "width")),
    ("proj_out", "proj_out", "proj_out", ("width", "width")),
)
TRANSFORMER_BLOCK: Table = (
    ("norm1", "norm1", "norm1", ("width",)),
    ("self_attention.q.weight", "attn1.to_q.weight", "attn1.to_q.weight", ("width", "width")),
    ("self_attention.k.weight", "attn1.to_k.weight", "attn1.to_k.weight", ("width", "width")),
    ("self_attention.v.weight", "attn1.to_v.weight", "attn1.to_v.weight", ("width", "width")),
    ("self_attention.out", "attn1.to_out.0", "attn1.to_out.0", ("width", "width")),
    ("norm2", "norm2", "norm2", ("width",)),
    ("cross_attention.q.weight", "attn2.to_q.weight", "attn2.to_q.weight", ("width", "width")),
    ("cross_attention.k.weight", "attn2.to_k.weight", "attn2.to_k.weight", ("width", "context")),
    ("cross_attention.v.weight", "attn2.to_v.weight", "attn2.to_v.weight", ("width", "context")),
    ("cross_attention.out", "attn2.to_out.0", "attn2.to_out.0", ("width", "width")),
    ("norm3", "norm3", "norm3", ("width",)),
    ("feed_forward.proj_in", "ff.net.0.proj", "ff.net.0.proj", ("gated", "width")),
    ("feed_forward.proj_out", "ff.net.2", "ff.net.2", ("width", "hidden")),
)

VAE_LATENTS: Table = (
    ("quant_conv", "quant_conv", "quant_conv", ("moments", "moments", 1, 1)),
    ("post_quant_conv", "post_quant_conv", "post_quant_conv", ("latents", "latents", 1, 1)),
)
VAE_ENDS: Table = (  # in the encoder and in the decoder
    ("conv_in", "conv_in", "conv_in", ("first", "channels", 3, 3)),
    ("norm_out", "norm_out", "conv_norm_out", ("last",)),
    ("conv_out", "conv_out", "conv_out", ("out", "last", 3, 3)),
)
VAE_RESIDUAL_BLOCK: Table = (
    ("norm1", "norm1", "norm1", ("channels",)),
    ("conv1", "conv1", "conv1", ("width", "channels", 3, 3)),
    ("norm2", "norm2", "norm2", ("width",)),
    ("conv2", "conv2", "conv2", ("width", "width", 3, 3)),
    ("skip", "nin_shortcut", "conv_shortcut", ("width", "channels", 1, 1)),  # only where they differ
)
VAE_ATTENTION: Table = (
    ("norm", "norm", "group_norm", ("width",)),
    ("attention.q", "q", "to_q", ("width", "width")),
    ("attention.k", "k", "to_k", ("width", "width")),
    ("attention.v", "v", "to_v", ("width", "width")),
    ("attention.out", "proj_out", "to_out.0", ("width", "width")),
)

TEXT_ENCODER_ENDS: Table = (
    ("token_embedding.weight", *2 * ("embeddings.token_embedding.weight",), ("vocabulary", "width")),
    ("position_embedding.weight", *2 * ("embeddings.position_embedding.weight",), ("length", "width")),
    ("final_norm", "final_layer_norm", "final_layer_norm", ("width",)),
)
PROJECTION: Table = (("projection.weight", *2 * ("text_projection.weight",), ("pooled", "width")),)
ENCODER_LAYER: Table = (
    ("norm1", "layer_norm1", "layer_norm1", ("width",)),
    ("attention.q", "self_attn.q_proj", "self_attn.q_proj", ("width", "width")),
    ("attention.k", "self_attn.k_proj", "self_attn.k_proj", ("width", "width")),
    ("attention.v", "self_attn.v_proj", "self_attn.v_proj", ("width", "width")),
    ("attention.out", "self_attn.out_proj", "self_attn.out_proj", ("width", "width")),
    ("norm2", "layer_norm2", "layer_norm2", ("width",)),
    ("feed_forward.proj_in", "mlp.fc1", "mlp.fc1", ("hidden", "width")),
    ("feed_forward.proj_out", "mlp.fc2", "mlp.fc2", ("width", "hidden")),
)

# component -> where the whole original file keeps it
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
DEPTH_NETWORK = "depth_network", "depth_model.model."  # which few models have, in ours and in the original layout
DEPTH_ESTIMATOR = "depth_estimator"  # the same in a diffusers folder
SECOND_TEXT = "text_encoder_2", "conditioner.embedders.1.transformer.text_model."  # of XL, see `open_clip`
OPTIONAL = dict([SECOND_TEXT, DEPTH_NETWORK])  # components that few models have -> where their names begin
OPEN_CLIP = "cond_stage_model.model."  # and OpenCLIP's text encoder, in files of version 2: see `open_clip`
OPEN_CLIP_LAYERS = OPEN_CLIP + "transformer.resblocks."
NEVER_RUN = (OPEN_CLIP_LAYERS, f"{OPEN_CLIP}text_projection", f"{OPEN_CLIP}logit_scale")  # what keeps its own name
TEXT_PREFIX = "text_model."  # of diffusers' names of the text encoder; transformers 5 leaves it out

# Linear layers of ours that files store as 1x1 convolutions: their weights have two more axes there, of length 1.
# Diffusers does so in the UNet only; since version 2, a UNet has them as linear layers everywhere.
POINTWISE = {
    "unet": ("attention.proj_in.weight", "attention.proj_out.weight"),
    "vae": tuple(f"mid.attention.{name}.weight" for name, *_ in VAE_ATTENTION if name != "norm"),
    "text_encoder": (),
    **dict.fromkeys(OPTIONAL, ()),
}


class TextPlace(NamedTuple):
    """Where files keep a text encoder."""

    original: str  # what stands before its names in the original layout
    is_open_clip: bool  # whether they are OpenCLIP's there: see `convert.layouts.open_clip`
    folder: str  # the component of a diffusers folder


class Generation(NamedTuple):
    linear: bool  # the projections around the UNet's transformers are stored as linear layers, not as convolutions
    texts: tuple[TextPlace, ...]  # of `text_encoder` and, if there is one, `text_encoder_2`
    unused_layers: int = 0  # of the text encoder in original files, which are never run

    @property
    def of_generative_models(self) -> bool:
        """Whether the original files are those of Stability-AI/generative-models."""
        return self.texts[0].original.startswith("conditioner.")


GENERATIONS = {  # how the names of its families begin
    "sd-v1": Generation(False, (TextPlace("cond_stage_model.transformer.text_model.", False, "text_encoder"),)),
    "sd-v2": Generation(True, (TextPlace("cond_stage_model.model.", True, "text_encoder"),), unused_layers=1),
    "sdxl-refiner": Generation(True, (TextPlace("conditioner.embedders.0.model.", True, "text_encoder_2"),)),
    "sdxl": Generation(
        True,
        (
            TextPlace("conditioner.embedders.0.transformer.text_model.", False, "text_encoder"),
            TextPlace("conditioner.embedders.1.model.", True, "text_encoder_2"),
        ),
    ),
}


def generation_named(family: str) -> Generation:
    """The generation of a family, by its name; the first one for a name that a stranger made up."""
    return next((row for begin, row in GENERATIONS.items() if family.startswith(begin)), GENERATIONS["sd-v1"])


def generation(config: ModelConfig) -> Generation:
    """The generation of a model."""
    return generation_named(config.family)


def text_places(config: ModelConfig) -> dict[str, TextPlace]:
    """Where files keep the text encoders of a model, by our names of these."""
    return dict(zip(("text_encoder", "text_encoder_2"), generation(config).texts, strict=False))


def folder_of(config: ModelConfig, component: str) -> str:
    """The component of a diffusers folder that a network is in."""
    places = text_places(config)
    return places[component].folder if component in places else component


class Parameter(NamedTuple):
    """A parameter of one network: its names, relative to the network, and its shape."""

    ours: str
    original: str
    diffusers: str
    shape: tuple[int, ...]


class Original(NamedTuple):
    """A parameter in a foreign file."""

    name: str
    unit_axes: int  # axes of length 1 behind those of our parameter


def expand(table: Table, paths: tuple[str, str, str], **sizes: int) -> Iterator[Parameter]:
    """The parameters of a table under a path in each layout; `sizes` are those that its shapes name."""
    for *names, axes in table:
        if names[0] == "skip" and sizes["channels"] == sizes["width"]:
            continue
        weight = tuple(sizes.get(axis, axis) for axis in axes)
        leaves = (
            {"": weight} if names[0].endswith(".weight") or len(axes) == 3 else {"weight": weight, "bias": weight[:1]}
        )
        for leaf, shape in leaves.items():
            parts = ((path, name, leaf) for path, name in zip(paths, names, strict=True))
            yield Parameter(*(".".join(filter(None, part)) for part in parts), shape)


def unet_parameters(config: UNetConfig) -> Iterator[Parameter]:
    sizes = {"time": 4 * config.width, "last": config.width * config.multipliers[0], "out": config.out_channels}
    yield from expand(UNET_ENDS, ("", "", ""), width=config.width, **sizes)
    if config.vector_width:
        yield from expand(LABEL, ("", "", ""), vector=config.vector_width, **sizes)
    if config.guidance_width:
        yield from expand(GUIDANCE, ("", "", ""), guidance=config.guidance_width, width=config.width)
    for row in block_plan(config):
        yield from block_parameters(row, config)


def block_parameters(row: BlockRow, config: UNetConfig) -> Iterator[Parameter]:
    """One row of the plan. Our layers have names, the original numbers them; diffusers counts level by level."""
    stage, _, number = row.name.partition(".")
    level, slot = divmod(int(number or 0) - (stage == "input_blocks"), config.residuals_per_level + 1)
    block = {"input_blocks": f"down_blocks.{level}", "output_blocks": f"up_blocks.{level}"}.get(stage, "mid_block")
    channels, width = row.in_channels, row.out_channels
    for index, layer in enumerate(row.layers):
        ours, original = f"{row.name}.{layer}", f"{row.name}.{index}"
        if layer == "conv":
            yield from expand(CONV, (ours, original, "conv_in"), channels=channels, width=width)
        elif layer in ("downsample", "upsample"):
            table = DOWNSAMPLE if layer == "downsample" else UPSAMPLE
            yield from expand(table, (ours, original, f"{block}.{layer}rs.0"), width=width)
        elif layer == "attention":
            theirs = f"{block}.attentions.{slot}"
            yield from expand(SPATIAL_TRANSFORMER, (ours, original, theirs), width=width)
            sizes = {"width": width, "context": config.context_width, "hidden": 4 * width, "gated": 2 * 4 * width}
            for depth in range(row.depth):
                inner = f"transformer_blocks.{depth}"
                paths = f"{ours}.blocks.{depth}", f"{original}.{inner}", f"{theirs}.{inner}"
                yield from expand(TRANSFORMER_BLOCK, paths, **sizes)
        else:
            paths = ours, original, f"{block}.resnets.{1 if layer == 'residual2' else slot}"
            yield from expand(RESIDUAL_BLOCK, paths, channels=channels, width=width, time=4 * config.width)
            channels = width


def vae_parameters(config: VAEConfig) -> Iterator[Parameter]:
    widths = [config.width * multiplier for multiplier in config.multipliers]
    latents, deepest, levels = config.latent_channels, widths[-1], len(widths)
    yield from expand(VAE_LATENTS, ("", "", ""), latents=latents, moments=2 * latents)
    for half, ends in (
        ("encoder", {"channels": config.image_channels, "first": widths[0], "last": deepest, "out": 2 * latents}),
        ("decoder", {"channels": latents, "first": deepest, "last": widths[0], "out": config.image_channels}),
    ):
        middle, block = f"{half}.mid", f"{half}.mid_block"
        sizes = {"channels": deepest, "width": deepest}
        yield from expand(VAE_ENDS, (half, half, half), **ends)
        yield from expand(
            VAE_RESIDUAL_BLOCK, (f"{middle}.residual1", f"{middle}.block_1", f"{block}.resnets.0"), **sizes
        )
        yield from expand(VAE_ATTENTION, (f"{middle}.attention", f"{middle}.attn_1", f"{block}.attentions.0"), **sizes)
        yield from expand(
            VAE_RESIDUAL_BLOCK, (f"{middle}.residual2", f"{middle}.block_2", f"{block}.resnets.1"), **sizes
        )
    for path, block, resample, counts in (
        ("encoder.down", "encoder.down_blocks", "downsample", range(levels)),
        ("decoder.up", "decoder.up_blocks", "upsample", range(levels - 1, -1, -1)),  # diffusers counts as it runs
    ):
        down = resample == "downsample"
        for level, width in enumerate(widths):
            ours, theirs = f"{path}.{level}", f"{block}.{counts[level]}"
            channels = widths[max(level - 1, 0)] if down else widths[min(level + 1, levels - 1)]
            for index in range(config.residuals_per_level + (not down)):
                paths = f"{ours}.residuals.{index}", f"{ours}.block.{index}", f"{theirs}.resnets.{index}"
                yield from expand(VAE_RESIDUAL_BLOCK, paths, channels=width if index else channels, width=width)
            if level != (levels - 1 if down else 0):
                paths = f"{ours}.resample", f"{ours}.{resample}", f"{theirs}.{resample}rs.0"
                yield from expand(UPSAMPLE, paths, width=width)


def text_encoder_parameters(config: TextEncoderConfig) -> Iterator[Parameter]:
    sizes = {"vocabulary": config.vocabulary, "length": config.context_length}
    sizes |= {"width": config.width, "hidden": config.hidden_width}
    yield from expand(TEXT_ENCODER_ENDS, ("", "", ""), **sizes)
    if config.pooled_width:
        yield from expand(PROJECTION, ("", "", ""), pooled=config.pooled_width, **sizes)
    for layer in range(config.layers):
        path = f"encoder.layers.{layer}"
        yield from expand(ENCODER_LAYER, (f"layers.{layer}", path, path), **sizes)


def parameters(config: ModelConfig, part: str | None = None) -> Iterator[tuple[str, Parameter]]:
    """Every parameter of a model, or of one part, with its component, in the order in which our files keep them."""
    for component, found in (
        ("unet", unet_parameters(config.unet)),
        ("vae", vae_parameters(config.vae)),
        ("text_encoder", text_encoder_parameters(config.text_encoder)),
    ):
        if part in (None, component):
            for parameter in found:
                yield component, parameter
    if config.text_encoder_2 and part in (None, SECOND_TEXT[0]):
        for parameter in text_encoder_parameters(config.text_encoder_2):
            yield SECOND_TEXT[0], parameter
    if config.depth and part in (None, DEPTH_NETWORK[0]):
        from convert.layouts.depth_names import depth_rows

        for table, paths, sizes in depth_rows(config.depth):
            for parameter in expand(table, paths, **sizes):
                yield DEPTH_NETWORK[0], parameter


def parameter_shapes(config: ModelConfig, part: str | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, `unet.… vae.… text_encoder.…`."""
    return {f"{component}.{ours}": shape for component, (ours, _, _, shape) in parameters(config, part)}


def original_names(config: ModelConfig, part: str | None = None) -> dict[str, Original]:
    """Every parameter of a model, `unet.… vae.… text_encoder.…`, with where an original file keeps it.

    Where a file keeps several in one tensor, each has a name of its own here: see `convert.layouts.joined`.
    """
    pointwise, prefixes = _pointwise(config), PREFIXES | OPTIONAL
    return {
        f"{component}.{ours}": Original(prefixes[component] + original, 2 * ours.endswith(pointwise[component]))
        for component, (ours, original, _, _) in parameters(config, part)
    }


def diffusers_names(config: ModelConfig) -> dict[str, Original]:
    """The same with where a diffusers folder keeps it: `<component>.<name in its file>`."""
    prefixes = {"unet": "unet.", "vae": "vae.", DEPTH_NETWORK[0]: f"{DEPTH_ESTIMATOR}."}
    prefixes |= {ours: f"{place.folder}." for ours, place in text_places(config).items()}
    pointwise = _pointwise(config) | {"vae": ()}

    def named(component: str, theirs: str) -> str:
        is_text = component in ("text_encoder", SECOND_TEXT[0]) and not theirs.startswith("text_projection.")
        return prefixes[component] + (TEXT_PREFIX if is_text else "") + theirs

    return {
        f"{component}.{ours}": Original(named(component, theirs), 2 * ours.endswith(pointwise[component]))
        for component, (ours, _, theirs, _) in parameters(config)
    }


def _pointwise(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    return POINTWISE | {"unet": ()} if generation(config).linear else POINTWISE


def ema_name(unet_name: str) -> str:
    """Where a file keeps the averaged copy of a UNet parameter: the dots are gone, and no parsing puts them back."""
    return "model_ema." + unet_name.removeprefix("model.").replace(".", "")
