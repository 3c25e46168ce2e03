"""What settings of every kind are checked with, and the error that says what is wrong with one."""

import difflib
from collections.abc import Iterable
from types import UnionType
from typing import get_args, get_origin

from sd.text.prompt_syntax import PromptError, read_weights, timeline


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


def is_of_type(value: object, kind: type) -> bool:
    """A whole number will do where a float is asked for; true and false are no numbers; a list will do for a tuple."""
    if isinstance(kind, UnionType):
        return any(is_of_type(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(is_of_type(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def type_name(kind: type) -> str:
    return kind.__name__ if type(kind) is type else str(kind)


def check_prompt(name: str, prompt: str, steps: int, *, plain: bool = False) -> None:
    """Raises SettingError for a prompt that is no text, or has a weight out of range at one of its steps."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise SettingError(name, "holds bytes that are no UTF-8 text.")
    if "\0" in prompt:
        raise SettingError(name, "holds a NUL character.")
    if plain:
        return
    try:
        for text in dict.fromkeys(timeline(prompt, steps)):
            read_weights(text)
    except PromptError as error:
        raise SettingError(name, str(error)) from None
