"""`sd inspect` of an adapter: what it changes, how to use it, and what its training left in the metadata."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from convert.adapters.facts import AdapterFacts
from convert.errors import counted, shown, shown_list
from convert.families.table import row_named

SHOWN_WORDS = 12
MOST = 5  # ranks, alphas


def adapter_use(facts: AdapterFacts, path: Path) -> str:
    """How an adapter can be used, or why it cannot."""
    row = row_named(facts.family)
    if not row:
        return f"no: {facts.title} models are not supported yet"
    return f"with a {facts.title} model: --lora {shlex.quote(path.stem)}"


def adapter_lines(facts: AdapterFacts) -> Iterator[tuple[str, str]]:
    """Label and text of each line."""
    kinds = ", ".join(f"{kind} ({counted(count, 'module')})" for kind, count in facts.kinds.items())
    dora = f", {counted(facts.dora, 'module')} with a DoRA magnitude" if facts.dora else ""
    yield "adapter", f"for {facts.title}: {kinds or 'no modules'}{dora}"
    if facts.modules:
        yield "changes", ", ".join(f"{counted(count, 'module')} of the {name}" for name, count in facts.modules.items())
    if facts.ranks:
        yield "rank", f"{several(facts.ranks)}, alpha {several(facts.alphas)}: scale {several(facts.scales)}"
    if not facts.plain:
        yield "strength", "programs agree at 1; at others, each computes something else"
    if facts.unknown:
        yield "unknown", f"{counted(len(facts.unknown), 'tensor')} of no module: {shown_list(facts.unknown)}"
    if facts.incomplete:
        yield "incomplete", f"{counted(len(facts.incomplete), 'module')}: {shown_list(facts.incomplete)}"
    if facts.words:
        yield "embeddings", shown_list(facts.words)
    if facts.trigger:
        yield "trigger", shown(facts.trigger)
    if facts.captions:
        words = [f"{shown(word, 60)} ({count})" for word, count in list(facts.captions.items())[:SHOWN_WORDS]]
        more = len(facts.captions) - SHOWN_WORDS
        yield "captions", ", ".join(words) + (f" and {more} more" if more > 0 else "")
    for note in facts.notes:
        yield "note", f"the file {note}"


def hash_lines(facts: AdapterFacts) -> Iterator[tuple[str, str]]:
    yield "AutoV3", f"{facts.autov3[:12]} ({facts.autov3})" if facts.autov3 else "not known yet; --hash computes it"
    for name, stated in facts.stated.items():
        same = ", as computed" if facts.autov3 == stated else ""
        yield "stated", f"{name} = {shown(stated, 70)}{same}"


def several(counts: Mapping[str, int]) -> str:
    """The values, the most frequent first, with how many modules have each if they differ."""
    if len(counts) == 1:
        return next(iter(counts))
    listed = [f"{value} ({count})" for value, count in list(counts.items())[:MOST]]
    more = len(counts) - MOST
    return ", ".join(listed) + (f" and {more} others" if more > 0 else "")
