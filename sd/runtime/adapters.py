"""The adapters of a loaded model: LoRA and its relatives, put on and taken off without a trace.

What they do to a weight is in `sd.runtime.adapted_weights`.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from torch import nn

from convert.adapters.adapter import NETWORKS, Adapter, files_of, open_adapter, read_adapter
from convert.adapters.hashes import autov3
from convert.adapters.values import check_values
from convert.errors import CorruptFileError, joined, shown
from convert.files.reader import CheckpointFile, errors_named
from sd.config import ModelConfig
from sd.pipeline.errors import SettingError, shortened
from sd.pipeline.learning import teach_bundled
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.runtime.adapted_weights import Edit, Edits, WeightChanges
from sd.runtime.learned_words import bundled_words
from sd.runtime.weights import Weights
from sd.text.learned_words import LearnedWord

State = tuple[str, int, int, int]  # of a file: path, size, time of change, inode
Key = tuple[tuple[State, ...], float, float]


class OpenAdapter(NamedTuple):
    """An adapter that was read already, in place of its path."""

    file: CheckpointFile
    adapter: Adapter
    place: Path | None = None  # that was opened; None: the file's path


@dataclass(frozen=True, kw_only=True)
class AppliedAdapter:
    """An adapter in use. Two are equal if their files and strengths are.

    key  the states of its files when they were read, and the strengths
    """

    key: Key
    path: Path = field(compare=False)
    strength: float = field(compare=False)  # in the UNet
    text_strength: float = field(compare=False)  # in the text encoders
    adapter: Adapter = field(compare=False, repr=False)
    words: tuple[LearnedWord, ...] = field(compare=False, repr=False)  # that it brings along
    file: CheckpointFile | None = field(compare=False, repr=False)  # open; None in a copy from a pickle

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def changes(self) -> dict[str, int]:
        """How many modules of each network it changes: {"unet": 192, "text_encoder": 72}."""
        return dict(Counter(change.target.partition(".")[0] for change in self.adapter.changes))

    @property
    def problems(self) -> tuple[str, ...]:
        """What of the file is not applied, one sentence each whose subject is the file."""
        return self.adapter.problems

    def autov3(self) -> str | None:
        """The hash that pictures note; None if the file is gone or another by now.

        Takes a moment for a large file, the first time.
        """
        if any(state_now(state[0]) != state for state in self.key[0]):
            return None
        return autov3(self.path)

    def is_intact(self) -> bool:
        """Whether its bytes are still what was read: none of its files was overwritten in place."""
        for state in self.key[0]:
            now = state_now(state[0])
            replaced = self.file and (now is None or now[-1] != state[-1])  # the open file is still as it was
            if now != state and not replaced:
                return False
        return True

    def opened(self) -> CheckpointFile:
        return self.file or open_adapter(self.path)

    def __getstate__(self) -> dict:
        return {**vars(self), "file": None}


def apply(
    model: StableDiffusion,
    given: Sequence,
    weights: Weights,
    drop_copies: Callable[[Iterable[nn.Module]], None],
) -> None:
    """Use these adapters and no others; for errors and what may be given see `StableDiffusion.apply`.

    weights      the model's
    drop_copies  called with the convolutions whose weights are about to change
    """
    given = listed(given)
    with weights.lock:
        if weights.users:
            raise RuntimeError("adapters cannot change while a picture is being made. Apply them when it is done.")
        adapters = tuple(opened(given, {adapter.key: adapter for adapter in weights.adapters}, model.config))
        networks = {name: network for name in NETWORKS if (network := getattr(model, name))}
        change = WeightChanges(weights, networks, drop_copies)
        try:
            change(edits_of(adapters))
        except BaseException as error:
            if gone := [shown(adapter.name) for adapter in weights.adapters if not adapter.is_intact()]:
                change({})
                weights.adapters = ()
                teach_bundled(model, [])
                told = f"{error} All adapters are off now: {joined(gone)} cannot be applied again"
                raise CorruptFileError(f"{told}, since its file was overwritten.") from error
            change(edits_of(weights.adapters))
            raise
        weights.adapters = adapters
        teach_bundled(model, [word for adapter in adapters for word in adapter.words])


def listed(given: Sequence) -> list[tuple]:
    """What is given, one by one: what it is, and its strengths, checked. Raises SettingError."""
    if isinstance(given, str | bytes | os.PathLike | OpenAdapter | Mapping) or not isinstance(given, Iterable):
        raise SettingError("adapters", f"must be a list, each a path or (path, strength); got {shortened(given)}.")
    rows = []
    for each in given:
        row = tuple(each) if isinstance(each, tuple | list) and not isinstance(each, OpenAdapter) else (each,)
        what, *strengths = row or (None,)
        if isinstance(what, AppliedAdapter) and not strengths:
            strengths = [what.strength, what.text_strength]
        if not isinstance(what, str | os.PathLike | OpenAdapter | AppliedAdapter) or len(strengths) > 2:
            raise SettingError(
                "adapters",
                "must each be a path, (path, strength) or (path, strength, strength in the text encoder); "
                f"got {shortened(each)}.",
            )
        for strength in strengths:
            if isinstance(strength, bool) or not isinstance(strength, Real) or not abs(strength) <= sys.float_info.max:
                raise SettingError("adapters", f"need finite numbers as strengths, got {shortened(strength)}.")
        rows.append((what, float(strengths[0]), float(strengths[-1])) if strengths else (what, 1.0, 1.0))
    return rows


def opened(
    given: Iterable[tuple], before: Mapping[Key, AppliedAdapter], config: ModelConfig
) -> Iterator[AppliedAdapter]:
    """Open, read and check adapters; those in use are open already."""
    for what, *strengths in given:
        if isinstance(what, AppliedAdapter):
            if (key := (what.key[0], *strengths)) in before and what.is_intact():
                yield before[key]
                continue
            what = what.path
        key = (states_of(what), *strengths)
        if known := before.get(key):
            yield replace(known, adapter=what.adapter) if isinstance(what, OpenAdapter) else known  # by its name now
            continue
        file = what.file.kept() if isinstance(what, OpenAdapter) else open_adapter(what)
        with errors_named(file):
            adapter = what.adapter if isinstance(what, OpenAdapter) else read_adapter(file, config)
            check_values(file, adapter)
            words = tuple(bundled_words(file, adapter.words, config))
        yield AppliedAdapter(
            key=key,
            path=place_of(what).resolve(),
            strength=strengths[0],
            text_strength=strengths[1],
            adapter=adapter,
            words=words,
            file=file,
        )


def states_of(what: str | os.PathLike | OpenAdapter) -> tuple[State, ...]:
    """The states of all files of an adapter; () for a path where there is none."""
    return tuple(state for file in files_of(place_of(what)) if (state := state_now(file)))


def place_of(what: str | os.PathLike | OpenAdapter) -> Path:
    return what.place or what.file.path if isinstance(what, OpenAdapter) else Path(what)


def state_now(path: str | os.PathLike) -> State | None:
    try:
        path = os.path.realpath(path)
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return path, state.st_size, state.st_mtime_ns, state.st_ino


def edits_of(adapters: Iterable[AppliedAdapter]) -> dict[str, Edits]:
    """What adapters do to each parameter, always in one order: in another, sums could differ in their last bit."""
    edits: dict[str, Edits] = {}
    for adapter in sorted(adapters, key=lambda adapter: adapter.key):
        for change in adapter.adapter.changes:
            strength = adapter.strength if change.target.startswith("unet.") else adapter.text_strength
            for leaf in {"bias" if part == "bias" else "weight" for part in change.tensors} if strength else ():
                name = f"{change.target}.{leaf}"
                edits[name] = (*edits.get(name, ()), Edit(adapter, change, strength))
    return edits
