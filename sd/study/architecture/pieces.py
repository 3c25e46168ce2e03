"""Small pieces of the page, as HTML: facts, shapes, amounts, and where a weight is kept."""

from collections.abc import Iterable
from html import escape

from sd.study.architecture.calls import Shape
from sd.study.architecture.description import Parameter


def facts_list(facts: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f"<dl>{rows}</dl>"


def parameter_table(parameters: Iterable[Parameter]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(parameter.name)}</code></td><td><code>{escape(parameter.original)}</code></td>"
        f"<td>{stored_shape(parameter)}</td></tr>"
        for parameter in parameters
    )
    heads = '<tr><th scope="col">our name</th><th scope="col">original key</th><th scope="col">shape</th></tr>'
    return f'<table class="keys"><thead>{heads}</thead><tbody>{rows}</tbody></table>' if rows else ""


def stored_shape(parameter: Parameter) -> str:
    ours, original = (" × ".join(map(str, shape)) for shape in (parameter.shape, parameter.original_shape))
    return ours if ours == original else f"{ours}<br>original: {original}"


def shape_html(shape: Shape) -> str:
    """The shape without the batch, which is 1."""
    return " × ".join(map(str, shape[1:])) or "–"


def amount(number: int) -> str:
    """Three digits and a unit: 15.7 M"""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}" if number < 999.5 * scale else f"{number / scale:.0f} {unit}"
    return str(number)
