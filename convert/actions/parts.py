"""Which tensors of a file belong together: the networks, and what lies beside them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from convert.actions.tensor_set import unwrapped
from convert.checkpoint import EXTRA, SCHEDULE_BUFFERS
from convert.families.evidence import Kind
from convert.families.family import PARTS
from convert.files.records import Inert, StorageRecord, TensorRecord

COMPONENTS = (  # (what names start with, what that is); the first that fits counts
    ("model.diffusion_model.", "UNet"),
    ("cond_stage_model.", "text encoder"),
    ("conditioner.embedders.0.", "text encoder 1"),
    ("conditioner.embedders.1.", "text encoder 2"),
    ("first_stage_model.", "VAE"),
    ("depth_model.", "depth model"),
    ("control_model.", "ControlNet"),
    ("unet.", "UNet"),
    ("vae.", "VAE"),
    ("text_encoder.", "text encoder"),
    ("lora_unet_", "adapter of the UNet"),
    ("lora_te", "adapter of the text encoder"),
)
EXTRAS = (  # what lies beside a model: (what names start with, what that is)
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
    tensors: Mapping[str, TensorRecord], kind: Kind, *, averaged: bool = False
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The networks, and what lies beside them: each in groups, the largest first.

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


def _place(name: str, kind: Kind) -> tuple[bool, str, str]:
    """Whether a tensor belongs to a network; what it belongs to; the prefix of its name."""
    if name.startswith(EXTRA):
        _, part, prefix = _place(name.removeprefix(EXTRA), kind)
        return False, f"{part}, kept" if part in ("UNet", "unknown") else part, EXTRA + prefix
    if name in SCHEDULE_BUFFERS:
        return False, "noise schedule", ""
    if name.endswith("position_ids"):
        return False, "position ids", ""
    for prefix, part in EXTRAS:
        if name.startswith(prefix):
            return False, part, prefix if prefix.endswith(".") else prefix.rpartition(".")[0] + "."
    for prefix, part in COMPONENTS:
        if name.startswith(prefix):
            return True, part, prefix
    for part in PARTS.values():  # a network alone, without a prefix
        if kind.name.startswith(f"{part} alone"):
            return True, part, ""
    if kind.name == "ControlNet":
        return True, "ControlNet", ""
    if kind.name.startswith(("LoRA", "LoHa", "LoKr", "textual inversion")):
        return True, "tensors", ""
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
    """What holds tensors beside the dictionary of weights: the state of an optimizer, scores of callbacks."""
    parts = []
    inner = unwrapped(root)
    seen = {id(inner)}
    while isinstance(root, dict) and root is not inner:
        for name, item in root.items():
            records = _records_in(item, seen) if isinstance(name, str) else []
            if records:
                parts.append(_part("beside the weights", name, records))
        root = root.get("state_dict")
    return parts


def _records_in(root: object, seen: set[int]) -> list[TensorRecord]:
    """Every tensor somewhere in it, each once. It may be cyclic, or hold the same thing a million times."""
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
