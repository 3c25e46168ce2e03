"""The page of `sd play`: its index.html, with terms and chapters as in `sd explain`."""

from pathlib import Path
from string import Template

from sd import __version__
from sd.study.chapters import CHAPTERS, chapter
from sd.study.explain.page import term

TEMPLATE_FILE = Path(__file__).parent / "web" / "index.html"
TERMS = ("latents", "attention", "timestep", "eps", "x0", "alpha_bar", "sigma", "sampler", "guidance", "dotted")


def index_page(*, course: str | None = None) -> str:
    """The whole page.

    course  where the chapters are, for links: `course`/6-guidance.md. None names them only
    """
    return Template(TEMPLATE_FILE.read_text(encoding="utf-8")).substitute(
        terms="\n".join(term(name, course) for name in TERMS),
        chapters="\n".join(f'<li id="chapter-{number}">{chapter(number, course)}</li>' for number in CHAPTERS),
        hidden=" hidden" if course is None else "",
        version=__version__,
    )
