"""The error that says which setting is wrong, why, and what is allowed."""

import difflib
from collections.abc import Iterable


class SettingError(ValueError):
    """A setting that cannot be: its name, and what is wrong with it and what is allowed."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name} {problem}")
        self.name = name
        self.problem = problem


def nearest(given: str, allowed: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist: the nearest one that does, and all of them."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given.lower(), names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"does not exist.{hint} There are: {', '.join(names)}."
