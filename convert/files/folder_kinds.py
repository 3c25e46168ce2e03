"""Folders of strangers: what one is, what is in it, and its JSON.

It may be a cache that holds a model elsewhere, or something that only looks like the folder of a model.
"""

import json
from itertools import islice
from pathlib import Path
from shlex import quote

from convert.errors import CheckpointError, CorruptFileError, UnsafeFileError, UnsupportedFileError, shown, shown_list
from convert.files.limits import LIMITS, check_limit

INDEX = "model_index.json"
MOST_ENTRIES = 2000  # of a folder, that are looked at
COMMIT = 200  # bytes of a file that names one
OTHER_FORMATS = {  # how names end -> what wrote them
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".onnx_data": "ONNX",
    "openvino_model.xml": "OpenVINO",
    "openvino_model.bin": "OpenVINO",
    ".mlpackage": "Core ML",
    ".mlmodelc": "Core ML",
    ".gguf": "GGUF",
    ".h5": "TensorFlow",
    ".tflite": "TensorFlow Lite",
    ".pdparams": "PaddlePaddle",
    ".engine": "TensorRT",
    ".plan": "TensorRT",
}
CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def snapshot_of(folder: Path) -> Path:
    """Where the files of a model are: of the Hugging Face Hub's cache, in the snapshot that `main` means.

    Other folders are returned as they are. Raises UnsupportedFileError where it is unclear which snapshot counts.
    """
    snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
    if not snapshots.is_dir() or (folder / INDEX).exists():
        return folder
    names = sorted(entry.name for entry in entries_of(snapshots) if entry.is_dir())
    main = ""
    if (snapshots.parent / "refs/main").is_file():
        with open(snapshots.parent / "refs/main", "rb") as file:
            main = file.read(COMMIT).decode(errors="replace").strip()
    if main in names:
        return snapshots / main
    if len(names) == 1:
        return snapshots / names[0]
    if not names:
        raise UnsupportedFileError("is the cache of a model that has not been downloaded: it has no snapshot")
    raise UnsupportedFileError(
        f"is the cache of a model with {len(names)} snapshots, and names none of them as main. Give one of the folders "
        f"in snapshots: {shown_list(names)}"
    )


def not_a_model(folder: Path) -> str:
    """What a folder without the components of a model is; the predicate of a sentence whose subject is the folder."""
    entries = entries_of(folder)
    for place in (folder, *(entry for entry in entries if entry.is_dir())):
        if (place / "data.pkl").is_file():
            above, name = shown(str(place.resolve().parent), 1000), place.resolve().name
            return (
                f"is an unpacked checkpoint: it holds data.pkl and the folder data. Pack it again, in {above}: "
                f"python -m zipfile -c {shown(quote(f'{name}.ckpt'))} {shown(quote(f'{name}/'))}"
            )
    if cached := [entry.name for entry in entries if entry.name.startswith("models--")]:
        return f"is a cache of models, not one of them. Give one of its folders: {shown_list(cached)}"
    if other := other_format(folder):
        return other
    why = f"is a folder without a {INDEX}, so it is not a diffusers model. "
    if files := [entry.name for entry in entries if entry.name.lower().endswith(CHECKPOINTS) and entry.is_file()]:
        return f"{why}Give one of its files: {shown_list(files)}"
    return f"{why}Give one that has it, or a file"


def other_format(folder: Path) -> str | None:
    """The sentence that names weights of another framework, if a folder or its subfolders hold some."""
    found = {}
    for entry in (*entries_of(folder), *(e for sub in entries_of(folder) if sub.is_dir() for e in entries_of(sub))):
        for ending, program in OTHER_FORMATS.items():
            if entry.name.lower().endswith(ending):
                found.setdefault(program, entry.relative_to(folder).as_posix())
    if not found:
        return None
    (program, place), *_ = found.items()
    return (
        f"holds weights of {' and '.join(found)}, which cannot be read: {shown(place)}. Get the model's .safetensors "
        "files, or have its author's program write them"
    )


def missing(path: Path) -> str:
    """Why a path is not there: "is not there", or the link that leads nowhere."""
    if path.is_symlink():
        return f"is a link to {shown(str(path.readlink()))}, which does not exist"
    return "is not there"


def entries_of(folder: Path) -> list[Path]:
    """What is in a folder, in order; of an endless one the first entries, of an unreadable one none."""
    try:
        return sorted(islice(folder.iterdir(), MOST_ENTRIES))
    except OSError:
        return []


def is_there(path: Path) -> bool:
    """Whether a path exists, broken links included: a cache whose files were removed gets its own sentence."""
    return path.exists() or path.is_symlink()


def read_json(path: Path, called: str) -> dict:
    """A JSON object in a small file, with no name twice in it. `called` is what errors call it."""
    if path.exists() and not path.is_file():  # a pipe would block
        raise UnsupportedFileError(f"has a {called} that is not a file. Download the folder again")
    try:
        with open(path, "rb") as file:
            raw = file.read(LIMITS.header_bytes + 1)
    except FileNotFoundError:
        why = f"has no {called}: it {missing(path)}" if path.is_symlink() else f"has no {called}"
        raise UnsupportedFileError(f"{why}. Download the folder again, with all its files") from None
    except OSError as error:
        raise UnsupportedFileError(f"has a {called} that cannot be opened: {shown(str(error.strerror))}") from None
    check_limit(f"bytes of {called}", len(raw), LIMITS.header_bytes)

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise UnsafeFileError(f"has the same name twice in {called}")
        return dict(pairs)

    try:
        content = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        if raw.startswith(b"version https://git-lfs"):
            raise UnsupportedFileError(f"has a Git LFS pointer for {called}. Download the file itself") from None
        raise CorruptFileError(f"has a {called} that is not JSON") from None
    if type(content) is not dict:
        raise CorruptFileError(f"has a {called} that holds no settings")
    return content
