"""Errors that say what is wrong with a setting or a picture, and what is allowed."""

import difflib
import math
import reprlib
from collections.abc import Iterable


class SettingError(ValueError):
    """An invalid setting: its name, and a sentence on what is wrong and what is allowed."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name} {problem}")
        self.name = name
        self.problem = problem


class PictureError(ValueError):
    """A picture or mask that cannot be used: what was given, what is allowed, what to do."""


class _Repr(reprlib.Repr):
    def repr_int(self, number: int, level: int) -> str:
        digits = round(number.bit_length() * math.log10(2))
        return repr(number) if digits < 40 else f"a number of about {digits} digits"


shortened = _Repr().repr  # a value of any kind, size and depth, in a few words


def nearest(given: str, allowed: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest existing one, and all of them."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given[:60].lower(), names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"does not exist.{hint} There are: {', '.join(names)}."
