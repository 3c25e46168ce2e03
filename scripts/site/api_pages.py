"""The API pages of all modules, from their docstrings, by pdoc: what make_site.py starts in a process of its own.

python scripts/site/api_pages.py build/api
"""

import re
import sys
import warnings
from pathlib import Path

import pdoc
from jinja2 import pass_context
from jinja2.runtime import Context
from pdoc.render_helpers import to_markdown_with_context

import sd

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def modules() -> list[str]:
    """All of them by name: pdoc leaves out the modules of a package with `__all__`."""
    names = []
    for path in sorted(path for folder in ("sd", "convert") for path in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def with_columns(docstring: str) -> str:
    """The docstring as Markdown in which paragraphs with columns (`x_t  (B, 4, H, W)`) stay as they are written."""
    paragraphs = docstring.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        is_code = all(line.startswith("    ") for line in paragraph.splitlines())
        if re.search(r"\S {2,}\S", paragraph) and not is_code:
            paragraphs[i] = f"```text\n{paragraph.strip()}\n```"
    return "\n\n".join(paragraphs)


@pass_context
def to_markdown(context: Context, docstring: str) -> str:
    return to_markdown_with_context(context, with_columns(docstring))


def main() -> None:
    (out,) = sys.argv[1:]
    warnings.filterwarnings("ignore", module="pdoc.doc_types")  # types that only type checkers import stay plain names
    warnings.filterwarnings("ignore", message=".*has already been added")  # of modules that pdoc finds by itself, too
    for name in sd.__all__:
        setattr(sd, name, getattr(sd, name))  # `sd` imports them when they are asked for, and pdoc does not ask
    pdoc.render.configure(docformat="markdown", show_source=False, template_directory=HERE / "pdoc")
    pdoc.render.env.filters["to_markdown"] = to_markdown
    pdoc.pdoc(*modules(), output_directory=Path(out))


if __name__ == "__main__":
    main()
