"""Where the course is, for links from pages that are written."""

from os.path import relpath
from pathlib import Path

ROOT = Path(__file__).parents[3]  # of the checkout, if this is one


def course_beside(path: Path) -> str | None:
    """The course, relative to a page in this checkout. Elsewhere None: a link would break or tell folder names."""
    if not (ROOT / "docs/course").is_dir() or ROOT not in path.resolve().parents:
        return None
    return Path(relpath(ROOT / "docs/course", path.resolve().parent)).as_posix()
