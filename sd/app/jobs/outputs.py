"""Where pictures go: a file, a folder, or a template for names. Decided and tried before any work."""

import math
import os
import re
import shutil
import string
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.errors import shown
from sd.app.errors import UsageError
from sd.files import name_problem
from sd.pipeline.settings import Settings

DEFAULT_OUT = "outputs/{index:05}-{seed}.png"
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PLACEHOLDERS = ("index", "seed", "steps", "sampler", "width", "height", "vary_seed")  # allowed in a template


@dataclass(frozen=True)
class Names:
    """What pictures are called: a file's name in its folder, with fields such as {seed}."""

    template: str

    @property
    def folder(self) -> Path:
        return Path(self.template).parent

    @property
    def numbered(self) -> bool:
        return "index" in _fields(self.template)

    def path(self, job: Settings, index: int) -> Path:
        values = {name: getattr(job, name) for name in PLACEHOLDERS[1:]}
        values |= {"vary_seed": job.vary_seed or 0, "width": job.size[0], "height": job.size[1]}
        return Path(self.template.format(index=index, **values))

    def index_of(self, path: Path, job: Settings) -> int | None:
        """The inverse of `path`: the number in a name, None if the name does not belong to that picture."""
        pattern = "".join(
            re.escape(literal) + {None: "", "index": r"(\d{1,9})"}.get(name, ".+?")
            for literal, name, _, _ in string.Formatter().parse(Path(self.template).name)
        )
        match = re.fullmatch(pattern, path.name)
        if not match:
            return None
        index = int(match[1]) if match.groups() else 0
        return index if self.path(job, index) == path else None

    def used_numbers(self) -> list[int]:
        """The numbers that names in the folder begin with."""
        return [int(match[0]) for path in self.folder.iterdir() if (match := re.match(r"\d{1,9}(?!\d)", path.name))]


def name_pictures(out: str, jobs: Sequence[Settings]) -> Names:
    """The names for the pictures. Their folder exists afterwards and can be written to.

    out  a `.png` file, a folder, or a template such as `cat-{seed}.png`

    Raises UsageError for a name or folder that cannot be used.
    """
    suffix = Path(out).suffix.lower()
    if suffix in OTHER_PICTURES:
        raise UsageError(f"--out {out}: only .png pictures are written; they carry their settings.")
    if os.path.isfile(out) and suffix != ".png":
        raise UsageError(f"--out {out} is a file, but not a .png. Give a .png file or a folder.")
    if suffix not in ("", ".png") and not out.endswith("/") and not os.path.isdir(out):
        raise UsageError(f"--out {out} is neither a .png nor an existing folder. For a new folder, write {out}/.")
    template = out if suffix == ".png" else str(Path(out) / Path(DEFAULT_OUT).name)
    if "{" not in out and suffix == ".png" and len(jobs) > 1:
        raise UsageError(
            f"--out {out} names one file, but {len(jobs)} pictures are asked for. "
            f"Give a folder, or a template: {out[:-4]}-{{seed}}.png."
        )
    _fields(template)
    names = Names(template)
    if "{" in str(names.folder):
        raise UsageError(f"--out {out}: only the file's name can hold {{fields}}, not its folder.")
    try_folder(names.folder, sum(3 * math.prod(job.size) for job in jobs))
    return names


def picture_paths(
    names: Names, jobs: Sequence[Settings], finished: Mapping[int, Path] | None = None, *, force: bool = False
) -> list[Path]:
    """One path for each picture; {index} counts on from the largest number in the folder.

    finished  pictures of an earlier run, by the number of their job: they keep their names, and the others get those
              that they would have had in that run; None if nobody looked for any

    Raises UsageError where two pictures would get the same name, or the name of an existing file.
    """
    why = ", made with other settings" if finished is not None else ""
    paths = dict(finished or {})
    missing = [i for i in range(len(jobs)) if i not in paths]
    if names.numbered:
        shifts = Counter(names.index_of(path, jobs[i]) - i for i, path in paths.items())
        first = shifts.most_common(1)[0][0] if shifts else 0
        paths |= {i: names.path(jobs[i], first + i) for i in missing}
        if first < 1 or any(os.path.lexists(paths[i]) for i in missing):
            first = max(names.used_numbers(), default=0) + 1
            paths |= {i: names.path(jobs[i], first + nth) for nth, i in enumerate(missing)}
    else:
        paths |= {i: names.path(jobs[i], 1) for i in missing}
    if len(set(paths.values())) < len(paths):
        raise UsageError(
            f"--out {names.template} gives the same name to several pictures. Put {{index}} or {{seed}} into it, or "
            "{vary_seed} for variations."
        )
    for i in missing:
        _require_free(paths[i], force, why)
    return [paths[i] for i in range(len(jobs))]


def grid_path(paths: Sequence[Path], *, force: bool = False) -> Path:
    """Where the sheet with all pictures goes: beside the first one."""
    path = paths[0].with_name(f"grid-{paths[0].name}")
    _require_free(path, force)
    return path


def _require_free(path: Path, force: bool, why: str = "") -> None:
    if found := name_problem(path, force=force, why=why, other="another --out"):
        raise UsageError(f"{path} {found}")


def file_in(out: str, name: str, kinds: Sequence[str], *, force: bool) -> Path:
    """Where a single file such as a page goes: `out`, or this name in a folder. Its folder exists afterwards.

    kinds  the endings that it may have, such as ".html"

    Raises UsageError where nothing can be written there.
    """
    path = Path(out)
    if os.path.isdir(out) or out.endswith("/") or not path.suffix:
        path = path / name
    if path.suffix.lower() not in kinds:
        raise UsageError(f"--out {out} is not a {kinds[0]} file. Give such a name, or a folder.")
    _require_free(path, force)
    try_folder(path.parent)
    return path


def require_free(path: Path | None, kind: str = "", *, flag: str = "--out", force: bool) -> None:
    """Before any work: raise UsageError if a file that a flag names cannot be written. None is no file."""
    if path is None:
        return
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        problem = "is a folder" if os.path.isdir(path) else f"cannot be written: there is no folder {path.parent}"
        raise UsageError(f"{flag} {path} {problem}. Give the name of a file in a folder that exists.")
    if not path.name.lower().endswith(kind):
        raise UsageError(f"{flag} {path} is not a {kind} file. Give such a name.")
    if problem := name_problem(path, force=force):
        raise UsageError(f"{flag} {path} {problem}")


def _fields(template: str) -> set[str]:
    """The names in braces. Numbers may be padded, as in {index:05}; no other format of Python's is allowed."""
    try:
        fields = [parts for _, *parts in string.Formatter().parse(template) if parts[0] is not None]
    except ValueError as error:
        raise UsageError(f"--out {template} is not a usable template: {error}.") from None
    for name, spec, conversion in fields:
        if name not in PLACEHOLDERS:
            raise UsageError(f"--out {template}: {{{name}}} is not a field. There are: {', '.join(PLACEHOLDERS)}.")
        if conversion or (spec and (name == "sampler" or not re.fullmatch(r"0?\d{1,2}", spec))):
            given = f"{{{name}:{spec}}}"
            raise UsageError(f"--out {template}: {given} cannot be used. A number may be padded: {{index:05}}.")
    return {name for name, _, _ in fields}


def try_folder(folder: Path, nbytes: int = 0) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        reason = error.strerror
        if isinstance(error, FileExistsError):
            reason = "it is a file" if os.path.exists(folder) else "it is a link to nothing"
        raise UsageError(
            f"nothing can be written to {shown(str(folder), 500)}: {reason}. Give another --out."
        ) from None
    if free < nbytes:
        raise UsageError(f"{folder} has {free / 1e6:.0f} MB free; the pictures may need {nbytes / 1e6:.0f} MB.")
