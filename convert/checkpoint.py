"""From an open file to a model: which tensors are its weights, under our names, and what else is there.

Three layouts are understood: the original training code's, diffusers', and ours (`convert.convert`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from convert.diffusers_config import with_settings
from convert.errors import UnsupportedFileError, WeightMismatchError, counted, shown, shown_list
from convert.family import check_complete, check_counts, recognise, vae_config
from convert.names import PREFIXES, Original, ema_name, original_names
from convert.noise_schedule import MARKERS, with_schedule
from convert.original_layout import Found, find_tensors
from convert.reader import CheckpointFile
from convert.records import TensorRecord
from convert.stated_config import is_native_size, stated_config
from sd.config import SD_V1, ModelConfig, VAEConfig

FORMAT = "sd-zoo"
FORMAT_VERSION = "1"
WEIGHTS = ("auto", "model", "ema")
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
SCHEDULE_BUFFERS = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
    "scale_factor",
}
POSITION_IDS = PREFIXES["text_encoder"] + "embeddings.position_ids"  # 0 to 76; not a weight
# Of the training alone; model_ema.* are the averaged weights, where they are not asked for.
SCALES = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale", ".comfy_quant", "scaled_fp8")
LEFTOVERS = ("model_ema.", "loss.", "first_stage_model.loss.", "first_stage_model.model_ema.")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in a file: complete, of the right shapes, not yet read."""

    config: ModelConfig
    layout: str  # "original", "diffusers" or "sd-zoo"
    names: dict[str, Original]  # of every weight: ours -> original
    stored_names: dict[str, str]  # of every weight: ours -> the one in the file
    tensors: dict[str, TensorRecord]  # by our names, with our shapes
    weights: str  # which of the UNet's: "model", or "ema", their average over the training
    other_weights: str | None  # the other of the two, where the file has them all as well
    unknown: tuple[str, ...]  # names of tensors that are left aside and are none of the usual extras
    notes: tuple[str, ...] = ()  # what else the user should know, one sentence each
    global_step: int | None  # of the training


@dataclass(frozen=True, kw_only=True)
class VAEWeights:
    """A VAE in a file: complete, not yet read, its shapes still to be checked by `fit_shapes`."""

    config: VAEConfig
    stored_names: dict[str, str]  # of every weight: `vae.…` as we call it -> its name in the file
    tensors: dict[str, TensorRecord]  # by our names


def read_vae(file: CheckpointFile) -> VAEWeights:
    """Find the VAE in a file: one saved alone, under whatever names, or that of a whole checkpoint.

    Raises UnsupportedFileError or WeightMismatchError where there is none, or not all of it.
    """
    found = find_tensors(file)
    prefix = PREFIXES["vae"]
    shapes = {name.removeprefix(prefix): t.shape for name, t in found.tensors.items() if name.startswith(prefix)}
    if not shapes:
        raise WeightMismatchError(f"has no VAE: none of its {counted(len(found.tensors), 'tensor')} is part of one.")
    config = vae_config(shapes)
    check_counts(replace(SD_V1, vae=config))
    names = {
        ours: original
        for ours, original in original_names(replace(SD_V1, vae=config)).items()
        if ours.startswith("vae.")
    }
    missing = [original.name for original in names.values() if original.name not in found.tensors]
    check_complete(missing, len(names))
    stored = {ours: found.stored_names[original.name] for ours, original in names.items()}
    return VAEWeights(
        config=config,
        stored_names=stored,
        tensors={ours: found.tensors[original.name] for ours, original in names.items()},
    )


def read_checkpoint(file: CheckpointFile, *, weights: str = "auto") -> Checkpoint:
    """Find the model in a file. Needs no torch; shapes are checked by `match_shapes`.

    weights  "model", "ema", or "auto": the model's own unless the file has only averaged ones

    Raises UnsupportedFileError for another kind of file, WeightMismatchError for missing or surplus weights.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if file.metadata.get("format") == FORMAT:
        return _read_ours(file, weights)
    return _read_foreign(file, weights)


def _read_foreign(file: CheckpointFile, weights: str) -> Checkpoint:
    """A model in the original layout or in diffusers'; the names of the second become the first's."""
    found = find_tensors(file)
    tensors = found.tensors
    shapes = {name: record.shape for name, record in tensors.items()}
    averaged, left = _averaged(tensors)
    has_model = any(name.startswith(PREFIXES["unet"]) for name in tensors)
    if weights == "auto":
        weights = "ema" if averaged and not has_model else "model"
    if weights == "ema":
        if left:
            raise WeightMismatchError(
                f"holds {counted(len(left), 'EMA weight')} of which its UNet has no plain ones: {shown_list(left)}."
            )
        if not averaged:
            raise WeightMismatchError("has no EMA weights. Leave --weights out, or use --weights model.")
        shapes |= {name: record.shape for name, record in averaged.items()}
    config = recognise(shapes)
    if file.configs:
        config = with_settings(config, file.configs)
    if is_native_size(found.beside.get("native_size")):
        config = replace(config, native_size=found.beside["native_size"])
    config, notes = with_schedule(config, file, tensors)
    names = original_names(config)
    available = tensors
    if weights == "ema":  # never some of one kind and some of the other
        available = {name: record for name, record in tensors.items() if not name.startswith(PREFIXES["unet"])}
        available |= averaged
    missing = [original.name for original in names.values() if original.name not in available]
    in_unet = weights == "ema" and missing and missing[0].startswith(PREFIXES["unet"])
    check_complete([ema_name(name) for name in missing] if in_unet else missing, len(names))
    others = _others(tensors, {original.name for original in names.values()}, found, config.family)
    other, there = ("model", tensors) if weights == "ema" else ("ema", {} if left else averaged)
    complete = all(original.name in there for ours, original in names.items() if ours.startswith("unet."))
    stored = found.stored_names
    if weights == "ema":
        stored = stored | {name: found.stored_names[ema_name(name)] for name in averaged}
    return Checkpoint(
        config=config,
        layout=found.layout,
        names=names,
        stored_names={ours: stored[original.name] for ours, original in names.items()},
        tensors={ours: available[original.name] for ours, original in names.items()},
        weights=weights,
        other_weights=other if complete else None,
        unknown=others,
        notes=notes,
        global_step=found.beside.get("global_step"),
    )


def _others(tensors: Mapping[str, TensorRecord], expected: set[str], found: Found, family: str) -> tuple[str, ...]:
    """The names in the file of tensors that are no weights of the model and none of the usual extras.

    Raises WeightMismatchError where one of them stands inside a network.
    """
    usual = SCHEDULE_BUFFERS | MARKERS | {POSITION_IDS}
    others = [name for name in tensors if name not in expected and name not in usual and not name.startswith(LEFTOVERS)]
    inside = tuple(PREFIXES.values()) if found.layout == "original" else ("unet.", "vae.")
    surplus = [found.stored_names[name] for name in others if name.startswith(inside)]
    if scales := [name for name in surplus if name.endswith(SCALES)]:
        raise WeightMismatchError(
            f"holds float8 weights with scales beside them, which are not read: {shown_list(scales)}. "
            "Use the float16 copy of the model."
        )
    if surplus:
        raise WeightMismatchError(
            f"holds {counted(len(surplus), 'weight')} that an {family} model has no place for: "
            f"{shown_list(surplus)}. It is another architecture; leaving them out would change the pictures."
        )
    return tuple(found.stored_names[name] for name in others)


def _read_ours(file: CheckpointFile, weights: str) -> Checkpoint:
    version = file.metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise UnsupportedFileError(
            f"is in version {shown(str(version))} of the {FORMAT} format; this program reads {FORMAT_VERSION}. "
            "Use a newer program, or convert the original file again."
        )
    stored = file.metadata.get("weights", "model")
    if stored not in ("model", "ema"):
        raise WeightMismatchError(f"says that its weights are '{shown(stored)}'; they are model or ema.")
    config = stated_config(file.metadata.get("config", ""), file.root)
    if weights not in ("auto", stored):
        raise WeightMismatchError(
            f"holds the {stored} weights, not the {weights} ones. Leave --weights out, or use the original file."
        )
    names = original_names(config)
    surplus = [name for name in file.root if name not in names]
    if surplus:
        raise WeightMismatchError(
            f"holds {counted(len(surplus), 'weight')} that its own config has no place for: {shown_list(surplus)}."
        )
    return Checkpoint(
        config=config,
        layout=FORMAT,
        names=names,
        stored_names={ours: ours for ours in names},
        tensors={ours: file.root[ours] for ours in names},
        weights=stored,
        other_weights=None,
        unknown=(),
        global_step=None,
    )


def match_shapes(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """The same checkpoint with every tensor in the shape of its parameter of ours.

    Only axes of length 1 at the end may differ: the original stores some linear layers as 1x1 convolutions.

    Raises WeightMismatchError for another shape, and for numbers that are not floats.
    """
    model = f"an {checkpoint.config.family} model"
    fitted = fit_shapes(checkpoint.tensors, checkpoint.stored_names, expected, model)
    return replace(checkpoint, tensors=fitted)


def fit_shapes(
    tensors: Mapping[str, TensorRecord],
    stored_names: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
    model: str,
) -> dict[str, TensorRecord]:
    """What `match_shapes` does, for tensors by our names. `model` is what they should be."""
    fitted, wrong = {}, []
    for ours, record in tensors.items():
        shape, name = expected[ours], stored_names[ours]
        if record.dtype not in FLOATS:
            wrong.append(f"{name} holds {record.dtype} numbers, floats are expected")
        elif _trimmed(record.shape) != _trimmed(shape):
            wrong.append(f"{name} has the shape {list(record.shape)}, expected {list(shape)}")
        else:
            axes = len(shape) - len(record.shape)
            stride = record.stride[: len(shape)] + (1,) * axes
            fitted[ours] = replace(record, shape=shape, stride=stride)
    if wrong:
        raise WeightMismatchError(
            f"holds {counted(len(wrong), 'weight')} that do not fit {model} of its size: "
            f"{'; '.join(shown(text) for text in wrong[:3])}."
        )
    return fitted


def _averaged(tensors: Mapping[str, TensorRecord]) -> tuple[dict[str, TensorRecord], list[str]]:
    """The averaged (EMA) weights of the UNet under the names of the plain ones, and what belongs to none of these."""
    shadows = {name for name in tensors if name.startswith("model_ema.")} - {"model_ema.decay", "model_ema.num_updates"}
    plain = [name for name in tensors if name.startswith(PREFIXES["unet"])] or _possible_unet_names()
    found = {name: tensors[ema_name(name)] for name in plain if ema_name(name) in shadows}
    return found, sorted(shadows - {ema_name(name) for name in found})


def _possible_unet_names() -> list[str]:
    """Every name that a UNet of the v1 layout may have, at any width."""
    # Growing at every level, it has a shortcut wherever some width has one.
    widest = replace(SD_V1, unet=replace(SD_V1.unet, multipliers=(1, 2, 4, 8)))
    return [original.name for ours, original in original_names(widest).items() if ours.startswith("unet.")]


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
