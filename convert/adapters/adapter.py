"""Read an adapter: a file that changes some modules of a model. LoRA and its relatives, from every program.

Names are looked up in `convert.layouts.adapter_names`; nothing in the file is executed. What matches no module is named
and counted, never passed over: an adapter that does less than its file says must not look like one that works.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from convert.adapters.other_families import described, other_family
from convert.adapters.parts import KINDS, NUMBERS, WHOLE, fits, kind_of, rank_of, result_shape, split
from convert.adapters.stated import Stated, stated_beside
from convert.checkpoint import FLOATS
from convert.errors import UnsupportedFileError, WeightMismatchError, counted, named, shown, shown_list
from convert.files.arrays import number_in
from convert.files.folder_kinds import read_json
from convert.files.reader import CheckpointFile, open_file
from convert.files.records import TensorRecord
from convert.layouts.adapter_names import (
    FAMILIES,
    AdaptedFamily,
    adapted_family,
    diffusers_names,
    module_names,
    modules,
)
from convert.layouts.wrapping import unwrap
from sd.config import ModelConfig

CONFIG = "adapter_config.json"  # what PEFT writes beside its weights
IN_FOLDERS = tuple(
    f"{stem}.{ending}"
    for stem in ("adapter_model", "pytorch_lora_weights", "pytorch_custom_diffusion_weights")
    for ending in ("safetensors", "bin")
)
WORDS = "bundle_emb."  # embeddings that an adapter brings along
FIRST_CONV = "unet.input_blocks.0.conv"  # takes more channels in models for inpainting, editing and depth
LATENTS = 4


@dataclass(frozen=True, kw_only=True)
class Change:
    """What an adapter does to one module. The parts of each kind are in `convert.adapters.parts`."""

    target: str  # the module: "unet.input_blocks.1.attention.proj_in"
    stored: str  # its name in the file
    kind: str  # a key of KINDS
    tensors: Mapping[str, TensorRecord]  # by part: "down", "up", ...
    rank: int | None  # of kinds that have one
    alpha: float | None  # as the file or its settings say
    scale: float  # of the product: alpha / rank, unless the file says otherwise
    on_input: bool = False  # of (IA)³: the inputs are multiplied, not the outputs
    constraint: float | None = None  # of OFT: the largest norm of a rotation's generator

    @property
    def is_linear(self) -> bool:
        """Whether half the strength is half the change."""
        return self.kind not in ("oft", "boft") and not {"dora_scale", "magnitude"} & self.tensors.keys()


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The changes in a file, for one family of models; not yet read."""

    name: str  # of the file, without its suffix
    family: str
    title: str  # of the family
    changes: tuple[Change, ...]
    tensors: int  # in the file
    unknown: tuple[str, ...]  # tensors that belong to no module of the family
    incomplete: tuple[str, ...]  # modules that lack a part, with what they have
    words: Mapping[str, Mapping[str, TensorRecord]]  # bundled embeddings: name -> part -> vectors
    metadata: Mapping[str, str]
    notes: tuple[str, ...]  # what else the user should know, one sentence each whose subject is the file
    stored_names: Mapping[tuple[str, str], str] = field(repr=False)  # (target, part) -> name in the file

    @property
    def kinds(self) -> dict[str, int]:
        """How many modules each kind changes."""
        return dict(Counter(change.kind for change in self.changes).most_common())

    @property
    def problems(self) -> tuple[str, ...]:
        """What of the file is not applied, one sentence each whose subject is the file."""
        found = []
        if self.unknown:
            found.append(
                f"holds {counted(len(self.unknown), 'tensor')} of {self.tensors} that match no module of "
                f"{self.title}: {shown_list(self.unknown)}."
            )
        if self.incomplete:
            found.append(
                f"lacks tensors of {counted(len(self.incomplete), 'module')}, not changed: "
                f"{shown_list(self.incomplete)}."
            )
        return tuple(found)


def open_adapter(path: str | os.PathLike) -> CheckpointFile:
    """Open and check an adapter: a file, or a folder that PEFT or diffusers wrote.

    Raises UnsafeFileError, CorruptFileError, UnsupportedFileError (all CheckpointError).
    """
    path = Path(path)
    called, weights = path.name or str(path), path
    if path.is_dir():
        called = path.resolve().name
        weights = next((path / name for name in IN_FOLDERS if (path / name).is_file()), None)
        if weights is None:
            fault = UnsupportedFileError(f"holds no adapter: none of {', '.join(IN_FOLDERS[:4])}. Give the file itself")
            raise named(fault, called)
    file = open_file(weights, called)
    settings = weights.with_name(CONFIG)
    if weights.name.startswith("adapter_model.") and settings.exists():
        try:
            file.configs["adapter"] = read_json(settings, CONFIG)
        except BaseException:
            file.close()
            raise
    return file


def read_adapter(file: CheckpointFile, config: ModelConfig | None = None) -> Adapter:
    """Find the changes in an open file. Needs no torch.

    config  of the model that it is for; None: the family is found from names and shapes

    Raises UnsupportedFileError for other kinds of files and adapters of other families, WeightMismatchError for tensors
    that cannot be an adapter's.
    """
    tensors = unwrap(file.root, lambda names: frozenset()).tensors
    if config is not None:
        return _read(file, tensors, adapted_family(config))
    best = _best_family(tensors)
    if best is None:
        raise described(tensors, file.metadata)
    return _read(file, tensors, best)


@dataclass
class _Module:
    """The tensors of a file that belong to one module."""

    name: str  # in the file
    parts: dict[str, TensorRecord] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)  # of each part
    names: dict[str, str] = field(default_factory=dict)  # of each part, in the file


def _sorted_in(tensors: Mapping[str, TensorRecord], family: AdaptedFamily) -> tuple[dict[str, _Module], list[str]]:
    """The tensors by our names of their modules, and the names of those that belong to none."""
    names = module_names(family)
    found: dict[str, _Module] = {}
    unknown = []
    for name, record in tensors.items():
        place = split(name, names)
        if place is None:
            unknown.append(name)
            continue
        module, kind, part = place
        mine = found.setdefault(names[module], _Module(module))
        if mine.name != module or part in mine.parts:
            other = mine.names.get(part) or next(iter(mine.names.values()))
            raise WeightMismatchError(
                f"holds one module twice, as {shown(other)} and as {shown(name)}. It is unclear which one counts."
            )
        mine.parts[part], mine.kinds[part], mine.names[part] = record, kind, name
    return found, unknown


def _read(file: CheckpointFile, tensors: Mapping[str, TensorRecord], family: AdaptedFamily) -> Adapter:
    words, adapting = _bundled(tensors)
    found, unknown = _sorted_in(adapting, family)
    stated = stated_beside(file)
    weights, theirs = modules(family), diffusers_names(family)
    changes, incomplete, misfits, names, zero = [], [], [], {}, Counter()
    for target, module in found.items():
        lacks = _lacking(module)
        if lacks == "nothing of an adapter":  # the plain weight of a network
            unknown += module.names.values()
            continue
        if lacks:
            incomplete.append(f"{module.name} ({lacks})")
            continue
        change, misfit = _change(file, target, module, weights[target], stated.of(theirs[target]))
        if misfit:
            misfits.append(misfit)
            continue
        zero["rank"] += change.rank == 0
        zero["alpha"] += change.alpha == 0
        if change.rank != 0:
            changes.append(change)
            names |= {(target, part): name for part, name in module.names.items()}
    if misfits or not (changes or words or any(zero.values())):
        raise other_family(tensors, file.metadata, family, misfits, incomplete, _best_family(tensors))
    notes = []
    if zero["rank"]:
        notes.append(f"has the rank 0 in {counted(zero['rank'], 'module')}, which changes nothing.")
    if zero["alpha"]:
        notes.append(
            f"has the alpha 0 in {counted(zero['alpha'], 'module')}, read as alpha = rank, as by the programs that "
            "write it; some programs read it as strength 0."
        )
    return Adapter(
        name=file.path.stem if file.path.stem not in ("adapter_model", "pytorch_lora_weights") else file.called,
        family=family.name,
        title=family.title,
        changes=tuple(changes),
        tensors=len(tensors),
        unknown=tuple(unknown),
        incomplete=tuple(incomplete),
        words=words,
        metadata=dict(file.metadata),
        notes=(*notes, *stated.notes),
        stored_names=names,
    )


def _bundled(tensors: Mapping[str, TensorRecord]) -> tuple[dict[str, dict[str, TensorRecord]], dict[str, TensorRecord]]:
    """The embeddings that an adapter brings along, by name and part, and the other tensors."""
    words: dict[str, dict[str, TensorRecord]] = {}
    others = {}
    for name, record in tensors.items():
        word, _, part = name.removeprefix(WORDS).removesuffix(".*").rpartition(".")
        if name.startswith(WORDS) and word:
            words.setdefault(word, {})[part] = record
        else:
            others[name] = record
    return words, others


def _lacking(module: _Module) -> str:
    """Which parts a module has, if others are missing; "" if it is complete."""
    shapes = {part: (module.kinds[part], record.shape) for part, record in module.parts.items()}
    kind = kind_of(shapes)
    if any(module.parts.keys() >= needed for needed in WHOLE.get(kind, ())):
        return ""
    if module.parts.keys() == {"weight"} and kind == "ia3":
        return "nothing of an adapter"
    has = sorted(module.parts.keys())
    return f"only {', '.join(has)}" if kind else f"parts of several kinds: {', '.join(has)}"


def _change(
    file: CheckpointFile, target: str, module: _Module, weight: tuple[int, ...], stated: Stated
) -> tuple[Change | None, str]:
    """What a complete module's tensors do; or why they cannot be for that module, if their shapes do not fit."""
    shapes = {part: record.shape for part, record in module.parts.items()}
    kind = kind_of({part: (module.kinds[part], shape) for part, shape in shapes.items()})
    numbers = {part: _number(file, module, part) for part in NUMBERS if part in module.parts}
    parts = {part: record for part, record in module.parts.items() if part not in NUMBERS}
    for part, record in parts.items():
        if record.dtype not in FLOATS:
            raise WeightMismatchError(
                f"holds {shown(module.names[part])} as {record.dtype}; an adapter's tensors are floating-point numbers."
            )
    result = result_shape(kind, shapes, weight)
    narrow = target == FIRST_CONV and result and result[1:2] == (LATENTS,) and fits((result[0], *weight[1:]), weight)
    if not (fits(result, weight) or narrow) or not _fits_beside(shapes, weight):
        listed = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items() if part not in NUMBERS)
        return None, f"{shown(module.name, 100)} ({listed}) for a weight of {list(weight)}"
    rank, alpha = rank_of(kind, shapes), numbers.get("alpha", stated.alpha)
    scale = numbers.get("scale")
    if scale is None:
        scale = 1.0
        if rank and alpha:
            scale = alpha / (math.sqrt(rank) if stated.rank_stabilized else rank)
    generator = alpha * weight[0] if kind in ("oft", "boft") and alpha and alpha > 0 else None
    on_input = bool(numbers.get("on_input"))
    if "factor" in shapes:  # PEFT's shape says it
        on_input = len(shapes["factor"]) > 1 and shapes["factor"][0] == 1 and weight[0] != 1
    return Change(
        target=target,
        stored=module.name,
        kind=kind,
        tensors=parts,
        rank=rank,
        alpha=alpha,
        scale=scale,
        on_input=on_input,
        constraint=generator,
    ), ""


def _fits_beside(shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]) -> bool:
    """Whether the parts that go with every kind have the length of an axis of the weight."""
    either = (weight[0], *weight[1:2])
    lengths = {
        part: math.prod(shapes[part]) for part in ("bias", "dora_scale", "magnitude", "rescale") if part in shapes
    }
    return all(length in (either if part == "dora_scale" else weight[:1]) for part, length in lengths.items())


def _number(file: CheckpointFile, module: _Module, part: str) -> float:
    value = number_in(file, module.parts[part])
    if value is None or not math.isfinite(value):
        raise WeightMismatchError(f"holds {shown(module.names[part])}, which is not one finite number.")
    return value


def _best_family(tensors: Mapping[str, TensorRecord]) -> AdaptedFamily | None:
    """The family that most modules of an adapter fit by name and shape, or by name alone; None if there is none."""
    by_fit: list[tuple[int, int, int]] = []
    _, adapting = _bundled(tensors)
    for index, family in enumerate(FAMILIES):
        try:
            found, _ = _sorted_in(adapting, family)
        except WeightMismatchError:
            continue
        weights = modules(family)
        there = {target: module for target, module in found.items() if not _lacking(module)}
        fitting = sum(_has_shape(module, weights[target]) for target, module in there.items())
        if there:
            by_fit.append((fitting, len(there), -index))
    return FAMILIES[-max(by_fit)[2]] if by_fit else None


def _has_shape(module: _Module, weight: tuple[int, ...]) -> bool:
    shapes = {part: record.shape for part, record in module.parts.items()}
    kind = kind_of({part: (module.kinds[part], shape) for part, shape in shapes.items()})
    return fits(result_shape(kind, shapes, weight), weight)


def summary(changes: Iterable[Change]) -> str:
    """The kinds, in words: "LoRA", "LoRA and full difference"."""
    return " and ".join(KINDS[kind] for kind in dict.fromkeys(change.kind for change in changes)) or "nothing"
