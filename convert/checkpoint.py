"""Find the model in an open file: its weights under our names, and the tensors beside it.

Three layouts are understood: the original training code's, diffusers', and ours (`convert.actions.convert`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from convert.errors import UnsupportedFileError, WeightMismatchError, counted, joined, shown, shown_list
from convert.families.family import ALONE, PARTS, check_complete, recognise
from convert.families.stated_config import OF_LATENTS, PREDICTIONS, is_guidance_scale, is_native_size, stated_config
from convert.families.table import family_named, with_open_clip
from convert.files.reader import CheckpointFile
from convert.files.records import TensorRecord, trimmed
from convert.layouts.names import (
    DEPTH_NETWORK,
    NEVER_RUN,
    OPEN_CLIP,
    OPTIONAL,
    PREFIXES,
    SECOND_TEXT,
    Original,
    ema_name,
    original_names,
    text_places,
)
from convert.layouts.noise_schedule import ENDS_IN_NOISE, MARKERS, SCHEDULER, Evidence, Statement, statement
from convert.layouts.original_layout import Found, find_tensors
from convert.layouts.wrapping import ADAPTER, adapters_inside
from sd.config import SD_V1, SDXL, SDXL_REFINER, ModelConfig

if TYPE_CHECKING:
    from convert.families.few_step_names import Told

FORMAT = "sd-zoo"
FORMAT_VERSION = "1"
EXTRA = "extra."  # our layout puts this in front of the original names of tensors beside a model
WHOLE = re.compile(r"\d{1,18}", re.ASCII)  # a number in metadata
WEIGHTS = ("auto", "model", "ema")
FOR_FEW_STEPS = re.compile("turbo|lightning|hyper|lcm|dmd", re.IGNORECASE)  # in the names of such models
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
    "denoiser.sigmas",  # of XL
}
UNETS = (SD_V1.unet, SDXL.unet, SDXL_REFINER.unet)  # blocks of every kind
BESIDE_TEXT = ("embeddings.position_ids", "logit_scale")  # in a text encoder's place, and not used
POSITION_IDS = PREFIXES["text_encoder"] + "embeddings.position_ids"  # 0 to 76; not a weight
# Only used in training; model_ema.* are the averaged weights where the plain ones are used.
SCALES = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale", ".comfy_quant", "scaled_fp8")
LEFTOVERS = ("model_ema.", "loss.", "first_stage_model.loss.", "first_stage_model.model_ema.")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in a file, or one of its networks alone: complete, of the right shapes, not yet read."""

    config: ModelConfig
    part: str | None = None  # one of `ALONE`; the config's others are then the family's
    layout: str  # "original", "diffusers" or "sd-zoo"
    names: dict[str, Original]  # of every weight: ours -> original
    stored_names: dict[str, str]  # of every weight: ours -> the one in the file
    tensors: dict[str, TensorRecord]  # by our names, with our shapes
    weights: str  # of the UNet: "model", or "ema", the average over the training
    other_weights: str | None  # the other kind, if the file has it complete
    unknown: tuple[str, ...]  # names of unused tensors that are not the usual extras
    said: Statement  # what it was trained to predict, at which noise levels, and how that is known
    few_steps: "Told | None" = None  # what it is, if it is a model for few steps
    notes: tuple[str, ...] = ()  # what else the user should know, one sentence each
    global_step: int | None  # of the training
    extras: dict[str, TensorRecord] = field(default_factory=dict)  # tensors beside the model, by original names


def read_checkpoint(
    file: CheckpointFile, *, weights: str = "auto", prediction: str = "auto", vae: Checkpoint | None = None
) -> Checkpoint:
    """Find the model in a file. Needs no torch; shapes are checked by `match_shapes`.

    weights     "model", "ema", or "auto": the model's own unless the file has only averaged ones, or is for editing
    prediction  "eps", "v", "x0", or "auto": what the file, a .yaml beside it or its family says
    vae         a VAE to use instead of the model's own, if any: see `convert.other_vae`

    Raises UnsupportedFileError for another kind of file, WeightMismatchError for missing or surplus weights.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    check_prediction(prediction)
    if file.metadata.get("format") == FORMAT:
        return read_ours(file, weights, vae=vae, prediction=prediction)
    return _read_foreign(file, weights, vae, prediction)


def few_steps(file: CheckpointFile, config: ModelConfig) -> "Told | None":
    """What the model in a file is, if it is one for few steps, and what says so."""
    texts = (file.called, *file.metadata.values())
    if not (config.unet.guidance_width or any(map(FOR_FEW_STEPS.search, texts))):
        return None
    from convert.families.few_step_names import model_advice

    return model_advice(file.called, file.metadata, config)


def check_prediction(prediction: str) -> None:
    if prediction not in ("auto", *PREDICTIONS):
        raise ValueError(f"prediction must be one of auto, {', '.join(PREDICTIONS)}, got {prediction!r}")


def _read_foreign(file: CheckpointFile, weights: str, vae: Checkpoint | None, prediction: str) -> Checkpoint:
    """A model in the original layout or in diffusers'; the names of the second become the first's."""
    if file.component:
        from convert.files.diffusers_folder import INDEX, OF_ONE, foreign_component

        if file.component not in ALONE:
            raise UnsupportedFileError(foreign_component(file.configs[file.component]))
        raise UnsupportedFileError(
            f"is the folder of one component ({OF_ONE[file.component]}), not of a whole model. Give the folder above "
            f"it, which has a {INDEX}; of this one, sd convert --only takes {file.component}"
        )
    if lacking := {part: why for part, why in file.absent.items() if not (vae and part == "vae")}:
        _, *others = lacking
        there = [part for part in PARTS if part not in file.absent]
        more = f" It has no {joined(others, 'and no')} either." if others else ""
        more += f" Of what there is, sd convert --only takes {joined(there, 'or')}." if there else ""
        more += " With --vae FILE, the VAE may come from elsewhere." if [*lacking] == ["vae"] else ""
        raise UnsupportedFileError(f"{next(iter(lacking.values())).rstrip('.')}.{more}")
    found = find_tensors(file)
    if vae:
        found = _with_vae(found, vae)
    tensors = found.tensors
    shapes = {name: record.shape for name, record in tensors.items()}
    averaged, left = _averaged(tensors)
    has_model = any(name.startswith(PREFIXES["unet"]) for name in tensors)
    may_choose = weights == "auto" and has_model
    if weights == "auto":
        weights = "ema" if averaged and not has_model else "model"
    if weights == "ema":
        if left:
            raise WeightMismatchError(
                f"holds {counted(len(left), 'EMA weight')} of which its UNet has no plain ones: {shown_list(left)}."
            )
        if not averaged:
            raise WeightMismatchError("has no EMA weights. Leave out --weights, or use --weights model.")
        shapes |= {name: record.shape for name, record in averaged.items()}
    family = None
    if file.configs:
        from convert.families.diffusers_config import stated_family, with_settings

        family = stated_family(file.configs, shapes)
    elif found.is_open_clip and (row := with_open_clip(shapes)):
        family = row.name
    config = recognise(shapes, family)
    if file.configs:
        settings = dict(file.configs)
        if vae:  # of the settings of the VAE that is replaced, only the latent scale counts
            settings["vae"] = {n: value for n, value in settings.get("vae", {}).items() if n == "scaling_factor"}
        config = with_settings(config, settings)
    size = found.beside.get("native_size")
    if is_native_size(size):
        config = replace(config, native_size=size)
    if is_guidance_scale(found.beside.get("guidance_scale")):
        config = replace(config, guidance_scale=found.beside["guidance_scale"])
    said = foreign_statement(file, averaged | tensors, config, found.beside.get("global_step"), prediction)
    config = said.applied_to(config)
    if not (is_native_size(size) or "sample_size" in file.configs.get("unet", {})):
        sizes = family_named(config.family).native_sizes
        config = replace(config, native_size=sizes.get(config.prediction, config.native_size))
    names = original_names(config)
    if may_choose and family_named(config.family).averaged and not left:  # if they are complete
        unet = (original.name for ours, original in names.items() if ours.startswith("unet."))
        weights = "ema" if averaged.keys() >= {*unet} else "model"
    available = tensors
    if weights == "ema":  # never some of one kind and some of the other
        available = {name: record for name, record in tensors.items() if not name.startswith(PREFIXES["unet"])}
        available |= averaged
    missing = [original.name for original in names.values() if original.name not in available]
    in_unet = weights == "ema" and missing and missing[0].startswith(PREFIXES["unet"])
    check_complete([ema_name(name) for name in missing] if in_unet else missing, len(names))
    others = _others(tensors, {original.name for original in names.values()}, found, config)
    other, there = ("model", tensors) if weights == "ema" else ("ema", {} if left else averaged)
    complete = all(original.name in there for ours, original in names.items() if ours.startswith("unet."))
    stored, used = found.stored_names, {original.name for original in names.values()}
    if weights == "ema":
        stored = stored | {name: found.stored_names[ema_name(name)] for name in averaged}
        used = {ema_name(name) if name in averaged else name for name in used}
    return Checkpoint(
        config=config,
        layout=found.layout,
        names=names,
        stored_names={ours: stored[original.name] for ours, original in names.items()},
        tensors={ours: available[original.name] for ours, original in names.items()},
        weights=weights,
        other_weights=other if complete else None,
        unknown=others,
        said=said,
        few_steps=few_steps(file, config),
        notes=(*file.notes, *found.notes, *said.notes),
        global_step=found.beside.get("global_step"),
        extras={name: record for name, record in tensors.items() if name not in used},
    )


def foreign_statement(
    file: CheckpointFile, tensors: Mapping[str, TensorRecord], config: ModelConfig, step: int | None, asked: str
) -> Statement:
    """What a foreign file, or the scheduler of a folder, states of its prediction and noise levels."""
    scheduler, told = file.configs.get("scheduler"), few_steps(file, config)
    return statement(
        file,
        tensors,
        config.schedule,
        usual=family_named(config.family).prediction,
        step=step,
        asked=asked,
        own=scheduler and Evidence(config.prediction, SCHEDULER),
        named=told and told.kind.predicts and Evidence(told.kind.predicts, told.why, outside=told.why == "its name"),
        ends_in_noise=bool(scheduler and scheduler.get("rescale_betas_zero_snr") is True),
    )


def _with_vae(found: Found, vae: Checkpoint) -> Found:
    """The same tensors with another VAE; leftovers from the training of the old one go with it."""
    originals = {original.name: ours for ours, original in vae.names.items()}
    kept = {name: record for name, record in found.tensors.items() if not name.startswith(PREFIXES["vae"])}
    return replace(
        found,
        tensors=kept | {name: vae.tensors[ours] for name, ours in originals.items()},
        stored_names=found.stored_names | {name: vae.stored_names[ours] for name, ours in originals.items()},
    )


def _others(
    tensors: Mapping[str, TensorRecord], expected: set[str], found: Found, config: ModelConfig
) -> tuple[str, ...]:
    """The stored names of tensors that are neither weights of the model nor the usual extras.

    Raises WeightMismatchError if one of them belongs to a network.
    """
    usual = {*SCHEDULE_BUFFERS, *MARKERS, POSITION_IDS, f"{SECOND_TEXT[1]}embeddings.position_ids"}
    usual |= {f"{place.original}{name}" for place in text_places(config).values() for name in BESIDE_TEXT}
    if config.depth:
        from convert.layouts.depth_layout import unused_parameters

        usual |= {DEPTH_NETWORK[1] + parameter.original for parameter in unused_parameters(config.depth)}
    leftovers = LEFTOVERS + NEVER_RUN
    others = [name for name in tensors if name not in expected and name not in usual and not name.startswith(leftovers)]
    inside = (
        *PREFIXES.values(),
        OPEN_CLIP,
        *OPTIONAL.values(),
        *(place.original for place in text_places(config).values()),
        *(("unet.", "vae.") if found.layout == "diffusers" else ()),
    )
    surplus = [found.stored_names[name] for name in others if name.startswith(inside)]
    if scales := [name for name in surplus if name.endswith(SCALES)]:
        raise WeightMismatchError(
            f"holds float8 weights with scales, which is not supported: {shown_list(scales)}. "
            "Use the float16 copy of the model."
        )
    if adapters := [name for name in surplus if ADAPTER.search(name)]:
        raise adapters_inside(adapters)
    if surplus:
        raise WeightMismatchError(
            f"holds {counted(len(surplus), 'weight')} that an {config.family} model has no place for: "
            f"{shown_list(surplus)}. It is another architecture; leaving them out would change the pictures."
        )
    return tuple(found.stored_names[name] for name in others)


def read_ours(
    file: CheckpointFile,
    weights: str,
    *,
    prediction: str = "auto",
    vae: Checkpoint | None = None,
    part: str | None = None,
) -> Checkpoint:
    """The model in a file of our layout, or the part that it holds alone.

    Raises UnsupportedFileError for an unknown version, WeightMismatchError for metadata that contradict the tensors.
    """
    version = file.metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise UnsupportedFileError(
            f"is in version {shown(str(version))} of the {FORMAT} format; this program reads {FORMAT_VERSION}. "
            "Use a newer program, or convert the original file again."
        )
    stored = file.metadata.get("weights", "model")
    if stored not in ("model", "ema"):
        raise WeightMismatchError(f"says that its weights are '{shown(stored)}'; they must be model or ema.")
    alone = file.metadata.get("part") or None
    if alone != part:
        what = f"holds a {ALONE.get(alone or '', shown(str(alone), 40))} alone"
        raise WeightMismatchError(f"{what} and no {ALONE[part]}." if part else f"{what}. Use a complete checkpoint.")
    config = stated_config(file.metadata.get("config", ""), file.root, part)
    if weights not in ("auto", stored):
        raise WeightMismatchError(
            f"holds the {stored} weights, not the {weights} ones. Leave out --weights, or use the original file."
        )
    said = statement(
        file,
        {},
        config.schedule,
        usual=config.prediction,
        asked=prediction,
        own=Evidence(config.prediction, "the config in its metadata"),
        ends_in_noise=EXTRA + ENDS_IN_NOISE in file.root,
    )
    config = said.applied_to(config)
    names = original_names(config, part)
    if surplus := [name for name in file.root if name not in names and not name.startswith(EXTRA)]:
        raise WeightMismatchError(
            f"holds {counted(len(surplus), 'weight')} that its own config has no place for: {shown_list(surplus)}."
        )
    tensors = {ours: file.root[ours] for ours in names}
    extras = {name.removeprefix(EXTRA): file.root[name] for name in file.root if name.startswith(EXTRA) and not part}
    if vae:
        config = replace(
            config, vae=replace(vae.config.vae, **{name: getattr(config.vae, name) for name in OF_LATENTS})
        )
        names = original_names(config)
        tensors = {ours: (vae.tensors if ours in vae.tensors else tensors)[ours] for ours in names}
        extras = {name: record for name, record in extras.items() if not name.startswith(PREFIXES["vae"])}
    step = file.metadata.get("global_step", "")
    return Checkpoint(
        config=config,
        part=part,
        layout=FORMAT,
        names=names,
        stored_names={ours: vae.stored_names[ours] if vae and ours in vae.tensors else ours for ours in names},
        tensors=tensors,
        weights=stored,
        other_weights=None,
        unknown=(),
        said=said,
        few_steps=few_steps(file, config),
        notes=said.notes,
        global_step=int(step) if WHOLE.fullmatch(step) else None,
        extras=extras,
    )


def match_shapes(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """The same checkpoint with every tensor in the shape of its parameter of ours.

    Only axes of length 1 at the end may differ: the original stores some linear layers as 1x1 convolutions.

    Raises WeightMismatchError for another shape, and for numbers that are not floats.
    """
    model = f"a {ALONE[checkpoint.part]}" if checkpoint.part else f"an {checkpoint.config.family} model"
    return replace(checkpoint, tensors=fitted(checkpoint.tensors, checkpoint.stored_names, expected, model))


def fitted(
    tensors: Mapping[str, TensorRecord],
    stored_names: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
    model: str,
) -> dict[str, TensorRecord]:
    """`match_shapes` for tensors by our names; `model` is what they are to be, in errors."""
    fitting, wrong = {}, []
    for ours, record in tensors.items():
        shape, name = expected[ours], stored_names[ours]
        if record.dtype not in FLOATS:
            wrong.append(f"{name} holds {record.dtype} numbers, floats are expected")
        elif trimmed(record.shape) != trimmed(shape):
            wrong.append(f"{name} has the shape {list(record.shape)}, expected {list(shape)}")
        else:
            axes = len(shape) - len(record.shape)
            stride = record.stride[: len(shape)] + (1,) * axes
            fitting[ours] = replace(record, shape=shape, stride=stride)
    if wrong:
        verb = "does" if len(wrong) == 1 else "do"
        raise WeightMismatchError(
            f"holds {counted(len(wrong), 'weight')} that {verb} not fit {model} of its size: "
            f"{'; '.join(shown(text) for text in wrong[:3])}."
        )
    return fitting


def _averaged(tensors: Mapping[str, TensorRecord]) -> tuple[dict[str, TensorRecord], list[str]]:
    """The averaged (EMA) weights of the UNet under the names of the plain ones, and the averages left over."""
    shadows = {name for name in tensors if name.startswith("model_ema.")} - {"model_ema.decay", "model_ema.num_updates"}
    plain = [name for name in tensors if name.startswith(PREFIXES["unet"])] or _possible_unet_names()
    found = {name: tensors[ema_name(name)] for name in plain if ema_name(name) in shadows}
    return found, sorted(shadows - {ema_name(name) for name in found})


def _possible_unet_names() -> list[str]:
    """Every name that a UNet may have, at any width."""
    # Growing at every level, it has a shortcut wherever some width has one.
    widest = [replace(u, multipliers=(1, 2, 4, 8)[: len(u.multipliers)], guidance_width=1) for u in UNETS]
    names = (original_names(replace(SD_V1, unet=unet), "unet").values() for unet in widest)
    return list(dict.fromkeys(original.name for found in names for original in found))
