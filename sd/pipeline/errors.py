"""The error that says which setting is wrong, why, and what is allowed."""

import difflib
from collections.abc import Iterable


class SettingError(ValueError):
    """An invalid setting: its name, and a sentence on what is wrong and what is allowed."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name} {problem}")
        self.name = name
        self.problem = problem


def nearest(given: str, allowed: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest existing one, and all of them."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given.lower(), names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"does not exist.{hint} There are: {', '.join(names)}."
