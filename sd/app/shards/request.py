"""What a run in shards is asked to do: which pictures, how they are cut, and which of the shards to make here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from sd.app.jobs.request import JobRequest, Line

TABLES = ("jsonl", "parquet")
PICTURES = ("png", "webp")
DEFAULT_SIZE = 1000


@dataclass(frozen=True, kw_only=True)
class ShardRequest:
    """A run in shards.

    job      what all pictures share, with a seed and without lines; `out` is a folder or a URL
    lines    gives all lines anew at each call; the same ones
    source   the name of their file, for messages
    size     lines in a shard; each has `job.count` pictures
    part     (i, n): make every n-th shard, from the i-th on, counted from 1
    table    "jsonl" or "parquet": the form of the table beside each shard
    picture  "png", as `sd txt2img` writes them, or "webp" with the same pixels
    """

    job: JobRequest
    lines: Callable[[], Iterator[Line]]
    source: str
    size: int = DEFAULT_SIZE
    part: tuple[int, int] = (1, 1)
    table: str = "jsonl"
    picture: str = "png"

    def is_here(self, number: int) -> bool:
        """Whether a shard, counted from 0, is in this part."""
        first, parts = self.part
        return number % parts == first - 1

    def shards(self) -> Iterator[tuple[int, tuple[Line, ...]]]:
        """The shards of all parts: their numbers from 0, and their lines."""
        lines, number = self.lines(), 0
        while shard := tuple(islice(lines, self.size)):
            yield number, shard
            number += 1


def shard_name(number: int) -> str:
    return f"{number:05}"
