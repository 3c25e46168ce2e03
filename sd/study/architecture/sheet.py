"""A sheet to draw on: boxes, texts and arrows of an SVG, in light or dark colours as the reader chose."""

from collections.abc import Callable, Sequence
from html import escape

FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
COLOURS = {  # by class: light and dark
    "paper": ("#ffffff", "#1d2126"),
    "ink": ("#24292f", "#e4e7eb"),
    "faint": ("#5b6570", "#a3adb8"),
    "attention": ("#f8d49b", "#6d4f16"),
    "residual": ("#bcd6ee", "#264b6e"),
    "plain": ("#dfe3e8", "#414951"),
    "text": ("#cbe5c5", "#2d5227"),
    "vae": ("#e6cfe9", "#5a3563"),
    "loop": ("#f6f3ea", "#2a2d2f"),
}
XMLNS = ' xmlns="http://www.w3.org/2000/svg"'  # for a file of its own; not needed inside a page
SMALL = 12  # of text beside arrows; that in boxes is a little larger
LINE = 17  # from one line of text to the next
Point = tuple[float, float]
Target = Callable[[str], tuple[str, str] | None]  # from a module's path to the address of a link, and what it says


class Sheet:
    """What is drawn, in order: later parts lie over earlier ones.

    target  says where the boxes of modules lead
    name    keeps two sheets in one page apart
    """

    def __init__(self, target: Target, name: str):
        self.parts: list[str] = []
        self.target, self.name = target, name

    def svg(self, width: float, height: float, title: str) -> str:
        head = '<path class="f-ink" d="M 0 0 L 8 4 L 0 8 z"/>'
        return "\n".join(
            [
                f'<svg{XMLNS} class="drawing {self.name}" font-family="{FONT}" '
                f'viewBox="0 0 {width:g} {height:g}" role="group" aria-labelledby="title-{self.name}">',
                f'<title id="title-{self.name}">{escape(title)}</title>',
                f"<style>{style()}</style>",
                f'<defs><marker id="head-{self.name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                f'markerHeight="7" orient="auto">{head}</marker></defs>',
                f'<rect class="f-paper" width="{width:g}" height="{height:g}" rx="8"/>',
                *self.parts,
                "</svg>",
            ]
        )

    def text(self, x: float, y: float, words: str, *, size: float = 13, anchor: str = "middle", bold: bool = False):
        weight = ' font-weight="bold"' if bold else ""
        place = f'x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place}{weight}>{escape(words)}</text>")

    def note(self, x: float, y: float, words: str, anchor: str = "middle"):
        """A text beside an arrow."""
        self.text(x, y, words, size=SMALL, anchor=anchor)

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "ink"):
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect class="f-{fill} s-{stroke}" {place} rx="5"/>')

    def begin(self, path: str) -> str:
        """Begin the box of a module, a link if there is an address for it. Returns what ends it."""
        found = self.target(path) if path else None
        if found is None:
            self.parts.append("<g>")
            return "</g>"
        self.parts.append(f'<a href="{escape(found[0])}"><title>{escape(found[1])}</title>')
        return "</a>"

    def box(self, x: float, y: float, width: float, height: float, fill: str, lines: Sequence[str], path: str = ""):
        """A box with lines of text, the first one bold. `path` is that of a module."""
        end = self.begin(path)
        self.rectangle(x, y, width, height, fill)
        top = y + height / 2 - LINE / 2 * (len(lines) - 1) + 4.5
        for i, line in enumerate(lines):
            self.text(x + width / 2, top + LINE * i, line, bold=i == 0)
        self.parts.append(end)

    def arrow(self, *points: Point, stroke: str = "ink", head: bool = True, dotted: bool = False):
        path = " L ".join(f"{x:g} {y:g}" for x, y in points)
        end = f' marker-end="url(#head-{self.name})"' if head else ""
        dots = ' stroke-dasharray="2 3"' if dotted else ""
        self.parts.append(f'<path class="line s-{stroke}" stroke-width="1.4"{dots}{end} d="M {path}"/>')


def style() -> str:
    """Fills and lines by class, in light and in dark."""

    def rules(shade: int) -> str:
        fills = (f".f-{name}{{fill:{pair[shade]}}}" for name, pair in COLOURS.items())
        lines = (f".s-{name}{{stroke:{COLOURS[name][shade]}}}" for name in ("ink", "faint"))
        return f"{''.join(fills)}{''.join(lines)}.drawing text{{fill:{COLOURS['ink'][shade]}}}"

    return f"{rules(0)}.line{{fill:none}}@media(prefers-color-scheme:dark){{{rules(1)}}}"
