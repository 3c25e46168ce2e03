"""`sd inspect` of an embedding: how a prompt uses it, and what its training left in the file."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from convert.adapters.word_facts import WordFacts
from convert.errors import counted, joined, shown
from convert.families.table import row_named


def word_use(facts: WordFacts, path: Path) -> str:
    """How an embedding can be used, or why it cannot."""
    if facts.family is None:
        return f"no: vectors of {numbers(facts)} fit no known text encoder"
    row = row_named(facts.family)
    if not row:
        return f"no: {facts.title} models are not supported yet"
    return f"with a {facts.title} model: {shown(facts.name)} in a prompt, --embeddings {shlex.quote(path.name)}"


def word_lines(facts: WordFacts, sha256: str | None) -> Iterator[tuple[str, str]]:
    """Label and text of each line."""
    yield "word", f"{shown(facts.name)}: {counted(facts.vectors, 'vector')} of {numbers(facts)}"
    stated = facts.stated
    steps = [counted(stated["step"], "step")] if isinstance(stated.get("step"), int) else []
    model = stated.get("sd_checkpoint_name") or stated.get("sd_checkpoint")
    if steps or model:
        yield "trained", " ".join([*steps, *([f"on {shown(str(model), 100)}"] if model else [])])
    if facts.inside and facts.inside != facts.name:
        yield "name inside", f"{shown(facts.inside)}; prompts use the name of the file"
    if sha256:
        yield "in pictures", f"TI hashes: {shown(facts.name)}: {sha256[:12]}"


def numbers(facts: WordFacts) -> str:
    return f"{joined([str(width) for width in facts.widths])} numbers"
