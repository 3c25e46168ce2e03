"""The tensors of an adapter, sorted by the modules that they change."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from convert.adapters.parts import WHOLE, Shape, fits, kind_of, result_shape
from convert.adapters.spellings import split
from convert.errors import WeightMismatchError, shown
from convert.files.records import TensorRecord
from convert.layouts.adapter_names import FAMILIES, AdaptedFamily, module_names, modules

WORDS = "bundle_emb."  # embeddings that an adapter brings along


@dataclass
class Module:
    """The tensors that belong to one module, by part."""

    name: str  # in the file
    parts: dict[str, TensorRecord] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)  # of each part
    names: dict[str, str] = field(default_factory=dict)  # of each part, in the file

    @property
    def shapes(self) -> dict[str, Shape]:
        return {part: record.shape for part, record in self.parts.items()}

    @property
    def kind(self) -> str:
        """A key of `convert.adapters.parts.KINDS`; "" for parts of several kinds."""
        return kind_of({part: (self.kinds[part], shape) for part, shape in self.shapes.items()})

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight of a network, and nothing of an adapter."""
        return self.parts.keys() == {"weight"} and self.kind == "ia3"

    @property
    def lacks(self) -> str:
        """What the parts are, if others are missing; "" if they are complete."""
        has = ", ".join(sorted(self.parts))
        if not self.kind:
            return f"parts of several kinds: {has}"
        return "" if any(self.parts.keys() >= needed for needed in WHOLE[self.kind]) else f"only {has}"

    def result(self, weight: Shape) -> Shape | None:
        """The shape of the change to a weight of this shape; None if the parts do not go together."""
        return result_shape(self.kind, self.shapes, weight)


def bundled(tensors: Mapping[str, TensorRecord]) -> tuple[dict[str, dict[str, TensorRecord]], dict[str, TensorRecord]]:
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


def sorted_in(tensors: Mapping[str, TensorRecord], family: AdaptedFamily) -> tuple[dict[str, Module], list[str]]:
    """The tensors by our names of their modules, and the names of those that belong to none.

    Raises WeightMismatchError for a module that is there twice.
    """
    names = module_names(family)
    found: dict[str, Module] = {}
    unknown = []
    for name, record in tensors.items():
        place = split(name, names)
        if place is None:
            unknown.append(name)
            continue
        module, kind, part = place
        mine = found.setdefault(names[module], Module(module))
        if mine.name != module or part in mine.parts:
            other = mine.names.get(part) or next(iter(mine.names.values()))
            raise WeightMismatchError(
                f"holds one module twice, as {shown(other)} and as {shown(name)}. It is unclear which one counts."
            )
        mine.parts[part], mine.kinds[part], mine.names[part] = record, kind, name
    return found, unknown


def best_family(tensors: Mapping[str, TensorRecord]) -> tuple[AdaptedFamily | None, int]:
    """The family whose modules most of an adapter's fit, and how many fit.

    If the shapes fit none, it is the family that has most of the names; None if no family has any. Raises
    WeightMismatchError if the names are those of a family, but one module is there twice.
    """
    candidates: list[tuple[int, int, int, int]] = []
    _, adapting = bundled(tensors)
    twice = None
    for index, family in enumerate(FAMILIES):
        try:
            found, _ = sorted_in(adapting, family)
        except WeightMismatchError as error:
            twice = twice or error
            continue
        weights = modules(family)
        whole = [(module, weights[target]) for target, module in found.items() if not module.lacks]
        fitting = sum(fits(module.result(weight), weight) for module, weight in whole)
        named = sum(not module.is_weight for module in found.values())
        if named:
            candidates.append((fitting, len(whole), named, -index))
    if not candidates:
        if twice:
            raise twice
        return None, 0
    fitting, _, _, index = max(candidates)
    return FAMILIES[-index], fitting
