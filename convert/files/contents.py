"""The result of reading a container."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Contents:
    container: str
    root: object  # plain data with the leaves described in records.py
    metadata: dict[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
