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
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PLACEHOLDERS = ("index", "seed", "steps", "sampler", "width", "height")  # that a template may name


def picture_paths(out: str, jobs: Sequence[Settings], *, force: bool = False) -> list[Path]:
    """One path for each picture; their folder exists afterwards and can be written to.

    out  a `.png` file, a folder, or a template such as `cat-{seed}.png`; {index} goes on after the largest number there

    Raises UsageError where that cannot be.
    """
    suffix = Path(out).suffix.lower()
    if suffix in OTHER_PICTURES:
        raise UsageError(f"--out {out}: only .png pictures are written, which carry their settings.")
    if Path(out).is_file() and suffix != ".png":
        raise UsageError(f"--out {out} is a file, and no .png. Give a .png file or a folder.")
    if suffix not in ("", ".png") and not out.endswith("/") and not Path(out).is_dir():
        raise UsageError(f"--out {out} is neither a .png nor a folder that exists. For a new folder, write {out}/.")
    template = out if suffix == ".png" else str(Path(out) / Path(DEFAULT_OUT).name)
    if "{" not in out and suffix == ".png" and len(jobs) > 1:
        raise UsageError(
            f"--out {out} names one file, but {len(jobs)} pictures are asked for. "
            f"Give a folder, or a template: {out[:-4]}-{{seed}}.png."
        )
    fields = _fields(template)
    folder = Path(template).parent
    if "{" in str(folder):
        raise UsageError(f"--out {out}: only the file's name can hold {{fields}}, not its folder.")
    _try_folder(folder, sum(job.width * job.height * 3 for job in jobs))
    first = _next_index(folder) if "index" in fields else 1
    paths = [
        Path(template.format(**{"index": first + i, **{name: getattr(job, name) for name in PLACEHOLDERS[1:]}}))
        for i, job in enumerate(jobs)
    ]
    if len(set(paths)) < len(paths):
        raise UsageError(f"--out {out} gives the same name to several pictures. Put {{index}} or {{seed}} into it.")
    for path in paths:
        _require_free(path, force)
    return paths


def grid_path(paths: Sequence[Path], *, force: bool = False) -> Path:
    """Where the sheet with all pictures goes: beside the first of them."""
    path = paths[0].with_name(f"grid-{paths[0].name}")
    _require_free(path, force)
    return path


def _require_free(path: Path, force: bool) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Give another --out.")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already. Give another --out, or --force to replace it.")


def _fields(template: str) -> set[str]:
    """The names in braces. Numbers may be padded, as in {index:05}; more of Python's formats would be a trap."""
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template)]
    except ValueError as error:
        raise UsageError(f"--out {template} is no usable template: {error}.") from None
    fields = [(name, spec, conversion) for name, spec, conversion in parts if name is not None]
    for name, spec, conversion in fields:
        if name not in PLACEHOLDERS:
            raise UsageError(f"--out {template}: {{{name}}} is no field. There are: {', '.join(PLACEHOLDERS)}.")
        if conversion or (spec and (name == "sampler" or not re.fullmatch(r"0?\d{1,2}", spec))):
            raise UsageError(
                f"--out {template}: {{{name}:{spec}}} cannot be used. A number may be padded: {{index:05}}."
            )
    return {name for name, _, _ in fields}


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
