"""The architecture as a table for the terminal, one line per block."""

import textwrap
from collections.abc import Iterator, Sequence

from sd.study.architecture.calls import COUNTED, Shape
from sd.study.architecture.description import Architecture, Node


def table(architecture: Architecture) -> str:
    """The blocks of each network in the order they run, and its totals."""
    lines = [summary(architecture)]
    timed = bool(architecture.measured_on)
    for network in architecture.networks:
        rows = [_row(node, network, timed) for node in blocks(network)]
        total = [
            "total",
            "",
            "",
            "",
            f"{network.parameter_count:,}",
            giga(network.operations),
            *_time(network, timed),
        ]
        heads = [network.path, "layers", "input", "output", "parameters", "G operations", *["ms"] * timed, "skip from"]
        lines += ["", *aligned([heads, *rows, [*total, ""]])]
    return "\n".join([*lines, "", *textwrap.wrap(f"Operations: {COUNTED}.", 110)])


def summary(architecture: Architecture) -> str:
    config, factor = architecture.config, architecture.config.vae.factor
    text = (
        f"{config.family}, {architecture.width}x{architecture.height} pixels, "
        f"{architecture.width // factor}x{architecture.height // factor} latents, one picture"
    )
    return f"{text}; times measured on {architecture.measured_on}" if architecture.measured_on else text


def blocks(network: Node) -> Iterator[Node]:
    """The parts of a network; for the VAE, which is called as two halves, the parts of each half."""
    for child in network.children:
        yield from child.children if child.children and not network.output else [child]


def shape_text(shape: Shape) -> str:
    """The shape without the batch, which is 1."""
    return "x".join(map(str, shape[1:]))


def giga(operations: int) -> str:
    return f"{operations / 1e9:,.3f}"


def _row(node: Node, network: Node, timed: bool) -> list[str]:
    def short(path: str) -> str:
        return path.removeprefix(f"{network.path}.")

    layers = " ".join(child.path.removeprefix(f"{node.path}.") for child in node.children) or node.kind
    given = shape_text(next(iter(node.inputs.values()), ()))
    numbers = [f"{node.parameter_count:,}", giga(node.operations), *_time(node, timed)]
    return [short(node.path), layers, given, shape_text(node.output), *numbers, " ".join(map(short, node.skips))]


def _time(node: Node, timed: bool) -> list[str]:
    return ["" if node.milliseconds is None else f"{node.milliseconds:.2f}"] * timed


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with columns of equal width, words to the left, numbers to the right; empty columns are dropped."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    for i, column in enumerate(columns):
        width, numbers = max(map(len, column)), column[-1].replace(",", "").replace(".", "").isdecimal()
        columns[i] = [f"{cell:>{width}}" if numbers else f"{cell:<{width}}" for cell in column]
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
