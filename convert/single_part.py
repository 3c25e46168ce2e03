"""Read one network, from a file of its own or from a whole checkpoint."""

from collections.abc import Mapping
from dataclasses import replace

from convert.checkpoint import (
    FORMAT,
    LEFTOVERS,
    POSITION_IDS,
    Checkpoint,
    few_steps,
    foreign_statement,
    read_checkpoint,
    read_ours,
)
from convert.errors import UnsupportedFileError, WeightMismatchError, counted, shown_list
from convert.families.diffusers_config import with_settings
from convert.families.family import ALONE, TEXTS, check_complete, part_config
from convert.families.recognition import recognise_names
from convert.families.table import TEXT_WIDTHS, V2, XL, with_open_clip
from convert.files.reader import CheckpointFile
from convert.layouts.names import OPTIONAL, PREFIXES, SECOND_TEXT, TEXT_PREFIX, original_names
from convert.layouts.noise_schedule import FAMILY, Statement
from convert.layouts.original_layout import TEXT_PARTS, TEXT_ROOT, Found, find_tensors
from sd.config import SD_V1, SDXL

# The prefix that a part saved alone drops, so that other tools read it: publishers save a VAE without prefix, a text
# encoder has the names of the transformers library, and a UNet is found by its prefix only.
DROPPED = {"unet": "", "vae": PREFIXES["vae"], "text_encoder": TEXT_ROOT}
DROPPED |= {SECOND_TEXT[0]: SECOND_TEXT[1].removesuffix(TEXT_PREFIX)}
PROJECTION = "text_projection.weight"  # beside the transformer, not in it


def name_alone(part: str, name: str) -> str:
    """The name in a file of one network alone, from the original one."""
    name = name.removeprefix(DROPPED[part])
    return PROJECTION if name == TEXT_PREFIX + PROJECTION else name


def read_part(file: CheckpointFile, part: str, *, weights: str = "auto", prediction: str = "auto") -> Checkpoint:
    """Find one network in a file. Its shapes are still to be checked by `convert.checkpoint.match_shapes`.

    part     "unet", "vae", "text_encoder" or "text_encoder_2"
    weights  as in `read_checkpoint`; "ema" only in a complete checkpoint
    prediction  as in `read_checkpoint`

    Raises UnsupportedFileError for another kind of model, WeightMismatchError if it is missing or incomplete.
    """
    if file.metadata.get("format") == FORMAT:
        if "part" not in file.metadata:
            return only(read_checkpoint(file, weights=weights, prediction=prediction), part)
        return read_ours(file, weights, part=part, prediction=prediction)
    if part in file.absent:
        raise UnsupportedFileError(file.absent[part])
    found = find_tensors(file)
    if all(any(name.startswith(prefix) for name in found.tensors) for prefix in PREFIXES.values()):
        return only(read_checkpoint(file, weights=weights, prediction=prediction), part)
    if weights == "ema":
        raise WeightMismatchError("is not a complete checkpoint, so it has no EMA weights. Leave out --weights.")
    return _part_alone(file, found, part, prediction)


def only(checkpoint: Checkpoint, part: str) -> Checkpoint:
    """One network of a complete model. Raises WeightMismatchError if the model has no such network."""

    def mine(table: Mapping) -> dict:
        return {ours: value for ours, value in table.items() if ours.startswith(f"{part}.")}

    if not mine(checkpoint.tensors):
        raise WeightMismatchError(f"is an {checkpoint.config.family} model, which has no {ALONE[part]}.")
    return replace(
        checkpoint,
        part=part,
        names=mine(checkpoint.names),
        stored_names=mine(checkpoint.stored_names),
        tensors=mine(checkpoint.tensors),
        other_weights=checkpoint.other_weights if part == "unet" else None,
        unknown=(),
        extras={},
    )


def _part_alone(file: CheckpointFile, found: Found, part: str, prediction: str) -> Checkpoint:
    """From a foreign file without a complete model."""
    if part in TEXTS:
        found = _with_text_root(found)
    shapes = {name: record.shape for name, record in found.tensors.items()}
    kind = recognise_names(shapes)
    if part == SECOND_TEXT[0]:
        found = _as_second(found)
    prefix = (PREFIXES | OPTIONAL)[part]
    mine = {name: record for name, record in found.tensors.items() if name.startswith(prefix)}
    if not mine:
        what = f"it {kind.refusal}" if kind.refusal else "none of its tensors is part of one."
        whose = "XL" if part == SECOND_TEXT[0] else "1 or 2"
        raise WeightMismatchError(f"has no {ALONE[part]} of Stable Diffusion {whose}: {what}")
    if kind.refusal and (part != "vae" or kind.family.latents):  # those of Stable Diffusion 1, 2 and XL look alike
        raise UnsupportedFileError(kind.refusal)
    width = mine[f"{prefix}embeddings.token_embedding.weight"].shape[-1] if part in TEXTS else None
    if part in TEXTS and (row := TEXT_WIDTHS.get(width)) and (row is XL) != (part == SECOND_TEXT[0]):
        which = f"the second one of Stable Diffusion XL. Give --only {SECOND_TEXT[0]}"
        which = which if row is XL else f"that of {row.title}. Give --only text_encoder"
        raise UnsupportedFileError(f"holds a text encoder whose vectors are {width} wide, {which}")
    base = (kind.family and kind.family.config) or SD_V1
    if part == SECOND_TEXT[0]:
        base = SDXL
    elif found.is_open_clip:
        base = (with_open_clip(shapes) or V2).config
    config = part_config(part, {name.removeprefix(prefix): record.shape for name, record in mine.items()}, base)
    if file.configs:
        config = with_settings(config, {n: value for n, value in file.configs.items() if n in (part, "scheduler")})
    step = found.beside.get("global_step")
    said = Statement(prediction=config.prediction, why=FAMILY, schedule=config.schedule)
    if part == "unet":
        said = foreign_statement(file, found.tensors, config, step, prediction)
        config = said.applied_to(config)
    names = original_names(config, part)
    expected = {original.name for original in names.values()}
    check_complete([name for name in sorted(expected) if name not in mine], len(names))
    others = [name for name in mine if name not in expected and name != POSITION_IDS]
    surplus = [found.stored_names[name] for name in others if not name.startswith(LEFTOVERS)]
    if surplus:
        raise WeightMismatchError(
            f"holds {counted(len(surplus), 'weight')} that the {ALONE[part]} of an {config.family} model has no place "
            f"for: {shown_list(surplus)}. It is another architecture."
        )
    return Checkpoint(
        config=config,
        part=part,
        layout=found.layout,
        names=names,
        stored_names={ours: found.stored_names[original.name] for ours, original in names.items()},
        tensors={ours: mine[original.name] for ours, original in names.items()},
        weights="model",
        other_weights=None,
        unknown=(),
        said=said,
        few_steps=few_steps(file, config) if part == "unet" else None,
        notes=(*file.notes, *found.notes, *said.notes),
        global_step=step,
    )


def _with_text_root(found: Found) -> Found:
    """A text encoder saved alone, renamed as in a whole file, unless it has those names already."""
    if any(name.startswith(PREFIXES["text_encoder"]) for name in found.tensors):
        return found
    bare = "embeddings.token_embedding.weight" in found.tensors  # as transformers 5 writes it

    def whole(name: str) -> str:
        name = name.removeprefix("transformer.")
        if bare and name.startswith(TEXT_PARTS):
            return PREFIXES["text_encoder"] + name
        return TEXT_ROOT + name if name.startswith(TEXT_PREFIX) else name

    renamed = {name: whole(name) for name in found.tensors}
    return replace(
        found,
        tensors={renamed[name]: record for name, record in found.tensors.items()},
        stored_names={renamed[name]: stored for name, stored in found.stored_names.items()},
    )


def _as_second(found: Found) -> Found:
    """The same with the only text encoder in the place of the second one, and with its projection."""
    if any(name.startswith(SECOND_TEXT[1]) for name in found.tensors):
        return found

    def second(name: str) -> str:
        name = PREFIXES["text_encoder"] + name if name == PROJECTION else name
        return name.replace(PREFIXES["text_encoder"], SECOND_TEXT[1], 1)

    return replace(
        found,
        tensors={second(name): record for name, record in found.tensors.items()},
        stored_names={second(name): stored for name, stored in found.stored_names.items()},
    )
