"""Lines of prompts with choices become several: every combination, or one line drawn for each picture."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sd.app.errors import UsageError
from sd.app.jobs.plan import MOST_PICTURES
from sd.app.jobs.prompt_choices import Parts, Wildcards, all_of, draws, number_of, one_of, parse
from sd.app.jobs.request import Line
from sd.pipeline.settings import PROMPTS


@dataclass(frozen=True)
class Expansion:
    """How lines become several.

    mode    "all": a line for each combination; "random": a line for each picture
    seed    of what is drawn
    shared  settings of every line: choices in its prompts are expanded, too
    count   pictures of each line
    """

    mode: str
    seed: int = 0
    wildcards: Wildcards = field(default_factory=Wildcards)
    shared: Mapping[str, object] = field(default_factory=dict)
    count: int = 1

    @property
    def pictures_of_a_line(self) -> int:
        """Pictures of each line that comes out."""
        return 1 if self.mode == "random" else self.count

    def number_of(self, lines: Sequence[Line]) -> int:
        """How many lines come out, counted without making them."""
        if self.mode == "random":
            return len(lines) * self.count
        return sum(math.prod(map(number_of, self._prompts(line).values())) for line in lines)

    def expanded(self, lines: Sequence[Line]) -> tuple[Line, ...]:
        """What all lines become. Raises UsageError where these are more than a run makes."""
        number = self.number_of(lines)
        if number * self.pictures_of_a_line > MOST_PICTURES:
            raise UsageError(
                f"--choices makes {number * self.pictures_of_a_line} pictures of these prompts; a run makes at most "
                f"{MOST_PICTURES}. Give --choices random, or fewer choices."
            )
        return tuple(each for number, line in enumerate(lines) for each in self.lines_of(line, number))

    def lines_of(self, line: Line, number: int) -> Iterator[Line]:
        """What a line becomes. number: its place among all lines, from 0. Raises UsageError."""
        prompts = self._prompts(line)
        if self.mode == "random":
            for i in range(self.count):
                draw = draws(self.seed, number, i)
                texts = {name: one_of(parts, draw) for name, parts in prompts.items()}
                yield Line({**self._counted_on(line, i), **texts}, line.where)
        else:
            for texts in _all_of_each(list(prompts.values())):
                yield Line({**line.settings, **dict(zip(prompts, texts, strict=True))}, line.where)

    def _prompts(self, line: Line) -> dict[str, Parts]:
        """The parts of each prompt that a line has, or shares with all."""
        texts = {name: {**self.shared, **line.settings}.get(name) for name in PROMPTS}
        try:
            return {name: parse(text, self.wildcards) for name, text in texts.items() if isinstance(text, str) and text}
        except UsageError as error:
            raise UsageError(f"{line.where}{error}") from None

    def _counted_on(self, line: Line, i: int) -> dict[str, object]:
        """The settings of the line's i-th picture, as `Settings.counted_on` makes them."""
        settings = dict(line.settings)
        name = "vary_seed" if {**self.shared, **settings}.get("vary") else "seed"
        if name in settings:
            settings[name] += i
        return settings


def _all_of_each(several: Sequence[Parts]) -> Iterator[tuple[str, ...]]:
    """Every combination of the texts of several prompts; the last one changes first."""
    if not several:
        yield ()
        return
    for first in all_of(several[0]):
        for rest in _all_of_each(several[1:]):
            yield first, *rest
