"""The adapters in the user's folders: found by name, by what their training called them, or by hash."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from convert.adapters.adapter import IN_FOLDERS, is_adapter_folder, open_adapter, weights_file
from convert.adapters.hashes import autov3
from convert.errors import CheckpointError, counted, shown
from convert.files.folder_kinds import CHECKPOINTS
from convert.files.hashing import file_sha256
from sd.app.errors import UsageError
from sd.app.jobs.model_folder import folders, in_folders, listed, stem_of
from sd.text.prompt_adapters import from_flag, name_beside, renamed
from sd.text.prompt_syntax import PromptError

ALIAS = "ss_output_name"  # metadata: the name that an adapter was given in training
SHORTEST_HASH, AUTOV3 = 8, 12  # hex digits; of AutoV3, programs write 12 or more
MOST_READ = 10 * 10**9  # bytes, to find an adapter by its hash


def known_adapters() -> dict[str, Path]:
    """Every adapter in the user's folders, by its path from there; a folder that PEFT wrote is one path."""
    found: dict[str, Path] = {}
    for name, path in in_folders("loras").items():
        if path.name in IN_FOLDERS and "/" in name:
            name, path = name.rpartition("/")[0], path.parent
        found.setdefault(name, path)
    return found


def find_adapter(given: str, *, names_only: bool = False) -> Path:
    """The adapter that is meant: a path, a name in the user's folders, or the name that its training gave it.

    names_only  a path is not one: whoever asks may name adapters, and not open files

    Names are whole; endings may be left out, and capitals do not matter. Raises UsageError with the nearest names.
    """
    path = None if names_only else Path(given).expanduser()
    exists = path is not None and (path.is_file() or is_adapter_folder(path))
    if exists and (path.name != given or path.suffix.lower() in CHECKPOINTS):
        return path
    known, wanted = known_adapters(), given.replace("\\", "/").casefold()
    whole = [name for name in known if wanted in (name.casefold(), name.casefold().rpartition("/")[2])]
    stems = [name for name in known if wanted in (stem_of(name), _as_written(name).casefold())]
    found = whole or stems or [name for name, alias in _aliases(known) if alias.casefold() == given.casefold()]
    if len(found) == 1:
        return known[found[0]]
    if found:
        raise UsageError(f"the adapter {shown(given)} could be {listed(found)}. Give more of the name.")
    if exists:
        return path
    raise UsageError(_nowhere(given, path, known))


def _nowhere(given: str, path: Path | None, known: Mapping[str, Path]) -> str:
    if path and path.is_dir():
        return f"the adapter {shown(given)} is a folder without one. Give the file itself."
    names = {stem_of(name): _as_written(name).rpartition("/")[2] for name in known}
    close = difflib.get_close_matches(stem_of(given), names, n=3, cutoff=0.5)
    parts = [stem for stem in names if len(given) > 2 and stem_of(given) in stem]
    near = [names[stem] for stem in dict.fromkeys([*close, *parts])][:3]
    hint = f"Did you mean {' or '.join(map(shown, near))}?" if near else "Give the path of its file, or put it there."
    if ":" in given:
        hint = f"Strengths are numbers: NAME:STRENGTH. {hint}"
    if path is None:  # who may only name adapters need not know where they are
        return f"there is no adapter {shown(given)} here. {hint if near else ''}".rstrip()
    return f"the adapter {shown(given)} does not exist: there is none of that name in {_places()}. {hint}"


def _as_written(name: str) -> str:
    """ "Sub/Detail.safetensors" -> "Sub/Detail" """
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file[: len(stem_of(file))]}"


def _aliases(known: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Of each adapter that has one, the name that its training gave it."""
    for name, path in known.items():
        with suppress(CheckpointError, OSError):
            if alias := _alias(path, weights_file(path).stat().st_mtime_ns):
                yield name, alias


@cache
def _alias(path: Path, changed: int) -> str | None:
    """Only .safetensors have metadata. changed: when the file was, so that it is read again then."""
    if weights_file(path).suffix.lower() != ".safetensors":
        return None
    with open_adapter(path) as file:
        return file.metadata.get(ALIAS)


def has_hash(path: Path, digest: str) -> bool:
    """Whether an adapter has this hash, or one that begins so: of its tensors, or, if it is short, of the whole file.

    Raises OSError.
    """
    of_tensors = autov3(path).startswith(digest)
    return of_tensors or (len(digest) < AUTOV3 and file_sha256(weights_file(path)).startswith(digest))


def find_again(name: str, digest: str | None, on_read: Callable[[str], object]) -> tuple[Path | None, bool]:
    """The adapter that a picture was made with, and whether its hash differs.

    digest   the hash that the picture notes, or its first digits; None: the name alone counts
    on_read  called with a sentence before files are read to know their hashes
    """
    by_name = None
    with suppress(UsageError):
        by_name = find_adapter(name)
    if digest is None:
        return by_name, False
    with suppress(OSError):
        if by_name and has_hash(by_name, digest):
            return by_name, False
    others = [path for path in known_adapters().values() if path != by_name]
    if others:
        on_read(f"looking for the adapter {shown(name)} by its hash in {counted(len(others), 'file')}")
    left = MOST_READ
    for path in others:
        with suppress(OSError, CheckpointError):
            left -= weights_file(path).stat().st_size
            if left > 0 and has_hash(path, digest):
                return path, False
    return by_name, by_name is not None


def noted_adapters(made_with: Mapping[str, object]) -> Iterator[tuple[str, str | None]]:
    """The adapters that a picture notes, and their hashes, or the first digits of these."""
    noted = made_with.get("adapters")
    for entry in noted if isinstance(noted, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            digest = entry.get("autov3")
            usable = isinstance(digest, str) and len(digest) >= SHORTEST_HASH
            yield entry["name"], digest.casefold() if usable else None


def use_again(
    settings: dict, made_with: Mapping[str, object], on_read: Callable[[str], object]
) -> tuple[list[str], list[str]]:
    """Bring the adapters in a picture's settings to what they are called here; those that are not here are taken out.

    on_read  as for `find_again`
    returns  those that are not here, and what else is worth knowing
    """
    hashes = dict(noted_adapters(made_with))
    missing, notes = [], []

    @cache
    def name_here(name: str) -> str | None:
        digest = hashes.get(name) or hashes.get(name_beside(name))
        of = f" ({shown(digest[:AUTOV3])})" if digest else ""
        path, differs = find_again(name, digest, on_read)
        if path is None:
            missing.append(f"the adapter {shown(name)}{of}, which is not in {_places()}")
            return None
        if differs:
            notes.append(f"made with another {shown(name)}{of} than {shown(path.name)} here: expect another picture")
        with suppress(UsageError):
            if find_adapter(name) == path:
                return name
        known = next(known for known, place in known_adapters().items() if place == path)
        here = _as_written(known)
        notes.append(f"the adapter {shown(name)} is called {shown(here)} here, by its hash{of}")
        return here

    with suppress(PromptError):  # refused where the prompt is used
        if "prompt" in settings and not settings.get("plain_prompts"):
            settings["prompt"] = renamed(settings["prompt"], name_here)
    flags = [(flag, name_here(flag.name)) for flag in map(from_flag, settings.get("lora", ()))]
    if flags:
        settings["lora"] = [flag._replace(name=name).as_flag for flag, name in flags if name is not None]
    return missing, notes


def _places() -> str:
    return " or ".join(shown(str(place)) for place in folders("loras")) or "any folder"
