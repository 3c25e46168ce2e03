"""What there is to say of an adapter: what it changes and how much, what its training left in the metadata."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from convert.adapters.adapter import Adapter, read_adapter
from convert.adapters.hashes import autov3
from convert.adapters.parts import KINDS
from convert.errors import CheckpointError, counted, shown
from convert.families.family import COMPONENTS
from convert.files.reader import CheckpointFile

MOST_WORDS = 1000  # of the captions in the training
TAGS = "ss_tag_frequency"  # JSON: folder of the training -> word -> in how many captions it was
TRIGGERS = ("modelspec.trigger_phrase", "trained_words", "activation text")
STATED_HASHES = ("sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """An adapter, described. Unknown fields are None or empty."""

    family: str
    title: str  # of the family
    kinds: dict[str, int]  # in words -> modules
    modules: dict[str, int]  # network, in words -> modules that are changed
    ranks: dict[str, int]  # rank -> modules
    alphas: dict[str, int]  # alpha -> modules; "none" where none is stated
    scales: dict[str, int]  # what the product is multiplied with -> modules
    plain: bool  # all programs compute the same at every strength
    dora: int  # modules with a magnitude of their own
    unknown: tuple[str, ...]  # tensors that match no module
    incomplete: tuple[str, ...]  # modules that lack tensors
    words: tuple[str, ...]  # bundled embeddings
    trigger: str | None  # what the author says to write
    captions: dict[str, int]  # words of the training's captions, the most frequent first
    stated: dict[str, str]  # hashes in the metadata
    autov3: str | None  # see `convert.adapters.hashes`
    notes: tuple[str, ...]


def adapter_facts(path: Path, file: CheckpointFile, *, hashed: bool) -> AdapterFacts | str:
    """Describe the adapter in an open file; or why it is none, a sentence whose subject is the file.

    hashed  read the file for its hash
    """
    try:
        adapter = read_adapter(file)
    except CheckpointError as error:
        return str(error)
    changes = adapter.changes
    components = Counter(change.target.partition(".")[0] for change in changes)
    return AdapterFacts(
        family=adapter.family,
        title=adapter.title,
        kinds={KINDS[kind]: count for kind, count in adapter.kinds.items()},
        modules={title: components[name] for name, title in COMPONENTS.items() if components[name]},
        ranks=_counted(change.rank for change in changes if change.rank is not None),
        alphas=_counted(change.alpha for change in changes if change.rank is not None),
        scales=_counted(change.scale for change in changes if change.rank is not None),
        plain=all(change.is_plain for change in changes),
        dora=sum(bool({"dora_scale", "magnitude"} & change.tensors.keys()) for change in changes),
        unknown=adapter.unknown,
        incomplete=adapter.incomplete,
        words=tuple(adapter.words),
        trigger=next((text for name in TRIGGERS if (text := adapter.metadata.get(name, "").strip())), None),
        captions=captions(adapter.metadata),
        stated={name: adapter.metadata[name] for name in STATED_HASHES if name in adapter.metadata},
        autov3=autov3(path) if hashed else None,
        notes=(*_misread_scale(adapter), *adapter.notes),
    )


def captions(metadata: Mapping[str, str]) -> dict[str, int]:
    """How often each word was in the captions of the training, the most frequent first."""
    counts: Counter[str] = Counter()
    try:
        folders = json.loads(metadata.get(TAGS, "{}"))
    except (ValueError, RecursionError):
        return {}
    for words in folders.values() if isinstance(folders, dict) else ():
        for word, count in words.items() if isinstance(words, dict) else ():
            if type(count) is int and word.strip():
                counts[word.strip()] += count
    return dict(counts.most_common(MOST_WORDS))


def _counted(values: Iterable[float | None]) -> dict[str, int]:
    counts = Counter("none" if value is None else f"{value:.6g}" for value in values)
    return dict(counts.most_common())


def _misread_scale(adapter: Adapter) -> tuple[str, ...]:
    """Where a stated alpha is in the metadata only, other programs apply the adapter at another strength."""
    stated = adapter.metadata.get("ss_network_alpha", "").strip()
    without = sum(change.alpha is None and change.rank is not None for change in adapter.changes)
    if not without or stated in ("", "None"):
        return ()
    alpha, modules = shown(stated, 20), counted(without, "module")
    return (f"states the alpha {alpha} in its metadata, but has no alpha tensor for {modules}, whose scale is 1.",)
