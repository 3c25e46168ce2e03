"""Models, LoRAs, embeddings and VAEs by name: what the user's folders hold, and which file a picture was made with."""

import difflib
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from convert.errors import shown, size_text
from convert.files.folder_kinds import CHECKPOINTS, INDEX
from convert.files.hashing import file_sha256, old_hash, remembered, remembered_sha256
from convert.published.known import known_named
from sd.app.errors import UsageError
from sd.files import embedded_model, user_folder

WHOLE_MODELS = (  # what is in the folder of one model: of diffusers, whole or without its index; of the hub's cache
    {INDEX},
    {"unet", "vae", "text_encoder"},
    {"refs", "snapshots"},
)
BESIDE = {"loras", "embeddings", "vae"}  # kinds that have a folder in a models folder, or beside it
MOST_READ = 30 * 10**9  # bytes, to find the model of a picture by its hash
NEAR = 5  # files listed where a name could be any of them
USERS_DATA = {  # variable, and the folder in the home folder without it
    "Darwin": ("XDG_DATA_HOME", "Library/Application Support"),
    "Windows": ("LOCALAPPDATA", "AppData/Local"),
}


def folders(kind: str = "models") -> list[Path]:
    """Where files of a kind are looked for: "models", "loras", "embeddings" or "vae". They may not exist.

    SD_MODELS names one or several models folders, separated as in PATH; the other kinds are in them or beside them.
    """
    roots = [Path(text).expanduser() for text in os.environ.get("SD_MODELS", "").split(os.pathsep) if text]
    if not roots:
        with suppress(RuntimeError):  # without a home folder, there is none
            roots = [user_folder(*USERS_DATA.get(platform.system(), ("XDG_DATA_HOME", ".local/share"))) / "models"]
    return roots if kind == "models" else [place for root in roots for place in (root / kind, root.parent / kind)]


def models_in(folder: Path, others: Callable[[Path], object] = lambda path: None) -> Iterator[Path]:
    """Every file of weights below a folder, in order; a diffusers model is one path, its folder.

    others  called with each other file, and each folder that cannot be read
    """
    seen: set[tuple[int, int]] = set()
    todo = [folder]
    while todo:
        place = todo.pop()
        try:
            state = place.stat()
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError:
            others(place)
            continue
        if (state.st_dev, state.st_ino) in seen:  # behind a link
            continue
        seen.add((state.st_dev, state.st_ino))
        if _is_model({entry.name for entry in entries}):
            yield place
            continue
        inner = []
        for entry in entries:
            if entry.is_dir():
                inner += [] if entry.name.startswith(".") else [Path(entry.path)]
            elif Path(entry.name).suffix.lower() in CHECKPOINTS and not entry.name.startswith("."):
                yield Path(entry.path)
            else:
                others(Path(entry.path))
        todo += reversed(inner)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder is one model, or a component of one, in diffusers' layout."""
    try:
        return _is_model(set(os.listdir(folder)))
    except OSError:
        return False


def _is_model(names: set[str]) -> bool:
    component = "config.json" in names and any(Path(name).suffix in CHECKPOINTS for name in names)
    return component or any(whole <= names for whole in WHOLE_MODELS)


def find(given: Path, kind: str = "models") -> Path:
    """The file or folder that was meant: an existing path, else one of that name in the user's folders.

    A file name, a name without its ending, or a part of one name only; capitals do not matter. Raises UsageError.
    """
    if os.path.lexists(given):
        return given
    known = in_folders(kind)
    wanted = given.as_posix().casefold()
    tests = (
        lambda name: wanted in (name.casefold(), name.casefold().rpartition("/")[2]),
        lambda name: wanted in (stem_of(name), os.path.splitext(name.casefold())[0]),
        lambda name: wanted in stem_of(name),
    )
    for test in tests:
        if found := [name for name in known if test(name)]:
            if len(found) == 1:
                return known[found[0]]
            raise UsageError(f"{shown(str(given))} could be {listed(found)}. Give more of the name.")
    raise UsageError(f"{shown(str(given))} {_nowhere(given, kind, known)}")


def _nowhere(given: Path, kind: str, known: Iterable[str]) -> str:
    """Why a name was not found, and what to do, as the predicate of a sentence."""
    published = [row.file for row in known_named(given.name)] if kind == "models" else []
    if published:
        name = published[0] if len(published) == 1 else "NAME"
        which = "" if len(published) == 1 else f"Published ones of that name: {listed(published)}. "
        return f"is not here. {which}Download it with: sd models get {name}"
    places = " or ".join(shown(str(place)) for place in folders(kind)) or "any folder"
    names = {stem_of(name): name.rpartition("/")[2] for name in known}
    near = [names[stem] for stem in difflib.get_close_matches(stem_of(given.name), names, n=2, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(map(shown, near))}?" if near else ""
    return f"does not exist, and no file of that name is in {places}.{hint or ' Check the path.'}"


def in_folders(kind: str) -> dict[str, Path]:
    """Every file of a kind, by its path from its folder; of two with the same path, that in the first folder."""
    found: dict[str, Path] = {}
    for root in folders(kind):
        for path in models_in(root) if root.is_dir() else ():
            name = path.relative_to(root).as_posix()
            if not (kind == "models" and name.partition("/")[0] in BESIDE):
                found.setdefault(name, path)
    return found


def stem_of(name: str) -> str:
    """ "sub/V1-5.CKPT" -> "v1-5" """
    name = re.split(r"[/\\]", name.casefold())[-1]
    return next((name.removesuffix(suffix) for suffix in CHECKPOINTS if name.endswith(suffix)), name)


def listed(names: list[str]) -> str:
    more = f" or {len(names) - NEAR} others" if len(names) > NEAR else ""
    return " or ".join(shown(name, 100) for name in names[:NEAR]) + more


# The model that a picture was made with


def has_hash(path: Path, made: Mapping, sha256: Callable[[Path], str | None]) -> bool | None:
    """Whether a file has the hash that a picture notes of its model; None where that is not known.

    made    "sha256", whole or its first digits; or "hash", the 8 digits that older tools showed
    sha256  gives the file's, or None
    """
    if not path.is_file():
        return None
    whole, old = made.get("sha256"), made.get("hash")
    if isinstance(whole, str) and len(whole) >= 8:
        digest = sha256(path)
        return None if digest is None else digest.startswith(whole.casefold())
    return old_hash(path) == old.casefold() if isinstance(old, str) and len(old) == 8 else None


def find_again(made: Mapping, on_hash: Callable[[str], object]) -> Path | None:
    """The file that a picture was made with, by the hash that it notes, else by the name; None if there is none.

    made     see `has_hash`; and "name"
    on_hash  called with a sentence before a file is read to know its hash
    """
    stem = stem_of(made["name"]) if isinstance(made.get("name"), str) else None
    candidates = [path for path in [embedded_model(), *in_folders("models").values()] if path.exists()]
    candidates.sort(key=lambda path: stem_of(path.name) != stem)  # the likeliest first

    left, known = MOST_READ, remembered()

    def read(path: Path) -> str | None:
        nonlocal left
        digest = remembered_sha256(path, known)
        if digest is None and left > 0:
            size = path.stat().st_size
            left -= size
            on_hash(f"reading {path.name} ({size_text(size)}): is it the model of the picture?")
            digest = file_sha256(path)
            if left <= 0:
                on_hash("no more files are read; -m NAME chooses one, and sd inspect --hash FILE reads one.")
        return digest

    for sha256 in (lambda path: remembered_sha256(path, known), read):
        for path in candidates:
            with suppress(OSError):
                if has_hash(path, made, sha256):
                    return path
    return next((path for path in candidates if stem_of(path.name) == stem), None)


def difference(made: Mapping, now: Path, sha256: Callable[[], str | None]) -> str | None:
    """What to say where a picture was not made with this file; None where it was, or nothing tells.

    sha256  gives that of the file
    """
    same = has_hash(now, made, lambda path: sha256())
    name = made.get("name")
    if same is None and isinstance(name, str):
        same = stem_of(name) == stem_of(now.name)
    if same or same is None:
        return None
    digest = made.get("sha256") or made.get("hash")
    made_with = shown(str(name)) if isinstance(name, str) else "another model"
    of = f" ({shown(str(digest)[:10])})" if digest else ""
    return f"made with {made_with}{of}, now using {shown(now.name)}: expect another picture"
