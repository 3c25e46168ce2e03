"""Files of the repository as pages: highlighted code with numbered lines, and lists of folders."""

import ast
import html
import os
import re
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

LARGEST = 300_000  # bytes; of larger files, the size is shown
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - sd-zoo</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{up}source/source.css">
</head>
<body>
<nav aria-label="where this is"><a href="{up}index.html">sd-zoo</a> {crumbs}</nav>
<main>
{body}
</main>
</body>
</html>
"""
STYLE = Path(__file__).with_name("source.css")


def style() -> str:
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    kept = re.compile(r"^\.highlight \.\w+ \{.*$", re.MULTILINE)  # tokens, not backgrounds and line numbers
    light, dark = ("\n".join(line for line in kept.findall(rules) if "linenos" not in line) for rules in (light, dark))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{STYLE.read_text(encoding='utf-8')}"


def summary(path: Path) -> str:
    """The first line of a Python file's docstring."""
    if path.suffix != ".py":
        return ""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def code(path: Path) -> str:
    """The file as HTML; line 58 has the id L58."""
    data = path.read_bytes()
    if len(data) > LARGEST or b"\0" in data:
        return f"<p>A file of {len(data):,} bytes, which is not shown.</p>"
    text = data.decode("utf-8")
    try:
        lexer = get_lexer_for_filename(path.name, text)
    except ClassNotFound:
        lexer = TextLexer()
    lexer.stripnl = False
    shown = highlight(text, lexer, HtmlFormatter(linenos="inline", linespans="L", anchorlinenos=False))
    return re.sub(r'<span id="L-(\d+)">', r'<span class="line" id="L\1">', shown)


def listing(name: str, entries: list[Path]) -> str:
    """What is in a folder: folders first."""
    rows = []
    for path in sorted(entries, key=lambda path: (path.is_file(), path.name)):
        label, words = (path.name, summary(path)) if path.is_file() else (f"{path.name}/", "")
        href = f"{path.name}.html" if path.is_file() else f"{path.name}/index.html"
        rows.append(f'<li><a href="{href}">{html.escape(label)}</a> <span>{html.escape(words)}</span></li>')
    return f"<h1>{html.escape(name)}</h1>\n<ul>\n" + "\n".join(rows) + "\n</ul>"


def address(path: Path, root: Path) -> Path:
    """Of the page of a file or folder, from the site's first page."""
    place = Path("source") / path.relative_to(root)
    return place / "index.html" if path.is_dir() else place.with_name(place.name + ".html")


def write_pages(files: list[Path], root: Path, out: Path) -> None:
    """Pages of the files, and of all folders above them.

    root  of the repository
    out   the site's folder
    """
    folders: dict[Path, set[Path]] = {}
    for path in files:
        for child, parent in zip((path, *path.parents), path.parents, strict=False):
            if child == root:
                break
            folders.setdefault(parent, set()).add(child)
    (out / "source").mkdir(parents=True, exist_ok=True)
    (out / "source/source.css").write_text(style(), encoding="utf-8")
    for path in [*files, *folders]:
        place = address(path, root)
        parts = path.relative_to(root).parts
        up = "../" * (len(place.parts) - 1)
        crumbs = []
        for depth, part in enumerate(parts, 1):
            target = os.path.relpath(address(root.joinpath(*parts[:depth]), root), place.parent)
            link = f'<a href="{target}">{html.escape(part)}</a>'
            crumbs.append(f"/ {link if depth < len(parts) else html.escape(part)}")
        if path.suffix == ".py" and parts[0] in ("sd", "convert") and path.name not in ("__init__.py", "__main__.py"):
            crumbs.append(f'· <a href="{up}api/{"/".join(parts)[:-3]}.html">its documentation</a>')
        name = "/".join(parts) or "all files"
        body = listing(name, list(folders[path])) if path in folders else code(path)
        page = PAGE.format(title=html.escape(name), up=up, crumbs=" ".join(crumbs), body=body)
        target = out / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
