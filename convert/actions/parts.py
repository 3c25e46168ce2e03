"""Group the tensors of a file: the networks, and the tensors beside them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from convert.checkpoint import EXTRA, SCHEDULE_BUFFERS
from convert.errors import CheckpointError
from convert.families.additions import ADDITIONS
from convert.families.recognition import Recognised
from convert.families.table import MODELS
from convert.files.records import Inert, StorageRecord, TensorRecord
from convert.layouts.noise_schedule import MARKERS
from convert.layouts.original_layout import networks_in
from convert.layouts.wrapping import unwrap

PREFIXES = {  # what names start with -> what that is
    **{prefix: part for row in reversed((*MODELS, *ADDITIONS)) for part, prefix in row.parts.items() if prefix},
    **{"control_model.": "ControlNet", "unet.": "UNet", "vae.": "VAE", "text_encoder.": "text encoder"},
    "depth_network.": "depth network",
    "depth_estimator.": "depth network",
}
EXTRAS = (  # beside a model: (what names start with, what that is)
    ("model_ema.decay", "EMA counters"),
    ("model_ema.num_updates", "EMA counters"),
    ("model_ema.", "EMA average of the UNet"),
    ("first_stage_model.loss.", "loss of the VAE's training"),
    ("first_stage_model.model_ema.", "EMA average of the VAE"),
    ("loss.", "loss of the VAE's training"),
    ("denoiser.sigmas", "noise schedule"),
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tensors that belong together."""

    name: str  # "UNet"
    prefix: str  # of their names; "" where they have none in common
    tensors: int
    parameters: int  # numbers in them
    bytes: int
    dtypes: dict[str, int]  # tensors of each


def parts_of(
    tensors: Mapping[str, TensorRecord], kind: Recognised, *, averaged: bool = False
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The networks, and the tensors beside them: each in groups, the largest first.

    averaged  the UNet's averaged weights are its only ones, and belong to the networks
    """
    groups: dict[tuple[bool, str, str], list[TensorRecord]] = {}
    for name, record in tensors.items():
        needed, part, prefix = _place(name, kind)
        if averaged and part == "EMA average of the UNet":
            needed, part = True, "UNet (EMA average)"
        groups.setdefault((needed, part, prefix), []).append(record)
    parts = [(key[0], _part(key[1], key[2], records)) for key, records in groups.items()]
    parts.sort(key=lambda item: -item[1].bytes)
    return tuple(part for needed, part in parts if needed), tuple(part for needed, part in parts if not needed)


def _place(name: str, kind: Recognised) -> tuple[bool, str, str]:
    """Whether a tensor belongs to a network; what it belongs to; the prefix of its name."""
    if name.startswith(EXTRA):
        _, part, prefix = _place(name.removeprefix(EXTRA), kind)
        return False, f"{part}, kept" if part in ("UNet", "unknown") else part, EXTRA + prefix
    if name in MARKERS:
        return False, MARKERS[name], ""
    if name in SCHEDULE_BUFFERS:
        return False, "noise schedule", ""
    if name.endswith("position_ids"):
        return False, "position ids", ""
    for prefix, part in EXTRAS:
        if name.startswith(prefix):
            return False, part, prefix if prefix.endswith(".") else prefix.rpartition(".")[0] + "."
    for prefix, part in PREFIXES.items():
        if name.startswith(prefix):
            one = kind.family and part == "text encoder 1" and part not in kind.family.parts
            return True, "text encoder" if one else part, prefix
    if kind.family and "" in kind.family.parts.values():
        return True, next(part for part, prefix in kind.family.parts.items() if not prefix), ""
    if len(kind.parts) == 1:  # a network alone, without a prefix
        return True, kind.parts[0], ""
    return False, "unknown", name.partition(".")[0] + ("." if "." in name else "")


def _part(name: str, prefix: str, records: list[TensorRecord]) -> Part:
    return Part(
        name=name,
        prefix=prefix,
        tensors=len(records),
        parameters=sum(record.numel for record in records),
        bytes=sum(record.nbytes for record in records),
        dtypes=dict(sorted(Counter(record.dtype for record in records).items())),
    )


def parts_beside(root: object) -> list[Part]:
    """Entries with tensors beside the dictionary of weights: the state of an optimizer, scores of callbacks."""
    try:
        weights = unwrap(root, networks_in).dictionaries
    except CheckpointError:
        return []
    parts = []
    seen = {id(tensors) for tensors in weights}
    while isinstance(root, dict) and weights:
        for name, item in root.items():
            within = name == "state_dict" or (isinstance(item, TensorRecord) and id(root) in seen)
            records = _records_in(item, seen) if isinstance(name, str) and not within else []
            if records:
                parts.append(_part("beside the weights", name, records))
        root = root.get("state_dict") if id(root) not in seen else None
    return parts


def _records_in(root: object, seen: set[int]) -> list[TensorRecord]:
    """Every tensor inside, each once. The structure may be cyclic, or hold the same object a million times."""
    found, todo = [], [root]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        if isinstance(item, TensorRecord | StorageRecord | dict | list | tuple | Inert):
            seen.add(id(item))
        if isinstance(item, TensorRecord):
            found.append(item)
        elif isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list | tuple):
            todo.extend(item)
        elif isinstance(item, Inert):
            todo.extend((item.args, item.state, item.items))
    return found
