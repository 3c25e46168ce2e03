"""The modules of a model by every name that adapters give them.

An adapter is a list of changes to modules. The programs that write adapters name a module in two ways, as diffusers
does or as the original code does, and join the parts of its path with dots or with underscores:

    down_blocks.1.attentions.0.proj_in     diffusers        unet.…, base_model.model.…, or nothing in front
    down_blocks_1_attentions_0_proj_in     kohya, LyCORIS   lora_unet_…, lycoris_…
    input_blocks.4.1.proj_in               the original     diffusion_model.…
    input_blocks_4_1_proj_in               kohya for XL     lora_unet_…

Underscores also belong to names (`to_q`, `proj_in`), so no rule splits them. Every name is written down from the list
of modules, and looked up whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from convert.layouts.names import TEXT_PREFIX, Parameter, generation_named, text_encoder_parameters, unet_parameters
from sd.config import SD_V1, SD_V2, SDXL, SDXL_REFINER, ModelConfig, TextEncoderConfig, UNetConfig

# What stands before a module of the UNet: joined with underscores, or with dots before diffusers' or original names.
UNET_FLAT = ("lora_unet_", "lycoris_unet_", "lycoris_", "oft_unet_", "unet_")
UNET_DIFFUSERS = ("unet.", "", "base_model.model.", "base_model.model.unet.", "lora_unet.", "lycoris.")
UNET_ORIGINAL = ("diffusion_model.", "model.diffusion_model.", "", "unet.")
# And before one of a text encoder, by its number: the first or only one, the second.
TEXT_FLAT = (("lora_te_", "lora_te1_", "lycoris_te_", "lycoris_", "oft_te_", "oft_te1_"), ("lora_te2_", "oft_te2_"))
TEXT_DOTTED = (
    (
        *("text_encoder.", "", "base_model.model.", "base_model.model.text_encoder.", "lora_te.", "te1.", "te."),
        *("cond_stage_model.transformer.", "text_encoders.clip_l.transformer.", "clip_l.transformer."),
    ),
    ("text_encoder_2.", "lora_te2.", "te2.", "text_encoders.clip_g.transformer.", "clip_g.transformer."),
)
PROCESSORS = {
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out.0": "to_out",
}  # as older versions of diffusers say
PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True, kw_only=True)
class AdaptedFamily:
    """The networks of a family that adapters change."""

    name: str
    title: str
    unet: UNetConfig
    text_encoders: tuple[TextEncoderConfig, ...]


def _row(config: ModelConfig, title: str) -> AdaptedFamily:
    text_encoders = (config.text_encoder, config.text_encoder_2)
    return AdaptedFamily(
        name=config.family, title=title, unet=config.unet, text_encoders=tuple(filter(None, text_encoders))
    )


V1 = _row(SD_V1, "Stable Diffusion 1")  # before XL: what changes only the text encoder fits both
FAMILIES = (
    V1,
    _row(SD_V2, "Stable Diffusion 2"),
    _row(SDXL, "Stable Diffusion XL"),
    _row(SDXL_REFINER, "Stable Diffusion XL refiner"),
)


def adapted_family(config: ModelConfig) -> AdaptedFamily:
    """The networks of a model."""
    return _row(config, next(row.title for row in reversed(FAMILIES) if config.family.startswith(row.name)))


def with_unused_layer(family: AdaptedFamily) -> AdaptedFamily:
    """The same with the layers of a text encoder that the model never runs and some adapters change."""
    unused = generation_named(family.name).unused_layers
    return replace(
        family, text_encoders=tuple(replace(each, layers=each.layers + unused) for each in family.text_encoders)
    )


@lru_cache(maxsize=16)
def modules(family: AdaptedFamily) -> dict[str, tuple[int, ...]]:
    """The shape of each module's weight, by our name: `unet.input_blocks.1.attention.proj_in`."""
    return {ours: shape for ours, _, shape in _modules(family)}


@lru_cache(maxsize=16)
def module_names(family: AdaptedFamily) -> dict[str, str]:
    """Every name of every module -> our name."""
    names: dict[str, str] = {}
    for ours, spellings, _ in _modules(family):
        for name in spellings:
            names.setdefault(name, ours)
    return names


@lru_cache(maxsize=16)
def kohya_names(family: AdaptedFamily) -> dict[str, str]:
    """Our name of each module -> the one that kohya's scripts give it: of XL's UNet the original's, else diffusers'."""
    several = len(family.text_encoders) > 1
    texts = ("lora_te1_", "lora_te2_") if several else ("lora_te_",)
    starts = {"unet.": "lora_unet_", "text_encoder.": texts[0], "text_encoder_2.": texts[-1]}
    names = {ours: starts[root] + flat(theirs.removeprefix(root)) for ours, theirs, root in _diffusers(family)}
    if family.unet.vector_width:
        names |= {ours: starts["unet."] + flat(original) for original, _, ours, _ in _of_unet(family)}
    return names


@lru_cache(maxsize=16)
def diffusers_names(family: AdaptedFamily) -> dict[str, str]:
    """Our name of each module -> diffusers', with the component in front."""
    return {ours: theirs for ours, theirs, _ in _diffusers(family)}


def flat(path: str) -> str:
    return path.replace(".", "_")


def _diffusers(family: AdaptedFamily) -> Iterator[tuple[str, str, str]]:
    """Each module: our name, diffusers', and the component in front of that one."""
    for _, diffusers, ours, _ in _of_unet(family):
        yield ours, f"unet.{diffusers}", "unet."
    for index, component in enumerate(_components(family)):
        for name, ours, _ in _of_text_encoder(family.text_encoders[index], component):
            yield ours, f"{component}.{name}", f"{component}."


def _modules(family: AdaptedFamily) -> Iterator[tuple[str, list[str], tuple[int, ...]]]:
    """Each module: our name, all others, and the shape of its weight."""
    for original, diffusers, ours, shape in _of_unet(family):
        names = [start + flat(path) for start in UNET_FLAT for path in (diffusers, original)]
        names += [start + diffusers for start in UNET_DIFFUSERS]
        names += [start + original for start in UNET_ORIGINAL]
        names += [start + old for start in ("unet.", "") for old in _processor(diffusers)]
        yield ours, names, shape
    for index, component in enumerate(_components(family)):
        for name, ours, shape in _of_text_encoder(family.text_encoders[index], component):
            paths = [name, name.removeprefix(TEXT_PREFIX)]  # transformers 5 leaves it out
            names = [start + flat(name) for start in TEXT_FLAT[index]]
            names += [start + path for start in TEXT_DOTTED[index] for path in paths]
            attention, _, leaf = name.rpartition(".")
            if leaf in PROJECTIONS:
                names.append(f"{component}.{attention}.{PROJECTIONS[leaf]}")
            yield ours, names, shape


def _components(family: AdaptedFamily) -> tuple[str, ...]:
    return ("text_encoder", "text_encoder_2")[: len(family.text_encoders)]


def _of_unet(family: AdaptedFamily) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    for ours, original, diffusers, shape in map(_module, _weights(unet_parameters(family.unet))):
        yield original, diffusers, f"unet.{ours}", shape


def _of_text_encoder(config: TextEncoderConfig, component: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for ours, _, diffusers, shape in map(_module, _weights(text_encoder_parameters(config))):
        if ours == "projection":  # of the text encoder as a whole, not of its transformer
            yield diffusers, f"{component}.{ours}", shape
        elif not ours.endswith("_embedding"):
            yield TEXT_PREFIX + diffusers, f"{component}.{ours}", shape


def _weights(parameters: Iterator[Parameter]) -> Iterator[Parameter]:
    return (parameter for parameter in parameters if parameter.ours.endswith(".weight"))


def _module(weight: Parameter) -> Parameter:
    """The module that a weight belongs to."""
    ours, original, diffusers = (name.removesuffix(".weight") for name in weight[:3])
    return Parameter(ours, original, diffusers, weight.shape)


def _processor(diffusers: str) -> list[str]:
    """What older versions of diffusers call a projection of an attention."""
    for leaf, old in PROCESSORS.items():
        attention = diffusers.removesuffix(f".{leaf}")
        if attention != diffusers and attention.endswith((".attn1", ".attn2")):
            return [f"{attention}.processor.{old}", f"{attention}.{old}"]
    return []
