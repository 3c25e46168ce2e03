"""The weights of a diffusers folder: which of several are taken, and whether the files hold what an index says.

unet/diffusion_pytorch_model.safetensors         the plain ones; or .bin, a pickle
unet/diffusion_pytorch_model.fp16.safetensors    a variant
unet/diffusion_pytorch_model.safetensors.index.json    names the files, where there are several
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import (
    CheckpointError,
    CorruptFileError,
    UnsafeFileError,
    UnsupportedFileError,
    joined,
    named,
    shown,
    shown_list,
)
from convert.files.folder_kinds import entries_of, missing, other_format, read_json
from convert.files.limits import LIMITS, check_limit
from convert.files.records import TensorRecord
from convert.layouts.wrapping import unwrap

if TYPE_CHECKING:
    from convert.files.reader import CheckpointFile

STEMS = {  # of the files of weights
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "tiny_vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
    "depth_estimator": ("model", "pytorch_model"),
}
SUFFIXES = ("safetensors", "bin")
VARIANT = r"[A-Za-z0-9_]{1,40}"
PREFERRED = ("", "fp16", "fp32", "bf16", "ema")  # of several variants, the first that is there


class FolderWeights:
    """Opens the files of weights of one component after the other."""

    def __init__(self, folder: Path, open_file: "Callable[[Path, str], CheckpointFile]", variant: str | None):
        self.folder, self.open_file, self.variant = folder, open_file, variant
        self.files: list[CheckpointFile] = []
        self.root: dict[str, TensorRecord] = {}
        self.variants: dict[str, tuple[str, list[str]]] = {}  # component -> the one that was taken, all that there are

    def read(self, component: str, place: str) -> str | None:
        """Add the tensors of a component; if it has no weights, return a sentence that says so.

        place  where they are in the folder: "vae/", or "" for a component alone
        """
        path = self.folder / place
        there = variants_in(path, component)
        if not there:
            names = [entry.name for entry in entries_of(path) if entry.name != "config.json"]
            wanted = f"{STEMS[component][0]}.safetensors"
            return other_format(path) or (
                f"has no weights of its {component}: {place}{wanted} {missing(path / wanted)}"
                + (f" ({shown_list(names)} {'is' if len(names) == 1 else 'are'}). " if names else ". ")
                + "Download the folder again, with all its files"
            )
        taken = self.variant if self.variant in there else next(iter(there))
        self.variants[component] = taken, list(there)
        name = there[taken]
        for called, tensors in (
            self._shards(component, path, place, name)
            if name.endswith(".json")
            else [self._opened(component, path, place, name)]
        ):
            for key, record in tensors.items():
                if f"{component}.{key}" in self.root:
                    raise UnsafeFileError(f"holds {shown(f'{component}.{key}')} twice, the second time in {called}")
                self.root[f"{component}.{key}"] = record
        return None

    def notes(self) -> Iterator[str]:
        """What was chosen where there was a choice. Raises UnsupportedFileError for a variant that is nowhere."""
        there = {name for _, names in self.variants.values() for name in names}
        if self.variant and self.variant not in there:
            known = f"there are {', '.join(sorted(name or 'plain' for name in there))} ones"
            raise UnsupportedFileError(f"has no {shown(self.variant)} weights; {known}. Leave --variant out")
        by_choice: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for component, (taken, there) in self.variants.items():
            if taken != (self.variant or "") or (len(there) > 1 and not self.variant):
                by_choice.setdefault((taken, tuple(there)), []).append(component)
        for (taken, there), components in by_choice.items():
            others = [name or "plain" for name in there if name != taken]
            beside = f", not the {joined(others, 'or')} ones (--variant chooses)" if others else ", the only ones there"
            yield f"using the {taken or 'plain'} weights of {joined(components)}{beside}"

    def _opened(self, component: str, path: Path, place: str, name: str) -> tuple[str, dict[str, TensorRecord]]:
        """What to call a file, and its tensors."""
        called = f"{place}{name}"
        file = self.open_file(path / name, f"{self.folder.name}/{called}")
        self.files.append(file)
        number = len(self.files) - 1
        try:
            tensors = unwrap(file.root, lambda names: frozenset({component})).tensors
        except CheckpointError as error:
            raise named(error, file.called) from None
        return called, {
            key: replace(record, storage=replace(record.storage, file=number)) for key, record in tensors.items()
        }

    def _shards(
        self, component: str, path: Path, place: str, index: str
    ) -> Iterator[tuple[str, dict[str, TensorRecord]]]:
        """Weights in several files: each must be in the file that the index names, and only there."""
        where = f"{place}{index}"
        places = read_json(path / index, where).get("weight_map")
        if type(places) is not dict or not all(type(name) is str for name in places.values()):
            raise UnsupportedFileError(f"has an index of weights that names no files: {where}")
        names = sorted(set(places.values()))
        check_limit("files of one component", len(names), LIMITS.shards)
        suffix = next(suffix for suffix in SUFFIXES if f".{suffix}." in index)
        for name in names:
            if not _is_plain(name) or not name.endswith(f".{suffix}"):
                raise UnsafeFileError(
                    f"has an index of weights that names a file elsewhere: '{shown(name)}' in {where}"
                )
        for name in names:
            called, tensors = self._opened(component, path, place, name)
            listed = {key for key, place in places.items() if place == name}
            if lost := sorted(listed - tensors.keys()):
                raise CorruptFileError(f"lacks {shown(lost[0])} in {called}, where {where} says it is")
            if more := sorted(tensors.keys() - listed):
                raise UnsafeFileError(f"has {shown(more[0])} in {called}, where {where} does not say it is")
            yield called, tensors


def variants_in(path: Path, component: str) -> dict[str, str]:
    """The variants of a component's weights, the usual one first -> the file to open, which may be an index of files.

    A name is STEM.SUFFIX, or STEM.VARIANT.SUFFIX; the variant of an index stands before or behind its last word.
    """
    found: dict[str, list[tuple[int, int, bool, str]]] = {}
    for name in (entry.name for entry in entries_of(path)):
        for rank, suffix in enumerate(SUFFIXES):
            for order, stem in enumerate(STEMS[component]):
                match = re.fullmatch(rf"{stem}(?:\.({VARIANT}))?\.{suffix}(\.index(?:\.({VARIANT}))?\.json)?", name)
                if match:
                    found.setdefault(match[1] or match[3] or "", []).append((rank, order, bool(match[2]), name))
    order = sorted(found, key=lambda name: (PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), name))
    return {variant: min(found[variant])[-1] for variant in order}


def _is_plain(name: str) -> bool:
    """Whether a file's name means a file in the same folder, on every system."""
    return name.isprintable() and not set(name) & set('/\\:*?"<>|') and name.strip(". ") == name.rstrip(". ") != ""
