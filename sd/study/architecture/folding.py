"""Modules that are alike, one after another, folded into one entry: "12 × layers"."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from sd.study.architecture.calls import Shape
from sd.study.architecture.description import Node

LEAST = 3  # fewer stand for themselves


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Several modules with the same layers and shapes; it has the fields of a node that a line shows."""

    nodes: tuple[Node, ...]

    @property
    def first(self) -> Node:
        return self.nodes[0]

    @property
    def times(self) -> int:
        return len(self.nodes)

    @property
    def path(self) -> str:
        """ "text_encoder.layers.0-11\""""
        return f"{self.first.path}-{self.nodes[-1].path.rpartition('.')[2]}"

    @property
    def inputs(self) -> dict[str, Shape]:
        return self.first.inputs

    @property
    def output(self) -> Shape:
        return self.first.output

    @property
    def skips(self) -> tuple[str, ...]:
        return ()

    @property
    def operations(self) -> int:
        return sum(node.operations for node in self.nodes)

    @property
    def parameter_count(self) -> int:
        return sum(node.parameter_count for node in self.nodes)

    @property
    def milliseconds(self) -> float | None:
        times = [node.milliseconds for node in self.nodes]
        return None if None in times else sum(times)

    def walk(self) -> Iterator[Node]:
        for node in self.nodes:
            yield from node.walk()


def folded(nodes: Iterable[Node]) -> Iterator[Node | Fold]:
    """The modules in their order, with folds where at least `LEAST` in a row are alike."""
    for _, alike in groupby(nodes, key=_likeness):
        some = tuple(alike)
        if len(some) >= LEAST:
            yield Fold(nodes=some)
        else:
            yield from some


def _likeness(node: Node) -> object:
    """Equal for two modules whose layers and shapes are the same; only modules of a list have a like."""
    owner, _, name = node.path.rpartition(".")
    inside = tuple((inner.kind, inner.built_as, inner.output, inner.operations) for inner in node.walk())
    return (
        (owner, node.skips, inside, sorted(node.inputs.items())) if name.isdecimal() and not node.skips else node.path
    )
