"""Read an adapter: a file that changes some modules of a model. LoRA and its relatives, from every program.

Names are looked up in `convert.layouts.adapter_names`; nothing in the file is executed. What matches no module is named
and counted, never passed over: an adapter that does less than its file says must not look like one that works.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from convert.adapters.grouping import Module, best_family, bundled, sorted_in
from convert.adapters.other_families import described, other_family
from convert.adapters.parts import KINDS, NUMBERS, fits, fits_beside, rank_of
from convert.adapters.spellings import split
from convert.adapters.stated import LARGEST, Stated, stated_beside
from convert.checkpoint import FLOATS
from convert.errors import UnsupportedFileError, WeightMismatchError, counted, named, shown, shown_list
from convert.files.folder_kinds import read_json
from convert.files.reader import CheckpointFile, JoinedFiles, open_file
from convert.files.records import TensorRecord
from convert.layouts.adapter_names import (
    AdaptedFamily,
    adapted_family,
    diffusers_names,
    module_names,
    modules,
    with_unused_layer,
)
from convert.layouts.names import FIRST_CONV
from convert.layouts.wrapping import all_tensors, unwrap
from sd.config import ModelConfig

NETWORKS = ("unet", "text_encoder", "text_encoder_2")  # folders of their adapters
CONFIG = "adapter_config.json"  # what PEFT writes beside its weights
IN_FOLDERS = tuple(
    f"{stem}.{ending}"
    for stem in ("adapter_model", "pytorch_lora_weights", "pytorch_custom_diffusion_weights")
    for ending in ("safetensors", "bin")
)
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
    def is_plain(self) -> bool:
        """Whether all programs compute the same at every strength; of others, they agree at strength 1."""
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
    if folders := _of_networks(path):
        return _joined(path, folders)
    weights, *settings = files_of(path)
    file = open_file(weights, path.resolve().name if path.is_dir() else path.name or str(path))
    if settings:
        try:
            file.configs["adapter"] = read_json(settings[0], CONFIG)
        except BaseException:
            file.close()
            raise
    return file


def is_adapter_folder(path: Path) -> bool:
    return path.is_dir() and (any((path / name).is_file() for name in IN_FOLDERS) or bool(_of_networks(path)))


def weights_file(path: Path) -> Path:
    """The file of a path: itself, or the one in a folder; of a folder for each network, the first one's.

    Raises UnsupportedFileError for a folder without one.
    """
    if not path.is_dir():
        return path
    for folder in _of_networks(path) or [path]:
        for name in IN_FOLDERS:
            if (folder / name).is_file():
                return folder / name
    fault = UnsupportedFileError(f"holds no adapter: none of {', '.join(IN_FOLDERS[:4])}. Give the file itself")
    raise named(fault, path.resolve().name)


def files_of(path: Path) -> list[Path]:
    """All files that `open_adapter` reads: the weights, and the settings beside them if there are any.

    Raises UnsupportedFileError for a folder without weights.
    """
    if folders := _of_networks(path):
        return [file for folder in folders for file in files_of(folder)]
    weights = weights_file(path)
    settings = weights.with_name(CONFIG)
    return [weights, settings] if weights.name.startswith("adapter_model.") and settings.exists() else [weights]


def _of_networks(path: Path) -> list[Path]:
    """The folders inside a folder that hold the adapter of one network each, as PEFT's examples write them."""
    return [path / name for name in NETWORKS if (path / name / CONFIG).is_file() and not (path / CONFIG).exists()]


def _joined(path: Path, folders: list[Path]) -> CheckpointFile:
    """The adapters of several networks as one, with the network in front of every name and setting."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_adapter(folder)) for folder in folders]
        file, root, settings = files[0], {}, {}
        for index, (folder, part) in enumerate(zip(folders, files, strict=True)):
            file = JoinedFiles(file, part) if index else part
            for name, record in unwrap(part.root, lambda names: frozenset()).tensors.items():
                module = name.removeprefix("base_model.model.").removeprefix(f"{folder.name}.")
                root[f"{folder.name}.{module}"] = file.of_second(record) if index else record
            settings |= {f"{folder.name}.{key}": value for key, value in part.configs.get("adapter", {}).items()}
        file.called, file.root, file.configs = path.resolve().name, root, {"adapter": settings}
        stack.pop_all()
    return file


def read_adapter(file: CheckpointFile, config: ModelConfig | None = None) -> Adapter:
    """Find the changes in an open file. Needs no torch.

    config  of the model that it is for; None: the family is found from names and shapes

    Raises UnsupportedFileError for other kinds of files and adapters of other families, WeightMismatchError for tensors
    that cannot be an adapter's.
    """
    if not all_tensors(file.root):
        raise UnsupportedFileError("is not an adapter: it holds no tensors")
    tensors = unwrap(file.root, lambda names: frozenset()).tensors
    if config is not None:
        return _read(file, tensors, adapted_family(config))
    best, fitting = best_family(tensors)
    if best is None:
        raise described(tensors, file.metadata)
    return _read(file, tensors, best, any_width=not fitting)


def _read(
    file: CheckpointFile, tensors: Mapping[str, TensorRecord], family: AdaptedFamily, *, any_width: bool = False
) -> Adapter:
    """any_width: for models built like the family's, of widths that nobody knows."""
    words, adapting = bundled(tensors)
    found, unknown = sorted_in(adapting, family)
    stated = stated_beside(file)
    weights, theirs = modules(family), diffusers_names(family)
    changes, incomplete, misfits, names, zero = [], [], [], {}, Counter()
    for target, module in found.items():
        if module.is_weight:
            unknown += module.names.values()
            continue
        if module.lacks:
            incomplete.append(f"{module.name} ({module.lacks})")
            continue
        weight = module.result(weights[target]) if any_width else None
        change, misfit = _change(file, target, module, weight or weights[target], stated.of(theirs[target]))
        if misfit:
            misfits.append(misfit)
            continue
        zero["rank"] += change.rank == 0
        zero["alpha"] += change.alpha == 0
        if change.rank != 0:
            changes.append(change)
            names |= {(target, part): name for part, name in module.names.items()}
    if misfits or not (changes or words or any(zero.values())):
        raise other_family(tensors, file.metadata, family, misfits, incomplete, best_family(tensors)[0])
    notes = []
    if unused := _of_unused_layer(unknown, family):
        unknown = [name for name in unknown if name not in unused]
        notes.append(
            f"also changes the last layer of the text encoder, which {family.title} never runs: "
            f"{counted(len(unused), 'tensor')} not applied."
        )
    if any_width:
        notes.append(f"is for a model built like {family.title}, of other widths.")
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


def _change(
    file: CheckpointFile, target: str, module: Module, weight: tuple[int, ...], stated: Stated
) -> tuple[Change | None, str]:
    """What a complete module's tensors do; or why they cannot be for that module, if their shapes do not fit."""
    shapes, kind = module.shapes, module.kind
    numbers = {part: _number(file, module, part) for part in NUMBERS if part in module.parts}
    parts = {part: record for part, record in module.parts.items() if part not in NUMBERS}
    for part, record in parts.items():
        if record.dtype not in FLOATS:
            raise WeightMismatchError(
                f"holds {shown(module.names[part])} as {record.dtype}; an adapter's tensors are floating-point numbers."
            )
    result = module.result(weight)
    on_input = bool(numbers.get("on_input"))
    if "factor" in shapes:  # PEFT's shape says it, except a convolution's (1, n, 1, 1), of outputs if both sides are n
        factor = shapes["factor"]
        one = len(factor) > 1 and factor[0] == 1 != weight[0]
        on_input = math.prod(factor) != weight[0] if len(factor) > 2 else one
    changed = weight
    if target == FIRST_CONV and not fits(result, weight):
        changed = (weight[0], LATENTS, *weight[2:])
    rank = rank_of(kind, shapes) if result else None
    hollow = rank != 0 and any(0 in shape for shape in shapes.values())
    if hollow or not fits(result, changed) or not fits_beside(shapes, changed, kind, on_input):
        listed = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items() if part not in NUMBERS)
        return None, f"{shown(module.name, 100)} ({listed}) for a weight of {list(weight)}"
    alpha = numbers.get("alpha", stated.alpha)
    scale = numbers.get("scale")
    if scale is None:
        divisor = rank
        if kind == "lokr" and rank is None and "alpha" not in numbers:
            divisor = stated.rank  # PEFT divides by it even where both factors are whole; LyCORIS does not
        scale = 1.0
        if divisor and alpha:
            scale = alpha / (math.sqrt(divisor) if stated.rank_stabilized else divisor)
    generator = alpha * weight[0] if kind in ("oft", "boft") and alpha and alpha > 0 else None
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


def _of_unused_layer(names: Iterable[str], family: AdaptedFamily) -> set[str]:
    """Those of the tensors that change the layer which version 2 never runs."""
    known, longer = module_names(family), module_names(with_unused_layer(family))
    if len(known) == len(longer):
        return set()
    return {name for name in names if (place := split(name, longer)) and place[0] not in known}


def _number(file: CheckpointFile, module: Module, part: str) -> float:
    from convert.files.arrays import number_in  # numpy takes a tenth of a second to import

    value = number_in(file, module.parts[part])
    if value is None or not math.isfinite(value):
        raise WeightMismatchError(f"holds {shown(module.names[part])}, which is not one finite number.")
    if abs(value) > LARGEST:
        raise WeightMismatchError(f"holds {value:g} as {shown(module.names[part])}; numbers up to {LARGEST:g} are read")
    return value


def summary(changes: Iterable[Change]) -> str:
    """The kinds, in words: "LoRA", "LoRA and full difference"."""
    return " and ".join(KINDS[kind] for kind in dict.fromkeys(change.kind for change in changes)) or "nothing"
