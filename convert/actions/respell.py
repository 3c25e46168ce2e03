"""Write an adapter with the names of another program; its numbers stay as they are."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from convert.actions.target import TargetError
from convert.adapters.adapter import Adapter, Change, is_adapter_folder, open_adapter, read_adapter
from convert.adapters.grouping import WORDS
from convert.adapters.spellings import SPELLINGS
from convert.adapters.stated import IN_METADATA
from convert.adapters.writing import Module, Values, write_adapter
from convert.files.arrays import raw_pieces
from convert.files.reader import CheckpointFile
from convert.files.records import TensorRecord
from convert.layouts.adapter_names import FAMILIES, AdaptedFamily
from sd.files import length_problem, name_problem, remove_leftovers

FOLDER = "peft"  # the spelling that is a folder
NAMES_OF_OLD_BYTES = "sshs_"  # hashes of the source in its metadata
OLD_PARAMETERS = ".*"  # behind the name of an embedding in the layout of the original script


@dataclass(frozen=True, kw_only=True)
class Respelled:
    """The result."""

    adapter: Adapter
    tensors: int  # written


def respell(source: Path, target: Path, spelling: str, *, force: bool = False) -> Respelled:
    """Write an adapter in the spelling "kohya", "diffusers" or "peft".

    source  a file, or a folder that PEFT or diffusers wrote
    target  a .safetensors; for PEFT a folder
    force   replace the target if it exists; of folders, only one with an adapter in it

    Raises CheckpointError for a source; TargetError, FileExistsError or OSError for the target; TargetError for changes
    that the spelling has no names for.
    """
    check_adapter_target([source], target, spelling, force)
    remove_leftovers([target])
    with open_adapter(source) as file:
        adapter = read_adapter(file)
        words = {
            f"{WORDS}{name}.{part}{OLD_PARAMETERS if part == 'string_to_param' else ''}": values_of(file, record)
            for name, parts in adapter.words.items()
            for part, record in parts.items()
        }
        modules = [_module(file, change) for change in adapter.changes]
        metadata = {
            name: text
            for name, text in adapter.metadata.items()
            if name != IN_METADATA and not name.startswith(NAMES_OF_OLD_BYTES)
        }
        tensors = write_adapter(target, modules, family_of(adapter), spelling, metadata, words=words, force=force)
    return Respelled(adapter=adapter, tensors=tensors)


def family_of(adapter: Adapter) -> AdaptedFamily:
    return next(family for family in FAMILIES if family.name == adapter.family)


def check_adapter_target(sources: Iterable[Path], target: Path, spelling: str, force: bool) -> None:
    """Raises TargetError or FileExistsError for a target that cannot or should not be written."""
    if spelling not in SPELLINGS:
        raise TargetError(f"spelling must be one of {', '.join(SPELLINGS)}, got {spelling!r}")
    suffix = target.suffix.lower()
    if spelling != FOLDER and suffix != ".safetensors":
        raise TargetError(f"{target} must end in .safetensors; adapters are written in no other format.")
    if spelling == FOLDER and suffix in (".safetensors", ".bin", ".pt", ".ckpt"):
        raise TargetError(f"{target} has the name of a file, but PEFT's spelling is a folder. Give another name.")
    if problem := length_problem(target):
        raise TargetError(f"{target} {problem}")
    if not target.absolute().parent.is_dir():
        raise TargetError(f"the folder of {target} does not exist. Make it first.")
    for source in sources:
        if source.exists() and target.exists() and source.samefile(target):
            raise TargetError(f"{target} is the source itself, which would be lost. Give another name.")
    if spelling != FOLDER:
        if problem := name_problem(target, force=force):
            raise (FileExistsError if target.is_file() else TargetError)(f"{target} {problem}")
    elif os.path.lexists(target):
        if not is_adapter_folder(target):
            raise TargetError(f"{target} is not a folder with an adapter, so it is not replaced. Give another name.")
        if not force:
            raise FileExistsError(f"{target} exists already. Give another name, or --force to replace it.")


def values_of(file: CheckpointFile, record: TensorRecord) -> Values:
    """A tensor as it is in an open file."""

    def data() -> Iterable[memoryview]:
        file.verify(record)
        return (memoryview(piece).cast("B") for piece in raw_pieces(file, record))

    return Values(record.dtype, record.shape, data)


def _module(file: CheckpointFile, change: Change) -> Module:
    alpha = change.alpha
    if change.rank and change.kind not in ("oft", "boft"):  # what the product is really multiplied with
        exact = alpha is not None and alpha / change.rank == change.scale
        alpha = alpha if exact or (alpha is None and change.scale == 1) else change.scale * change.rank
    return Module(
        target=change.target,
        kind=change.kind,
        parts={part: values_of(file, record) for part, record in change.tensors.items()},
        rank=change.rank,
        alpha=alpha,
        on_input=change.on_input,
    )
