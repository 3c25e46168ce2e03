"""Write an adapter in one of the spellings of `convert.adapters.spellings`."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from convert.actions.target import TargetError
from convert.adapters.adapter import CONFIG, IN_FOLDERS
from convert.adapters.parts import KINDS
from convert.adapters.spellings import BESIDE, KOHYA, OF_NORMS, PEFT
from convert.adapters.stated import IN_METADATA
from convert.errors import counted, joined, shown_list
from convert.files.arrays import NUMPY, rounded
from convert.files.records import trimmed
from convert.files.safetensors_writer import write_safetensors
from convert.layouts.adapter_names import AdaptedFamily, diffusers_names, kohya_names, modules
from convert.layouts.names import TEXT_PREFIX
from sd.files import folder_written_whole, written_whole

HASH = "sshs_model_hash"  # in the metadata of kohya's files


class Values(NamedTuple):
    """A tensor to write."""

    dtype: str  # a key of DTYPE_WIDTHS
    shape: tuple[int, ...]
    data: Callable[[], Iterable[memoryview | bytes]]  # the bytes, row by row


@dataclass(frozen=True, kw_only=True)
class Module:
    """What changes one module."""

    target: str  # by our name
    kind: str  # a key of KINDS
    parts: Mapping[str, Values]
    rank: int | None = None
    alpha: float | None = None  # the product is multiplied with alpha / rank; None: with 1
    on_input: bool = False  # of (IA)³


def write_adapter(
    target: Path,
    found: Sequence[Module],
    family: AdaptedFamily,
    spelling: str,
    metadata: Mapping[str, str],
    *,
    words: Mapping[str, Values] | None = None,
    force: bool = False,
) -> int:
    """Write a file, or a folder for PEFT, completely or not at all. Returns how many tensors that were.

    words  tensors of bundled embeddings, by their names in the file

    Raises TargetError for what the spelling has no words for, FileExistsError or OSError for the target.
    """
    words = words or {}
    check_spelling(found, words, spelling)
    found = [_like_its_module(module, family) for module in found]
    if spelling == "kohya":
        return write_hashed(target, _kohya(found, family) | words, metadata, force=force)
    named, settings = _by_component(found, family)
    if spelling == "diffusers":
        tensors = {f"{component}.{name}": v for component, mine in named.items() for name, v in mine.items()}
        stated = {f"{component}.{name}": v for component, mine in settings.items() for name, v in mine.items()}
        with written_whole(target, force=force) as out:
            return _write(out, tensors | words, {"format": "pt", **metadata, IN_METADATA: json.dumps(stated)})
    count = 0
    with folder_written_whole(target, force=force) as folder:
        for component, mine in named.items():
            place = folder / component if len(named) > 1 else folder
            place.mkdir(exist_ok=True)
            with written_whole(place / CONFIG) as out:
                out.write((json.dumps({"peft_type": "LORA", **settings[component]}, indent=2) + "\n").encode())
            with written_whole(place / IN_FOLDERS[0]) as out:
                tensors = {f"base_model.model.{name}": values for name, values in mine.items()}
                count += _write(out, tensors, {"format": "pt", **metadata})
    return count


def write_hashed(target: Path, tensors: Mapping[str, Values], metadata: Mapping[str, str], *, force: bool) -> int:
    """Write tensors as kohya's scripts do: in the order of their names, with the sha256 of their bytes noted."""
    with written_whole(target, force=force) as out:
        return _write(out, dict(sorted(tensors.items())), metadata, hashed=True)


def check_spelling(found: Sequence[Module], words: Mapping[str, Values], spelling: str) -> None:
    """Raises TargetError for what a spelling has no words for."""
    problems = []
    factors = [module.target for module in found if spelling == "kohya" and "factor" in module.parts]
    if factors:
        problems.append(f"PEFT's {KINDS['ia3']} of {counted(len(factors), 'module')}")
    if spelling != "kohya":
        kinds = Counter(KINDS[module.kind] for module in found if module.kind != "lora")
        problems += [f"{kind} of {counted(number, 'module')}" for kind, number in kinds.items()]
        for part, what in (("mid", "Tucker cores"), ("bias", "biases")):
            if number := sum(part in module.parts for module in found if module.kind == "lora"):
                problems.append(f"{what} of {counted(number, 'module')}")
        if number := sum(_is_per_input(module) for module in found):
            problems.append(f"DoRA lengths per input of {counted(number, 'module')}")
    if words and spelling == "peft":
        problems.append(f"embeddings ({shown_list(tuple(words))})")
    if problems:
        raise TargetError(f"the spelling of {spelling} cannot hold {joined(problems)}. Use --spelling kohya.")


def _is_per_input(module: Module) -> bool:
    """Whether a LoRA has a length for each input: only the shape says so."""
    if module.kind != "lora" or "dora_scale" not in module.parts:
        return False
    shape, outputs = module.parts["dora_scale"].shape, module.parts["up"].shape[0]
    return math.prod(shape) != outputs or shape[0] == 1 < outputs


def _like_its_module(module: Module, family: AdaptedFamily) -> Module:
    """The factors of a LoRA as matrices for a linear layer, as 1x1 convolutions for what was one in the first version.

    Some programs write either for both; diffusers reads no other.
    """
    weight = modules(family)[module.target]
    if module.kind != "lora" or len(weight) != 2:
        return module
    convolution = family.name.startswith("sd-v1") and module.target.startswith("unet.")
    convolution = convolution and module.target.endswith(("attention.proj_in", "attention.proj_out"))
    axes = (1, 1) if convolution else ()

    def shaped(part: str, values: Values) -> Values:
        matrix = part in ("down", "up") and len(trimmed(values.shape)) <= 2
        return values._replace(shape=(*values.shape[:2], *axes)) if matrix else values

    return replace(module, parts={part: shaped(part, values) for part, values in module.parts.items()})


def _kohya(found: Sequence[Module], family: AdaptedFamily) -> dict[str, Values]:
    names, tensors = kohya_names(family), {}
    for module in found:
        name, weight = names[module.target], modules(family)[module.target]
        ends = {**KOHYA[module.kind], **BESIDE, **(OF_NORMS if module.kind == "full" and len(weight) == 1 else {})}
        if module.alpha is not None:
            tensors[name + ends["alpha"]] = _number(module.alpha, module.parts)
        for part, values in module.parts.items():
            if part == "magnitude":  # per output, which the shape must say
                part, values = "dora_scale", values._replace(shape=(math.prod(values.shape), *(1 for _ in weight[1:])))
            tensors[name + ends[part]] = values
        if module.kind == "ia3":
            tensors[name + ends["on_input"]] = _scalar(int(module.on_input), "int64")
    return tensors


def _number(value: float, parts: Mapping[str, Values]) -> Values:
    """An alpha, in the precision of the tensors beside it if that holds it exactly, else in float32."""
    dtype = next(iter(parts.values())).dtype
    if dtype not in ("float16", "bfloat16") or rounded(np.array(value, "f8"), dtype) != value:
        dtype = "float32"
    return _scalar(value, dtype)


def _scalar(value: float, dtype: str) -> Values:
    if dtype == "bfloat16":
        data = (np.array(value, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        data = np.array(value, NUMPY[dtype]).tobytes()
    return Values(dtype, (), lambda: [data])


def _by_component(
    found: Sequence[Module], family: AdaptedFamily
) -> tuple[dict[str, dict[str, Values]], dict[str, dict[str, object]]]:
    """The tensors of each network by PEFT's names, and its settings."""
    names, shapes = diffusers_names(family), modules(family)
    tensors: dict[str, dict[str, Values]] = defaultdict(dict)
    members: dict[str, dict[str, Module]] = defaultdict(dict)
    for module in found:
        component, _, path = names[module.target].partition(".")
        members[component][path.removeprefix(TEXT_PREFIX)] = module  # ends of names: transformers 5 has no more
        for part, values in module.parts.items():
            if part in ("magnitude", "dora_scale"):
                outputs, part = math.prod(values.shape), "magnitude"
                values = values._replace(shape=(outputs,) if len(shapes[module.target]) == 2 else (1, outputs, 1, 1))
            tensors[component][path + PEFT[part]] = values
    return tensors, {component: _settings(mine) for component, mine in members.items()}


def _settings(members: Mapping[str, Module]) -> dict[str, object]:
    """The settings of PEFT for the modules of one network, by the ends of their names. A missing alpha is the rank."""
    ranks = {path: module.rank for path, module in members.items()}
    alphas = {path: module.rank if module.alpha is None else module.alpha for path, module in members.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: _plain(value) for path, value in alphas.items() if value != alpha},
        "target_modules": list(members),
        "use_dora": any({"magnitude", "dora_scale"} & module.parts.keys() for module in members.values()),
        "use_rslora": False,
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _plain(value: float) -> float | int:
    """4 instead of 4.0, as these settings are usually written."""
    return int(value) if float(value).is_integer() else value


def _write(out: BinaryIO, tensors: Mapping[str, Values], metadata: Mapping[str, str], *, hashed: bool = False) -> int:
    """hashed  note the sha256 of the tensors' bytes"""
    entries = {name: (values.dtype, values.shape) for name, values in tensors.items()}
    digest = hashlib.sha256()

    def pieces() -> Iterator[memoryview | bytes]:
        for values in tensors.values():
            for piece in values.data():
                digest.update(piece)
                yield piece

    write_safetensors(out, entries, pieces(), {**metadata, **({HASH: digest.hexdigest} if hashed else {})})
    return len(tensors)
