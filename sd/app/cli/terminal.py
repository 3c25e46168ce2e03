"""What a run of pictures shows on a terminal: results on stdout, messages and a progress bar on stderr."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sd.app.cli import say
from sd.app.jobs.request import Events


class Terminal(Events):
    """The events of a run as lines and bars. quiet: warnings and results only; as_json: results as JSON objects."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False):
        self.quiet, self.as_json, self.bar = quiet, as_json, None

    def note(self, text: str) -> None:
        say(text, quiet=self.quiet)

    def warn(self, text: str) -> None:
        say(text)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[..., object]]:
        from tqdm import tqdm

        hidden, scaled = bar_hidden(self.quiet), unit == "B"
        with tqdm(desc=name, total=total, unit=unit, unit_scale=scaled, disable=hidden, leave=False) as self.bar:
            yield self.bar.update

    def written(self, event: str, path: Path, **facts: object) -> None:
        if self.bar is not None:
            self.bar.clear()
        if self.as_json:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            print(json.dumps({"event": event, "path": str(path), "sha256": sha256, **facts}), flush=True)
        else:
            print(path, flush=True)


def bar_hidden(quiet: bool) -> bool:
    """Whether progress bars are off: on request, and where stderr is not a terminal."""
    return quiet or not sys.stderr.isatty()
