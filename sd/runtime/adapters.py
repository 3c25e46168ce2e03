"""The adapters of a loaded model: LoRA and its relatives, put on and taken off without a trace.

What they do to a weight is in `sd.runtime.adapted_weights`.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from torch import nn

from convert.adapters.adapter import Adapter, open_adapter, read_adapter, weights_file
from convert.adapters.hashes import autov3
from convert.adapters.values import check_values
from convert.files.reader import CheckpointFile, errors_named
from sd.config import ModelConfig
from sd.pipeline.errors import SettingError, shortened
from sd.pipeline.learning import teach_bundled
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.runtime.adapted_weights import Edit, Edits, WeightChanges
from sd.runtime.learned_words import bundled_words
from sd.runtime.weights import Weights
from sd.text.learned_words import LearnedWord

Key = tuple[str, tuple[int, ...], float, float]


class OpenAdapter(NamedTuple):
    """An adapter that was read already, in place of its path."""

    file: CheckpointFile
    adapter: Adapter


@dataclass(frozen=True, kw_only=True)
class AppliedAdapter:
    """An adapter in use. Two are equal if their files and strengths are."""

    key: Key
    path: Path = field(compare=False)
    strength: float = field(compare=False)  # in the UNet
    text_strength: float = field(compare=False)  # in the text encoder
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

    def autov3(self) -> str:
        """The hash that pictures note; takes a moment for a large file, the first time."""
        return autov3(self.path)

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
    with weights.lock:
        if weights.users:
            raise RuntimeError("adapters cannot change while a picture is being made. Apply them when it is done.")
        adapters = tuple(opened(given, {adapter.key: adapter for adapter in weights.adapters}, model.config))
        change = WeightChanges(weights, {"text_encoder": model.text_encoder, "unet": model.unet}, drop_copies)
        try:
            change(edits_of(adapters))
        except BaseException:
            change(edits_of(weights.adapters))
            raise
        weights.adapters = adapters
        teach_bundled(model, [word for adapter in adapters for word in adapter.words])


def opened(given: Sequence, before: Mapping[Key, AppliedAdapter], config: ModelConfig) -> Iterator[AppliedAdapter]:
    """Open, read and check adapters; those in use are open already."""
    if isinstance(given, str | os.PathLike | OpenAdapter) or not isinstance(given, Iterable):
        raise SettingError("adapters", f"must be a list, each a path or (path, strength); got {shortened(given)}.")
    for each in given:
        what, *strengths = each if isinstance(each, tuple | list) and not isinstance(each, OpenAdapter) else (each,)
        if not isinstance(what, str | os.PathLike | OpenAdapter) or len(strengths) > 2:
            raise SettingError(
                "adapters",
                "must each be a path, (path, strength) or (path, strength, strength in the text encoder); "
                f"got {shortened(each)}.",
            )
        for strength in strengths:
            if isinstance(strength, bool) or not isinstance(strength, Real) or not math.isfinite(strength):
                raise SettingError("adapters", f"need finite numbers as strengths, got {shortened(strength)}.")
        strength, text_strength = (strengths[0], strengths[-1]) if strengths else (1.0, 1.0)
        path = what.file.path if isinstance(what, OpenAdapter) else weights_file(Path(what))
        if path.is_file() and (known := before.get(key_of(path, strength, text_strength))):
            yield known
            continue
        file = what.file.kept() if isinstance(what, OpenAdapter) else open_adapter(what)
        with errors_named(file):
            adapter = what.adapter if isinstance(what, OpenAdapter) else read_adapter(file, config)
            check_values(file, adapter)
            words = tuple(bundled_words(file, adapter.words, config))
        yield AppliedAdapter(
            key=key_of(path, strength, text_strength),
            path=path.resolve(),
            strength=float(strength),
            text_strength=float(text_strength),
            adapter=adapter,
            words=words,
            file=file,
        )


def key_of(path: Path, strength: float, text_strength: float) -> Key:
    state = path.stat()
    return str(path.resolve()), (state.st_size, state.st_mtime_ns, state.st_ino), float(strength), float(text_strength)


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
