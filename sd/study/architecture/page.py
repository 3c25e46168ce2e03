"""The architecture as a page to explore: one self-contained HTML file that works offline.

`page.html` holds its style and its few lines of script; this module fills in the content.
"""

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from string import Template

from sd.study.architecture.calls import COUNTED
from sd.study.architecture.description import Architecture, Node
from sd.study.architecture.drawing import drawing
from sd.study.architecture.folding import Fold, folded
from sd.study.architecture.pieces import amount, facts_list, parameter_table, shape_html
from sd.study.architecture.sentences import CHAPTER, WITHOUT_WEIGHTS, sentence
from sd.study.architecture.sheet import XMLNS
from sd.study.architecture.table import blocks, summary
from sd.study.chapters import chapter, where

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


def page(architecture: Architecture, *, source_url: str | None = None, course: str | None = None) -> str:
    """The whole page.

    source_url  for links to source lines: `source_url`/sd/networks/unet.py#L58
    course      where the chapters are, for links: `course`/4-the-unet.md. None names them only
    """
    sections = [Section(network, source_url, course) for network in architecture.networks]
    places = {
        each.path: (f"#{each.path}", sentence(each)) for network in architecture.networks for each in network.walk()
    }
    places |= {path: (f"#{path}-section", LEADS[path]) for path in LEADS}
    places |= {name: (f"#part-{name}", words) for name, (_, words, _) in WITHOUT_WEIGHTS.items()}
    drawings = (drawing(architecture.config, tall=tall, target=places.get) for tall in (False, True))
    return Template(TEMPLATE_FILE.read_text(encoding="utf-8")).substitute(
        summary=escape(summary(architecture)),
        family=escape(architecture.config.family),
        drawings="\n".join(drawn.replace(XMLNS, "", 1) for drawn in drawings),
        counted=escape(COUNTED),
        cards="\n".join(section.card() for section in sections),
        sections="\n".join(section.html() for section in sections),
        where=where(course),
        parts="\n".join(part(name, course) for name in WITHOUT_WEIGHTS),
    )


def part(name: str, course: str | None) -> str:
    """A part of the model that is no network."""
    title, words, number = WITHOUT_WEIGHTS[name]
    more = f'<span class="soft">{chapter(number, course)}</span>'
    return f'<div id="part-{name}"><dt>{title}</dt><dd>{escape(words)}<br>{more}</dd></div>'


class Section:
    """One network on the page: a figure of its blocks, and its modules, each of which opens."""

    def __init__(self, network: Node, source_url: str | None = None, course: str | None = None):
        self.network = network
        self.source_url = source_url
        number = CHAPTER.get(network.path)
        self.more = "" if number is None else f'<p class="soft">{chapter(number, course)}</p>'
        self.title = TITLES.get(network.path, network.path)
        self.blocks = list(blocks(network))
        self.most = max(block.operations for block in self.blocks)
        self.users = {source: node.path for node in network.walk() for source in node.skips}  # of skip connections

    def card(self) -> str:
        numbers = " ".join(f"<span>{text}</span>" for text in self.numbers(self.network))
        return f'<li><a href="#{self.network.path}-section"><b>{escape(self.title)}</b>{numbers}</a></li>'

    def html(self) -> str:
        name, network = self.network.path, self.network
        lead = escape(LEADS.get(name, network.purpose))
        facts = f"{facts_list(self.facts(network))}{parameter_table(network.parameters)}"
        return (
            f'<section id="{name}-section" aria-labelledby="{name}-title">\n<h2 id="{name}-title">'
            f'{escape(self.title)}</h2> <a class="back" href="#whole">whole model</a>\n<p>{lead}</p>\n{self.more}\n'
            f'<details class="facts"><summary>Shapes and sizes</summary>\n{facts}</details>\n'
            f'<div class="columns"><figure aria-label="{escape(self.title)}: blocks">{self.figure()}</figure>\n'
            f'<div class="nodes"><p class="tools" hidden><button type="button" data-open>open all</button> '
            f'<button type="button" data-close>close all</button></p>\n{self.nodes(network)}</div></div>\n</section>'
        )

    def figure(self) -> str:
        tiles = "\n".join(self.tile(*place) for place in self.places(self.blocks))
        return f'<ol class="figure">\n{tiles}\n</ol>{legend(self.blocks)}'

    def places(self, order: list[Node]) -> Iterator[tuple[Node | Fold, int, int, str]]:
        """Blocks in the order they run, each with its row, its column and its role in the figure.

        Without skip connections they form a chain, folded (column 0: as wide as the figure). With them they form a U:
        a block that gives a skip is in column 1, the one that takes it in column 2 of the same row, blocks between at
        the foot.
        """
        paths = {block.path for block in order}
        down = [i for i, block in enumerate(order) if self.users.get(block.path) in paths]
        up = [i for i, block in enumerate(order) if paths.intersection(block.skips)]
        if not down:
            for row, block in enumerate(folded(order), 1):
                yield block, row, 0, "down" if block.inputs else "apart"
            return
        before, after = order[: down[0]], order[up[-1] + 1 :]
        top = 1 + max(len(before), len(after))
        rows = {order[i].path: row for row, i in enumerate(down, top)}
        yield from ((block, row, 1, "apart") for row, block in enumerate(before, 1))
        yield from ((order[i], rows[order[i].path], 1, "down") for i in down)
        yield from ((block, row, 0, "turn") for row, block in enumerate(order[down[-1] + 1 : up[0]], top + len(down)))
        yield from ((order[i], rows[order[i].skips[0]], 2, "up") for i in up)
        yield from ((block, top - row, 2, "apart") for row, block in enumerate(after, 1))

    def tile(self, block: Node | Fold, row: int, column: int, role: str) -> str:
        name, times = self.short(block.path), f"{block.times} ×" if isinstance(block, Fold) else ""
        share = 100 * block.operations / self.most / (block.times if times else 1) if self.most else 0
        spoken = f"{name}: {times}{' ' if times else ''}{', '.join(layers(block))}; gives {shape_html(block.output)}"
        if block.skips:
            spoken += f"; skip from {', '.join(self.short(path) for path in block.skips)}"
        skip = '<span class="skip"></span>' if block.skips else ""
        count = f'<b class="times">{times}</b> ' if times else ""
        area = f"{row} / {column}" if column else f"{row} / 1 / auto / -1"
        return (
            f'<li class="{role}" style="grid-area: {area}">{skip}'
            f'<a class="tile {look(block)}{" many" if times else ""}" '
            f'href="#{block.path}" title="{escape(sentence(block.first if times else block))}" '
            f'aria-label="{escape(spoken)}" style="--share: {share:.1f}%"><b>{escape(name)}</b> '
            f"{count}<span>{shape_html(block.output)}</span></a></li>"
        )

    def nodes(self, parent: Node) -> str:
        """The modules inside one; those that are alike, one after another, folded."""
        return "\n".join(
            self.fold(child, parent) if isinstance(child, Fold) else self.node(child, parent)
            for child in folded(parent.children)
        )

    def fold(self, fold: Fold, parent: Node) -> str:
        inside = "\n".join(self.node(node, parent) for node in fold.nodes)
        words = (
            f"{escape(sentence(fold.first))} These are {fold.times} alike, one after another, with their own weights."
        )
        return (
            f'<details class="fold" id="{fold.path}">{self.line(fold, parent, times=f"{fold.times} ×")}\n'
            f'<div class="body"><p>{words}</p>{inside}</div></details>'
        )

    def node(self, node: Node, parent: Node) -> str:
        """A module that opens, with its inner modules inside."""
        more = self.more if node in self.blocks else ""
        return (
            f'<details class="node" id="{node.path}">{self.line(node, parent)}\n'
            f'<div class="body"><p>{escape(sentence(node))}</p>{more}{facts_list(self.facts(node))}'
            f"{parameter_table(node.parameters)}{self.nodes(node)}</div></details>"
        )

    def line(self, node: Node | Fold, parent: Node, times: str = "") -> str:
        """What is seen of a module, or of a fold, while it is closed."""
        name = node.path.removeprefix(f"{parent.path}.")
        numbers = " ".join(f'<span class="number">{text}</span>' for text in self.numbers(node))
        share = 100 * node.operations / self.network.operations if self.network.operations else 0
        count = f'<b class="times">{times}</b> ' if times else ""
        return (
            f'<summary><b>{escape(name)}</b> {count}<span class="made">{escape(", ".join(layers(node)))}</span> '
            f'<span class="shape">{shape_html(node.output)}</span> '
            f'{numbers}<span class="bar" style="--share: {share:.2f}%"></span></summary>'
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
        if node.kind == "Embedding" and not node.inputs:
            yield "use", "a table that is read, not called"
        elif not node.inputs and not node.operations:
            yield "use", "never runs: the UNet reads the output of an earlier layer"
        yield "class", f"<code>{escape(node.built_as or node.kind)}</code>"
        yield "source", self.source(node)

    def numbers(self, node: Node | Fold) -> list[str]:
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


def layers(node: Node | Fold) -> list[str]:
    one = node.first if isinstance(node, Fold) else node
    return [child.path.removeprefix(f"{one.path}.") for child in one.children] or [one.kind]


def look(block: Node | Fold) -> str:
    """The class that colours a block: with attention, with residuals only, or neither."""
    names = " ".join(inner.path for inner in block.walk())
    return next((look for look in ("attention", "residual") if look in names), "plain")


def legend(order: Iterable[Node]) -> str:
    words = {"attention": "with attention", "residual": "residual only", "plain": "neither"}
    seen = {look(block) for block in order}
    items = "".join(f'<li class="{name}">{text}</li>' for name, text in words.items() if name in seen)
    return f'<ul class="legend">{items}<li class="line">line at the foot: share of operations</li></ul>'
