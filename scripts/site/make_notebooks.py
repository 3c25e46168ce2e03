"""Make Jupyter notebooks from the course: one for each chapter, in which the text is to be read and the code to be run.

    python scripts/site/make_notebooks.py                   # into build/notebooks
    python scripts/site/make_notebooks.py --out notebooks

Text becomes Markdown cells, Python blocks become code cells, and commands become `%%bash` cells. Pictures are stored in
the notebooks, so a notebook can be copied anywhere. The notebooks are not part of the repository: a second copy of the
text would go stale. Only the standard library is needed.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COURSE = ROOT / "docs" / "course"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\]\\]|\\.)*)\]\(([^)\s]+)\)")
MIME = {".png": "image/png", ".svg": "image/svg+xml", ".webp": "image/webp", ".jpg": "image/jpeg"}
CODE = {"python": "", "sh": "%%bash -e\n"}  # what is written above the code of a cell
FIND_SD = """\
import os
import sys

# Commands below find the `sd` of this notebook's Python.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
"""


def pages() -> list[Path]:
    chapters = sorted(COURSE.glob("[0-9]*-*.md"), key=lambda page: int(page.name.partition("-")[0]))
    return [COURSE / "README.md", *chapters]


def slug(heading: str) -> str:
    """The anchor of a heading on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchor_in_notebook(page: Path, anchor: str) -> str:
    """The anchor that Jupyter gives the heading; the same anchor if the page has no such heading."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return next((heading.replace(" ", "-") for heading in headings if slug(heading) == anchor), anchor)


def markdown_cell(text: str, page: Path, out: Path) -> dict:
    """Links lead from the notebook's folder to the same files, or to their notebooks; pictures are attached."""
    attachments = {}

    def moved(match: re.Match) -> str:
        is_picture, words, link = match.groups()
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            return match[0]
        target = (page.parent / path).resolve() if path else page
        if is_picture and target.suffix in MIME:
            attachments[target.name] = {MIME[target.suffix]: base64.b64encode(target.read_bytes()).decode()}
            return f"![{words}](attachment:{target.name})"
        if target in pages():
            place = "" if target == page else f"{target.stem}.ipynb"
            return f"[{words}]({place}{anchor and '#' + anchor_in_notebook(target, anchor)})"
        place = Path(os.path.relpath(target, out.resolve())).as_posix()
        return f"{is_picture}[{words}]({place}{anchor and '#' + anchor})"

    cell = {"cell_type": "markdown", "metadata": {}, "source": LINK.sub(moved, text)}
    return {**cell, "attachments": attachments} if attachments else cell


def code_cell(code: str) -> dict:
    return {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": code.rstrip("\n")}


def parts_of(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of each block that runs, and ("", Markdown) of what lies between them."""
    end = 0
    for block in FENCE.finditer(text):
        if block[1] in CODE:
            yield "", text[end : block.start()]
            yield block[1], block[2]
            end = block.end()
    yield "", text[end:]


def notebook(page: Path, out: Path) -> dict:
    """The page as a notebook in format 4.5.

    out  the folder that it will lie in
    """
    cells, finds_sd = [], False
    for language, text in parts_of(page.read_text(encoding="utf-8")):
        if not text.strip():
            continue
        if not language:
            cells.append(markdown_cell(text.strip("\n"), page, out))
            continue
        if language == "sh" and not finds_sd:
            cells.append(code_cell(FIND_SD))
            finds_sd = True
        cells.append(code_cell(CODE[language] + text))
    for number, cell in enumerate(cells):
        cell["id"] = hashlib.sha256(f"{page.name} {number}".encode()).hexdigest()[:8]
    metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "notebooks", help="folder for the notebooks")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for page in pages():
        path = out / f"{page.stem}.ipynb"
        whole = path.with_name(path.name + ".partial")
        whole.write_text(json.dumps(notebook(page, out), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        whole.replace(path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
