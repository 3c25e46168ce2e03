"""The architecture as a page to explore: one self-contained HTML file that works offline.

`page.html` holds its style and its few lines of script; this module fills in the content.
"""

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from string import Template

from sd.study.architecture.calls import COUNTED, Shape
from sd.study.architecture.description import Architecture, Node, Parameter
from sd.study.architecture.table import blocks, summary

TEMPLATE_FILE = Path(__file__).with_name("page.html")
TITLES = {"text_encoder": "Text encoder", "text_encoder_2": "Second text encoder"}
TITLES |= {"unet": "UNet", "vae": "VAE", "depth_network": "Depth network"}
LEADS = {
    "text_encoder": "A prompt, as token ids, becomes one vector per token: the context that the UNet attends to.",
    "text_encoder_2": "The same prompt becomes a second vector per token. The UNet attends to both, side by side. One "
    "vector for the whole prompt is added to the timestep's, with the sizes of the picture.",
    "unet": "Predicts the noise in noisy latents, given the timestep and the text: once per step, twice with guidance. "
    "The way down is on the left, the way up on the right; each block on the right also takes the output of its "
    "counterpart on the left. The timestep goes to every residual block, the text to every attention.",
    "vae": "The encoder turns a picture into latents, the decoder turns latents into a picture. Text to image needs "
    "only the decoder; the totals are for both.",
    "depth_network": "Estimates how near each point of a picture is, once for each picture. The UNet reads this depth "
    "beside the noisy latents. The size is that of the depth network's training pictures.",
}


def page(architecture: Architecture, *, source_url: str | None = None) -> str:
    """The whole page. With `source_url`, source lines are links: that prefix, then `/sd/networks/unet.py#L58`."""
    sections = [Section(network, source_url) for network in architecture.networks]
    return Template(TEMPLATE_FILE.read_text(encoding="utf-8")).substitute(
        summary=escape(summary(architecture)),
        counted=escape(COUNTED),
        cards="\n".join(section.card() for section in sections),
        sections="\n".join(section.html() for section in sections),
    )


class Section:
    """One network on the page: a figure of its blocks, and its modules, each of which opens."""

    def __init__(self, network: Node, source_url: str | None):
        self.network = network
        self.source_url = source_url
        self.title = TITLES.get(network.path, network.path)
        self.most = max(block.operations for block in blocks(network))
        self.users = {source: node.path for node in network.walk() for source in node.skips}  # of skip connections

    def card(self) -> str:
        numbers = " ".join(f"<span>{text}</span>" for text in self.numbers(self.network))
        return f'<li><a href="#{self.network.path}-section"><b>{escape(self.title)}</b>{numbers}</a></li>'

    def html(self) -> str:
        name, network = self.network.path, self.network
        children = "\n".join(self.node(child, name) for child in network.children)
        lead = escape(LEADS.get(name, network.purpose))
        facts = f"{facts_list(self.facts(network))}{parameter_table(network.parameters)}"
        return (
            f'<section id="{name}-section" aria-labelledby="{name}-title">\n'
            f'<h2 id="{name}-title">{escape(self.title)}</h2>\n<p>{lead}</p>\n{facts}\n'
            f'<div class="columns"><figure aria-label="{escape(self.title)}: blocks">{self.figure()}</figure>\n'
            f'<div class="nodes"><p class="tools" hidden><button type="button" data-open>open all</button> '
            f'<button type="button" data-close>close all</button></p>\n{children}</div></div>\n</section>'
        )

    def figure(self) -> str:
        order = list(blocks(self.network))
        tiles = "\n".join(self.tile(*place) for place in self.places(order))
        return f'<ol class="figure">\n{tiles}\n</ol>{legend(order)}'

    def places(self, order: list[Node]) -> Iterator[tuple[Node, int, int, str]]:
        """Blocks in the order they run, each with its row, its column and its role in the figure.

        Without skip connections they form a chain (column 0: as wide as the figure). With them they form a U: a block
        that gives a skip is in column 1, the one that takes it in column 2 of the same row, blocks between at the foot.
        """
        paths = {block.path for block in order}
        down = [i for i, block in enumerate(order) if self.users.get(block.path) in paths]
        up = [i for i, block in enumerate(order) if paths.intersection(block.skips)]
        if not down:
            yield from ((block, row, 0, "down" if block.inputs else "apart") for row, block in enumerate(order, 1))
            return
        before, after = order[: down[0]], order[up[-1] + 1 :]
        top = 1 + max(len(before), len(after))
        rows = {order[i].path: row for row, i in enumerate(down, top)}
        yield from ((block, row, 1, "apart") for row, block in enumerate(before, 1))
        yield from ((order[i], rows[order[i].path], 1, "down") for i in down)
        yield from ((block, row, 0, "turn") for row, block in enumerate(order[down[-1] + 1 : up[0]], top + len(down)))
        yield from ((order[i], rows[order[i].skips[0]], 2, "up") for i in up)
        yield from ((block, top - row, 2, "apart") for row, block in enumerate(after, 1))

    def tile(self, block: Node, row: int, column: int, role: str) -> str:
        name = block.path.removeprefix(f"{self.network.path}.")
        share = 100 * block.operations / self.most if self.most else 0
        spoken = f"{name}: {', '.join(layers(block))}; gives {shape_html(block.output)}"
        if block.skips:
            spoken += f"; skip from {', '.join(self.short(path) for path in block.skips)}"
        skip = '<span class="skip"></span>' if block.skips else ""
        area = f"{row} / {column}" if column else f"{row} / 1 / auto / -1"
        return (
            f'<li class="{role}" style="grid-area: {area}">{skip}<a class="tile {look(block)}" href="#{block.path}" '
            f'aria-label="{escape(spoken)}" style="--share: {share:.1f}%"><b>{escape(name)}</b> '
            f"<span>{shape_html(block.output)}</span></a></li>"
        )

    def node(self, node: Node, parent: str) -> str:
        """A module that opens, with its inner modules inside."""
        name = node.path.removeprefix(f"{parent}.")
        numbers = " ".join(f'<span class="number">{text}</span>' for text in self.numbers(node))
        share = 100 * node.operations / self.network.operations if self.network.operations else 0
        children = "\n".join(self.node(child, node.path) for child in node.children)
        purpose = f"<p>{escape(node.purpose)}</p>" if node.purpose else ""
        return (
            f'<details class="node" id="{node.path}"><summary><b>{escape(name)}</b> '
            f'<span class="made">{escape(", ".join(layers(node)))}</span> '
            f'<span class="shape">{shape_html(node.output)}</span> '
            f'{numbers}<span class="bar" style="--share: {share:.2f}%"></span></summary>\n'
            f'<div class="body">{purpose}{facts_list(self.facts(node))}{parameter_table(node.parameters)}'
            f"{children}</div></details>"
        )

    def facts(self, node: Node) -> Iterator[tuple[str, str]]:
        """Names and values; values are HTML."""
        if node.inputs:
            given = (f"<i>{escape(name)}</i> {shape_html(shape)}" for name, shape in node.inputs.items())
            yield "input", "<br>".join(given)
        if node.skips:
            yield "skip from", ", ".join(self.link(path) for path in node.skips)
        if node.output:
            yield "output", shape_html(node.output)
        if node.path in self.users:
            yield "skip to", self.link(self.users[node.path])
        if node.heads:
            yield "heads", str(node.heads)
        yield "parameters", f"{node.parameter_count:,}"
        share = (
            f" ({100 * node.operations / self.network.operations:.2g} % of the network)"
            if node is not self.network
            else ""
        )
        yield "operations", f"{node.operations:,}{share if node.operations else ''}"
        if node.milliseconds is not None:
            yield "time", f"{node.milliseconds:,.3f} ms"
        if not node.inputs and not node.children:
            yield "use", "a table that is read, not called"
        yield "class", f"<code>{escape(node.built_as or node.kind)}</code>"
        yield "source", self.source(node)

    def numbers(self, node: Node) -> list[str]:
        time = [] if node.milliseconds is None else [f"{node.milliseconds:,.2f} ms"]
        return [f"{amount(node.parameter_count)} parameters", f"{amount(node.operations)} operations", *time]

    def source(self, node: Node) -> str:
        text = f"{escape(node.file)}:{node.line}"
        if self.source_url is None:
            return f"<code>{text}</code>"
        return (
            f'<a href="{escape(self.source_url.rstrip("/"))}/{escape(node.file)}#L{node.line}"><code>{text}</code></a>'
        )

    def link(self, path: str) -> str:
        return f'<a href="#{path}">{escape(self.short(path))}</a>'

    def short(self, path: str) -> str:
        return path.removeprefix(f"{self.network.path}.")


def layers(node: Node) -> list[str]:
    return [child.path.removeprefix(f"{node.path}.") for child in node.children] or [node.kind]


def look(block: Node) -> str:
    """The class that colours a block: with attention, with residuals only, or neither."""
    names = " ".join(inner.path for inner in block.walk())
    return next((look for look in ("attention", "residual") if look in names), "plain")


def legend(order: Iterable[Node]) -> str:
    words = {"attention": "with attention", "residual": "residual only", "plain": "neither"}
    seen = {look(block) for block in order}
    items = "".join(f'<li class="{name}">{text}</li>' for name, text in words.items() if name in seen)
    return f'<ul class="legend">{items}<li class="line">line at the foot: share of operations</li></ul>'


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
