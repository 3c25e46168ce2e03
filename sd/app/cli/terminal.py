"""What a run of pictures shows on a terminal: results on stdout, messages and a progress bar on stderr."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli import say
from sd.app.jobs.request import Events

if TYPE_CHECKING:
    from tqdm import tqdm


class Terminal(Events):
    """The events of a run as lines and bars. quiet: warnings and results only; as_json: results as JSON objects."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False):
        self.quiet, self.as_json, self.bar = quiet, as_json, None
        self.results = sys.stdout  # now: an engine takes away what other code prints

    def note(self, text: str) -> None:
        say(text, quiet=self.quiet)

    def warn(self, text: str) -> None:
        say(text)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[..., object]]:
        with progress_bar(name, self.quiet, unit=unit, total=total) as self.bar:
            yield self.bar.update

    def written(self, event: str, path: Path, **facts: object) -> None:
        if self.bar is not None:
            self.bar.clear()
        if self.as_json:
            sha256 = facts.pop("sha256", None) or hashlib.sha256(path.read_bytes()).hexdigest()
            print(
                json.dumps({"event": event, "path": str(path), "sha256": sha256, **facts}),
                file=self.results,
                flush=True,
            )
        else:
            print(path, file=self.results, flush=True)


def progress_bar(name: str, quiet: bool, *, unit: str = "B", **options: object) -> "tqdm":
    """A progress bar, hidden on request and where stderr is not a terminal."""
    from tqdm import tqdm

    hidden = quiet or not sys.stderr.isatty()
    return tqdm(desc=name, unit=unit, unit_scale=unit == "B", disable=hidden, leave=False, **options)


def aligned(rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    """Rows of cells as lines with columns. sides: for each column, < for the left side or > for the right one."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{text:{side}{width}}" for text, side, width in zip(row, sides, widths, strict=True)]
        yield "  ".join(cells).rstrip()
