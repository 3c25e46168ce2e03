"""Build the documentation site: README, docs, course, code and live pages as static HTML with a search.

    python scripts/site/make_site.py               # into site; open site/index.html

The pages are the Markdown files of the repository. Links to code lead to pages of its source, the API pages come from
the docstrings (pdoc), and `sd explain` and `sd arch` make their pages with the embedded model. If docs/play is there
(`make play`), it is part of the site, and needs a server. The rest needs none, and nothing is fetched from elsewhere.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from make_notebooks import FENCE, LINK
from make_notebooks import pages as course_pages
from source_pages import address, write_pages

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TOP = ("README.md", "CONTRIBUTING.md", "weights/README.md")
CODE_FOLDERS = ("sd", "convert", "scripts")
SOURCE_SUFFIXES = {".py", ".html", ".cpp", ".h", ".js", ".mjs", ".json", ".css", ".yml"}
GROUPS = {  # of the pages in docs/; those that stand nowhere here come last
    "Use it": ("commands", "prompts", "samplers", "checkpoints", "converting", "adapters", "inpainting", "depth",
               "editing", "shortcuts", "batches", "many-machines", "server", "server-apis"),
    "Look inside": ("explain", "play", "small-xl", "training-adapters"),
    "Proof and speed": ("verification", "fuzzing", "performance", "performance-how", "performance-int8",
                        "performance-tried"),
}  # fmt: skip
PROMPT = "a red circle to the left of a white star on a blue background"
ALONE = """---
hide: [navigation]
---
"""
LIVE = f"""{ALONE}# Live pages

Made by the commands of the same names, with the embedded model. Each is one file that works by itself.

- [sd explain](pages/explain.html): how one picture was made. Every step, what the network saw and predicted, and what
  each word attends to. [How to make your own](docs/explain.md).
- [sd arch](pages/arch.html): what the model consists of, block by block.
"""
CODE = f"""{ALONE}# Code

- [The API](api/index.html): every module, class and function, from the docstrings.
- [The source](source/index.html): every file, with line numbers.
"""
PLAY = """- [sd play](docs/play/index.html): the model runs in your browser; change words, steps and latents. This one
  needs a server: `python -m http.server --directory site`.
"""


def markdown_pages() -> list[Path]:
    docs = sorted(path for path in (ROOT / "docs").rglob("*.md") if ROOT / "docs/play" not in path.parents)
    return [*(ROOT / name for name in TOP), *docs]


def links_in(page: Path) -> Iterator[Path]:
    """What a page of the repository links to, in the repository."""
    for _, _, link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if path := link.partition("#")[0]:
            target = (page.parent / path).resolve()
            if "://" not in link and ROOT in target.parents and target.exists():
                yield target


def stage_markdown(page: Path, out: Path) -> None:
    """Copy a page. Its links to code lead to the source pages; what stands in <details> stays Markdown."""
    place = page.relative_to(ROOT)

    def moved(match: re.Match) -> str:
        is_picture, words, link = match.groups()
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve()
        if not path or "://" in link or is_picture or target.suffix == ".md" or not target.exists():
            return match[0]
        if (ROOT / "docs") in target.parents and target.is_file():
            return match[0]
        if target == ROOT / "docs/course":
            return f"[{words}]({path.rstrip('/')}/README.md)"
        href = Path(os.path.relpath(address(target, ROOT), place.parent)).as_posix()
        return f"[{words}]({href}{anchor and '#' + anchor})"

    text, parts, end = page.read_text(encoding="utf-8"), [], 0
    for block in FENCE.finditer(text):
        parts += [LINK.sub(moved, text[end : block.start()]), block[0]]
        end = block.end()
    parts.append(LINK.sub(moved, text[end:]))
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).write_text("".join(parts).replace("<details>", '<details markdown="1">'), encoding="utf-8")


def stage_docs(out: Path) -> None:
    for page in markdown_pages():
        stage_markdown(page, out)
    for path in (ROOT / "docs").rglob("*"):
        if path.is_file() and path.suffix != ".md" and ROOT / "docs/play" not in path.parents:
            target = out / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    home = out / "README.md"
    home.write_text(ALONE + home.read_text(encoding="utf-8"), encoding="utf-8")
    (out / "code.md").write_text(CODE, encoding="utf-8")
    for name in ("site.css", "iframe-worker.js"):
        shutil.copyfile(HERE / name, out / name)


def stage_source(out: Path) -> None:
    files = {
        path
        for folder in CODE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SOURCE_SUFFIXES and path.is_file()
    }
    for page in markdown_pages():
        for target in links_in(page):
            if target.is_file() and target.suffix != ".md" and ROOT / "docs" not in target.parents:
                files.add(target)
            elif target.is_dir() and not target.is_relative_to(ROOT / "docs"):
                files |= {path for path in target.rglob("*.py") if "__pycache__" not in path.parts}
    write_pages(sorted(files), ROOT, out)


def stage_api(out: Path) -> None:
    subprocess.run([sys.executable, HERE / "api_pages.py", out / "api"], cwd=ROOT, check=True)


def stage_live_pages(out: Path) -> None:
    """The pages of sd explain and sd arch, and docs/play if it is there."""
    pages = out / "pages"
    pages.mkdir()
    sd = [sys.executable, "-m", "sd"]
    subprocess.run([*sd, "explain", PROMPT, "-s", "1", "-q", "-o", pages / "explain.html"], cwd=ROOT, check=True)
    arch = [
        "arch",
        "-m",
        ROOT / "weights/sd-shapes.ckpt",
        "--source-url",
        "SOURCE",
        "-q",
        "--html",
        pages / "arch.html",
    ]
    subprocess.run([*sd, *arch], cwd=ROOT, check=True)
    made, played = [*pages.iterdir()], (ROOT / "docs/play/index.html").exists()
    if played:
        shutil.copytree(ROOT / "docs/play", out / "docs/play")
        made.append(out / "docs/play/index.html")
    for page in made:
        page.write_text(with_links_of_the_site(page.read_text(encoding="utf-8")), encoding="utf-8")
    (out / "live.md").write_text(LIVE + PLAY * played, encoding="utf-8")


def with_links_of_the_site(text: str) -> str:
    """A page of ours with links to the chapters and the source as they are on the site."""

    def chapter(match: re.Match) -> str:
        way, name = match.groups()
        return f"../{'docs/' * ('docs/' in way)}course/{name.replace('README', 'index')}.html"

    # from build/site/pages/pages, or from docs/play
    text = re.sub(r"((?:\.\./)+docs/|\.\./)course/([\w-]+)\.md", chapter, text)
    return re.sub(r"\bSOURCE/([\w/.]+)", r"../source/\1.html", text)


def navigation() -> list[dict]:
    """The order of the pages, which the tabs above them follow."""
    known = {name for names in GROUPS.values() for name in names}
    groups = [("Course", [page.relative_to(ROOT).as_posix() for page in course_pages()])]
    groups[0][1].extend(
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "docs/course").glob("*.md"))
        if path not in course_pages()
    )
    for title, names in GROUPS.items():
        groups.append((title, [f"docs/{name}.md" for name in names if (ROOT / f"docs/{name}.md").exists()]))
    rest = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in known]
    groups.append(("Contribute", ["CONTRIBUTING.md", "weights/README.md", *rest]))
    return [
        {"Home": "README.md"},
        *({title: pages} for title, pages in groups),
        {"Code": "code.md"},
        {"Live pages": "live.md"},
    ]


def build(staged: Path, out: Path) -> None:
    """Raises SystemExit if a link of a page leads nowhere."""
    from mkdocs.commands.build import build as build_pages
    from mkdocs.config import load_config

    config = load_config(
        str(HERE / "mkdocs.yml"), docs_dir=str(staged), site_dir=str(out), nav=navigation(), strict=True
    )
    build_pages(config)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder for the site; replaced if it exists")
    out = parser.parse_args(arguments).out.resolve()
    try:
        import material  # noqa: F401
        import pdoc  # noqa: F401
    except ImportError:
        print("The site needs mkdocs-material and pdoc. Install them: pip install '.[site]'", file=sys.stderr)
        return 2
    if out.exists() and not (out / "search/search_index.json").exists():
        print(f"{out} exists and is not a site. Give another folder with --out, or remove it.", file=sys.stderr)
        return 2
    staged, made = ROOT / "build/site/pages", ROOT / "build/site/made"
    shutil.rmtree(staged.parent, ignore_errors=True)
    staged.mkdir(parents=True)
    stage_docs(staged)
    stage_source(staged)
    stage_api(staged)
    stage_live_pages(staged)
    build(staged, made)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(made, out)
    print(out / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
