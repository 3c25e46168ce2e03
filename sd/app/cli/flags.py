"""What the commands' flags have in common: one table of spellings, and errors that help."""

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import NoReturn

from convert.checkpoint import Checkpoint
from convert.errors import counted, shown, shown_list
from sd.app.errors import UsageError, complain
from sd.pipeline.settings import DEFAULT_STEPS, nearest
from sd.runtime.embedded import embedded_model
from sd.sampling.names import SAMPLER_INFO, SCHEDULES


class Parser(argparse.ArgumentParser):
    """Says what is wrong in a sentence, with the nearest flag for one that does not exist."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.add_argument("--debug", action="store_true", help="show a traceback where something fails")

    def error(self, message: str) -> NoReturn:
        unrecognized = re.match(r"unrecognized arguments: (.*)", message)
        if unrecognized:
            given = unrecognized[1].split()[0]
            if not given.startswith("-"):
                raise UsageError(
                    f"unexpected word {given!r}. Put what has spaces in it into quotes. See {self.prog} --help."
                )
            near = difflib.get_close_matches(given.partition("=")[0], self._option_string_actions, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            message = f"{given} is not a flag of {self.prog}.{hint}"
        else:
            message = message.rstrip(".") + "."
        raise UsageError(f"{message} See {self.prog} --help.")

    def _check_value(self, action: argparse.Action, value: str) -> None:
        """What argparse does with the choices of a flag, in the words of all other names."""
        if action.choices is not None and value not in action.choices:
            long = [flag for flag in action.option_strings if flag.startswith("--")]
            name = long[0] if long else action.metavar or action.dest
            raise UsageError(f"{name} {value} {nearest(value, action.choices)} See {self.prog} --help.")


def numbers(text: str) -> tuple[float, ...]:
    """ "14.6, 7, 3" as numbers; one comma at the end is allowed."""
    try:
        return tuple(float(part) for part in text.strip().removesuffix(",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 14.6,7,3") from None


def add_schedule_flags(group: argparse._ArgumentGroup) -> None:
    """Which noise levels to visit."""
    add = group.add_argument
    add("--steps", "--ddim_steps", type=int, metavar="N", help=f"1 to 1000 (default: {DEFAULT_STEPS})")
    add("--sampler", "--sampling-method", default="dpmpp_2m", metavar="NAME",
        help=f"{', '.join(SAMPLER_INFO)}, or as other programs say it, such as \"DPM++ 2M Karras\" "
        "(default: dpmpp_2m)")  # fmt: skip
    add("--schedule", metavar="NAME", help=f"which noise levels: {', '.join(SCHEDULES)} (default: the sampler's own)")
    add("--sigmas", type=numbers, default=(), metavar="14.6,7,3,...",
        help="noise levels of your own in place of steps and schedule, falling; a step to 0 is added")  # fmt: skip
    add("--zero-terminal-snr", action="store_true", help="begin at pure noise: for v models that were trained so")


def add_output_flags(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("output")
    group.add_argument("--force", action="store_true", help="replace files that exist already")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bar, only warnings and errors")
    return group


def say(text: str, *, quiet: bool = False) -> None:
    """A message: to stderr, since stdout carries results only."""
    if not quiet:
        complain(text)


def describe_checkpoint(path: Path, checkpoint: Checkpoint, running: str, *, quiet: bool) -> None:
    """What was read from a file, which of its weights were taken, and what was left aside."""
    weights = f"{checkpoint.weights} weights"
    if checkpoint.other_weights:
        weights += f" (--weights {checkpoint.other_weights} takes the others)"
    own = ", the embedded model of drawn shapes (-m FILE takes another)" if path == embedded_model() else ""
    say(f"{shown(path.name)}{own}: {checkpoint.config.family}, {weights}, {running}", quiet=quiet)
    for note in checkpoint.notes:
        say(note, quiet=quiet)
    if checkpoint.unknown:
        number = counted(len(checkpoint.unknown), "tensor")
        say(f"left aside: {number} outside of the model: {shown_list(checkpoint.unknown)}", quiet=quiet)


def bar_hidden(quiet: bool) -> bool:
    """Whether progress bars are off: on demand, and where nobody watches."""
    return quiet or not sys.stderr.isatty()
