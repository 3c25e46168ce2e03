"""What there is to say of an embedding: the word, what it is for, and what its training left in the file."""

from dataclasses import dataclass
from pathlib import Path

from convert.adapters.embedding import FAMILIES, read_embedding
from convert.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class WordFacts:
    """An embedding, described."""

    name: str  # in a prompt
    vectors: int  # places that it takes there
    widths: tuple[int, ...]  # numbers of a vector, for each text encoder
    family: str | None  # of the models that it is for; None for widths of no known text encoder
    title: str  # of the family
    inside: str | None  # what the file calls it
    stated: dict[str, object]  # "step", "sd_checkpoint", "sd_checkpoint_name", as far as the file says them


def word_facts(path: Path) -> WordFacts | str:
    """What an embedding is, or why it cannot be read, as the predicate of a sentence."""
    try:
        embedding = read_embedding(path)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path.name} ")
    family = FAMILIES.get(embedding.widths)
    return WordFacts(
        name=embedding.name,
        vectors=embedding.count,
        widths=embedding.widths,
        family=family and family.name,
        title=family.title if family else "unknown",
        inside=embedding.inside,
        stated=dict(embedding.facts),
    )
