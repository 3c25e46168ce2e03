"""A folder of the diffusers library: JSON that lists the components, and the weights of each.

    model_index.json                        which pipeline it is for, which class each component is of
    unet/config.json                        settings
    unet/diffusion_pytorch_model.safetensors    weights; or .bin, a pickle; or several files and an index of them
    vae/ text_encoder/                      likewise
    scheduler/scheduler_config.json         the noise schedule

One component may also stand alone, in a folder with its config.json and its weights. No class is looked up; the safety
checker, the tokenizer's tables and all other files are not read.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import CheckpointError, CorruptFileError, UnsafeFileError, UnsupportedFileError, shown, shown_list
from convert.families.table import family_of_pipeline
from convert.files.limits import LIMITS, check_limit
from convert.files.records import TensorRecord
from convert.layouts.diffusers_names import COMPONENTS

if TYPE_CHECKING:
    from convert.files.reader import CheckpointFile

INDEX = "model_index.json"
STEMS = {  # of the files of weights
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
SUFFIXES = ("safetensors", "bin")
VARIANTS = ("", ".fp16")  # the first that is there is read


@dataclass(frozen=True, kw_only=True)
class FolderContents:
    files: "list[CheckpointFile]"  # the open files of weights; `StorageRecord.file` counts them
    root: dict[str, TensorRecord]  # `<component>.<name in its file>`
    configs: dict[str, dict]  # by component, "scheduler" included where there is one
    component: str | None = None  # the one that stands alone, if it does


def read_folder(folder: Path, open_file: "Callable[[Path, str], CheckpointFile]") -> FolderContents:
    """Read and check the JSON, open the files of weights.

    open_file  opens one file of weights, given what to call it in errors

    Raises CheckpointError.
    """
    alone = component_alone(folder)
    configs = {alone: read_json(folder / "config.json", "config.json")} if alone else _read_configs(folder)
    files: list = []
    root: dict[str, TensorRecord] = {}
    try:
        for component in [alone] if alone else COMPONENTS:
            place = "" if alone else f"{component}/"
            for name, tensors in _component(folder, place, component, files, open_file):
                _add(root, component, name, tensors)
    except BaseException:
        for file in files:
            file.close()
        raise
    check_limit("tensors", len(root), LIMITS.tensors)
    return FolderContents(files=files, root=root, configs=configs, component=alone)


def component_alone(folder: Path) -> str | None:
    """The component of a folder that holds one component only. Raises CheckpointError for damaged settings."""
    if (folder / INDEX).is_file() or not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json", "config.json")
    stated = config.get("architectures", [config.get("_class_name")])
    return next((component for component, kind in CLASSES.items() if stated == [kind]), None)


def _read_configs(folder: Path) -> dict[str, dict]:
    """The settings of every component of a whole model."""
    index = _read_index(folder)
    configs = {}
    for component in COMPONENTS:
        entry = index.get(component)
        if type(entry) is not list or len(entry) != 2:
            raise UnsupportedFileError(f"has no {component} in its {INDEX}. Use the folder of a complete model")
        if entry[1] != CLASSES[component]:
            raise UnsupportedFileError(
                f"has a {component} of the class {shown(str(entry[1]), 60)}; only {CLASSES[component]} is supported"
            )
        configs[component] = read_json(folder / component / "config.json", f"{component}/config.json")
    if (folder / "scheduler").is_dir():
        name = "scheduler/scheduler_config.json"
        configs["scheduler"] = read_json(folder / name, name)
    return configs


def _read_index(folder: Path) -> dict:
    if not (folder / INDEX).is_file():
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json", "config.json")
            kind = shown(str(config.get("_class_name", "of a class that is not named")), 60)
            raise UnsupportedFileError(
                f"is the folder of one component ({kind}), not of a whole model. Give the folder above it, which has "
                f"a {INDEX}"
            )
        raise UnsupportedFileError(
            f"is a folder without a {INDEX}, so it is not a diffusers model. Give one that has it, or a file"
        )
    index = read_json(folder / INDEX, INDEX)
    pipeline = index.get("_class_name")
    if type(pipeline) is not str:
        raise UnsupportedFileError(f"has a {INDEX} that does not name a pipeline, so it is not a diffusers model")
    family = family_of_pipeline(pipeline)
    if family and not family.config:
        raise UnsupportedFileError(
            f"is a folder for {family.title}: its {INDEX} names {shown(pipeline, 60)}. {family.why_not}"
        )
    return index


def _component(
    folder: Path, place: str, component: str, files: list, open_file: "Callable[[Path, str], CheckpointFile]"
) -> Iterator[tuple[str, dict[str, TensorRecord]]]:
    """The files of weights of a component, opened: what to call each, and its tensors.

    place  where they are in the folder: "vae/", or "" for a component alone
    """
    path = folder / place

    def opened(name: str) -> tuple[str, dict[str, TensorRecord]]:
        called = f"{place}{name}"
        file = open_file(path / name, f"{folder.name}/{called}")
        files.append(file)
        number = len(files) - 1
        root = file.root.get("state_dict", file.root) if type(file.root) is dict else None
        if type(root) is not dict:
            raise UnsupportedFileError(f"holds no dictionary of tensors in {called}")
        return called, {
            key: replace(record, storage=replace(record.storage, file=number))
            for key, record in root.items()
            if type(key) is str and type(record) is TensorRecord
        }

    for variant in VARIANTS:
        for suffix in SUFFIXES:
            for stem in STEMS[component]:
                whole = f"{stem}{variant}.{suffix}"
                indexes = (f"{stem}.{suffix}.index{variant}.json", f"{whole}.index.json")
                if _is_there(path / whole):
                    yield opened(whole)
                    return
                for index in indexes:
                    if _is_there(path / index):
                        yield from _shards(path, place, index, suffix, opened)
                        return
    there = sorted(entry.name for entry in path.iterdir() if entry.name != "config.json")
    wanted = f"{STEMS[component][0]}.safetensors"
    raise UnsupportedFileError(
        f"has no weights of its {component}: {place}{wanted} is not there"
        + (f" ({shown_list(there)} is). " if there else ". ")
        + "Download the folder again, with all its files"
    )


def _shards(
    path: Path, place: str, index: str, suffix: str, opened: Callable[[str], tuple[str, dict[str, TensorRecord]]]
) -> Iterator[tuple[str, dict[str, TensorRecord]]]:
    """Weights in several files: each must be in the file that the index names, and only there."""
    where = f"{place}{index}"
    places = read_json(path / index, where).get("weight_map")
    if type(places) is not dict or not all(type(name) is str for name in places.values()):
        raise UnsupportedFileError(f"has an index of weights that names no files: {where}")
    names = sorted(set(places.values()))
    check_limit("files of one component", len(names), LIMITS.shards)
    for name in names:
        if not _is_plain(name) or not name.endswith(f".{suffix}"):
            raise UnsafeFileError(f"has an index of weights that names a file elsewhere: '{shown(name)}' in {where}")
    for name in names:
        called, tensors = opened(name)
        listed = {key for key, place in places.items() if place == name}
        if lost := sorted(listed - tensors.keys()):
            raise CorruptFileError(f"lacks {shown(lost[0])} in {called}, where {where} says it is")
        if more := sorted(tensors.keys() - listed):
            raise UnsafeFileError(f"has {shown(more[0])} in {called}, where {where} does not say it is")
        yield called, tensors


def _add(root: dict[str, TensorRecord], component: str, called: str, tensors: dict[str, TensorRecord]) -> None:
    for key, record in tensors.items():
        name = f"{component}.{key}"
        if name in root:
            raise UnsafeFileError(f"holds {shown(name)} twice, the second time in {called}")
        root[name] = record


def _is_there(path: Path) -> bool:
    """Whether a path exists, broken links included: a cache whose files were removed gets its own sentence."""
    return path.exists() or path.is_symlink()


def _is_plain(name: str) -> bool:
    """Whether a file's name means a file in the same folder, on every system."""
    return name.isprintable() and not set(name) & set('/\\:*?"<>|') and name.strip(". ") == name.rstrip(". ") != ""


def read_json(path: Path, called: str) -> dict:
    """A JSON object in a small file, with no name twice in it. `called` is what errors call it."""
    if path.exists() and not path.is_file():  # a pipe would block
        raise UnsupportedFileError(f"has a {called} that is not a file. Download the folder again")
    try:
        with open(path, "rb") as file:
            raw = file.read(LIMITS.header_bytes + 1)
    except FileNotFoundError:
        raise UnsupportedFileError(f"has no {called}. Download the folder again, with all its files") from None
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
