"""Where pictures go: a file, a folder, or a template for names. Decided and tried before any work is done."""

import re
import shutil
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sd.cli.errors import UsageError
from sd.settings import Settings

DEFAULT_OUT = "outputs/{index:05}-{seed}.png"
FIELDS = ("index", "seed", "steps", "sampler", "width", "height")  # that a template may name


def picture_paths(out: str, jobs: Sequence[Settings], *, force: bool = False) -> list[Path]:
    """One path for each picture; their folder exists afterwards and can be written to.

    out  a `.png` file, a folder, or a template such as `cat-{seed}.png`; {index} goes on after the largest number there

    Raises UsageError where that cannot be.
    """
    template = out if out.endswith(".png") else str(Path(out) / Path(DEFAULT_OUT).name)
    if "{" not in out and out.endswith(".png") and len(jobs) > 1:
        raise UsageError(
            f"--out {out} names one file, but {len(jobs)} pictures are asked for. "
            f"Give a folder, or a template: {out.removesuffix('.png')}-{{seed}}.png."
        )
    fields = _fields(template)
    folder = Path(template).parent
    if "{" in str(folder):
        raise UsageError(f"--out {out}: only the file's name can hold {{fields}}, not its folder.")
    _try_folder(folder, sum(job.width * job.height * 3 for job in jobs))
    first = _next_index(folder) if "index" in fields else 1
    paths = [
        Path(template.format(**{"index": first + i, **{name: getattr(job, name) for name in FIELDS[1:]}}))
        for i, job in enumerate(jobs)
    ]
    if len(set(paths)) < len(paths):
        raise UsageError(f"--out {out} gives the same name to several pictures. Put {{index}} or {{seed}} into it.")
    there = [path for path in paths if path.exists()]
    if any(path.is_dir() for path in there):
        raise UsageError(f"--out {there[0]} is a folder. Give a name that is free.")
    if there and not force:
        raise UsageError(f"{there[0]} exists already. Give another --out, or --force to replace it.")
    return paths


def _fields(template: str) -> set[str]:
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        unknown = fields - set(FIELDS)
        if not unknown:
            template.format(**dict.fromkeys(FIELDS, 0))
    except (ValueError, IndexError) as error:
        raise UsageError(f"--out {template} is no usable template: {error}.") from None
    if unknown:
        raise UsageError(f"--out {template}: {{{min(unknown)}}} is no field. There are: {', '.join(FIELDS)}.")
    return fields


def _try_folder(folder: Path, nbytes: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UsageError(f"nothing can be written to {folder}: {error.strerror}. Give another --out.") from None
    if free < nbytes:
        raise UsageError(f"{folder} has {free / 1e6:.0f} MB free; the pictures may need {nbytes / 1e6:.0f} MB.")


def _next_index(folder: Path) -> int:
    numbers = [int(match[0]) for path in folder.iterdir() if (match := re.match(r"\d{1,9}(?!\d)", path.name))]
    return max(numbers, default=0) + 1
