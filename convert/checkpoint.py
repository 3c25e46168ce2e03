"""From an open file to a model: which tensors are its weights, under our names, and what else is there.

Two layouts are understood: the original training code's, and ours (`convert.convert`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from convert.errors import UnsafeFileError, UnsupportedFileError, WeightMismatchError, counted, shown, shown_list
from convert.family import check_complete, recognise
from convert.limits import LIMITS
from convert.names import PREFIXES, Original, ema_name, original_names
from convert.reader import CheckpointFile
from convert.records import TensorRecord
from convert.stated_config import is_native_size, stated_config
from sd.config import SD_V1, ModelConfig

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
LEFTOVERS = ("model_ema.", "loss.", "first_stage_model.loss.", "first_stage_model.model_ema.")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in a file: complete, of the right shapes, not yet read."""

    config: ModelConfig
    layout: str  # "original" or "sd-zoo"
    names: dict[str, Original]  # of every weight: ours -> original
    tensors: dict[str, TensorRecord]  # by our names, with our shapes
    weights: str  # which of the UNet's: "model", or "ema", their average over the training
    other_weights: str | None  # the other of the two, where the file has them all as well
    unknown: tuple[str, ...]  # names of tensors that are left aside and are none of the usual extras
    global_step: int | None  # of the training


def read_checkpoint(file: CheckpointFile, *, weights: str = "auto") -> Checkpoint:
    """Find the model in a file. Needs no torch; shapes are checked by `match_shapes`.

    weights  "model", "ema", or "auto": the model's own unless the file has only averaged ones

    Raises UnsupportedFileError for another kind of file, WeightMismatchError for missing or surplus weights.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if file.metadata.get("format") == FORMAT:
        return _read_ours(file, weights)
    return _read_original(file, weights)


def _read_original(file: CheckpointFile, weights: str) -> Checkpoint:
    tensors, beside = _unwrap(file.root)
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
    if is_native_size(beside.get("native_size")):
        config = replace(config, native_size=beside["native_size"])
    names = original_names(config)
    expected = {original.name for original in names.values()}
    available = tensors
    if weights == "ema":  # never some of one kind and some of the other
        available = {name: record for name, record in tensors.items() if not name.startswith(PREFIXES["unet"])}
        available |= averaged
    missing = [original.name for original in names.values() if original.name not in available]
    in_unet = weights == "ema" and missing and missing[0].startswith(PREFIXES["unet"])
    check_complete([ema_name(name) for name in missing] if in_unet else missing, len(names))
    usual = SCHEDULE_BUFFERS | {POSITION_IDS}
    others = [name for name in tensors if name not in expected and name not in usual and not name.startswith(LEFTOVERS)]
    surplus = [name for name in others if name.startswith(tuple(PREFIXES.values()))]
    if surplus:
        raise WeightMismatchError(
            f"holds {counted(len(surplus), 'weight')} that an {config.family} model has no place for: "
            f"{shown_list(surplus)}. It is another architecture; leaving them out would change the pictures."
        )
    other, there = ("model", tensors) if weights == "ema" else ("ema", {} if left else averaged)
    complete = all(original.name in there for ours, original in names.items() if ours.startswith("unet."))
    return Checkpoint(
        config=config,
        layout="original",
        names=names,
        tensors={ours: available[original.name] for ours, original in names.items()},
        weights=weights,
        other_weights=other if complete else None,
        unknown=tuple(others),
        global_step=beside.get("global_step"),
    )


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
    fitted, wrong = {}, []
    for ours, record in checkpoint.tensors.items():
        shape = expected[ours]
        name = checkpoint.names[ours].name if checkpoint.layout == "original" else ours
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
            f"holds {counted(len(wrong), 'weight')} that do not fit an {checkpoint.config.family} model of its size: "
            f"{'; '.join(shown(text) for text in wrong[:3])}."
        )
    return replace(checkpoint, tensors=fitted)


def _unwrap(root: object) -> tuple[dict[str, TensorRecord], dict[str, int]]:
    """The tensors by name, and the whole numbers of interest that stand beside them."""
    beside: dict[str, int] = {}
    for _ in range(LIMITS.wrappers + 1):
        if not isinstance(root, dict):
            raise UnsupportedFileError("holds no dictionary of tensors, so it is no checkpoint.")
        for name in ("global_step", "native_size"):
            if type(root.get(name)) is int:
                beside.setdefault(name, root[name])
        if not isinstance(root.get("state_dict"), dict):
            items = root.items()
            return {
                name: item for name, item in items if isinstance(name, str) and isinstance(item, TensorRecord)
            }, beside
        root = root["state_dict"]
    raise UnsafeFileError("wraps its weights in itself")


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
