"""Errors that are the user's to mend; the face that the user sees (`sd.app.cli`) turns them into messages."""

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """Something about a request: what was given, what is allowed, what to do."""


class JobError(Exception):
    """Some pictures could not be made, though nothing about the request is wrong; the rest are done."""


def failure_of(error: Exception) -> str | None:
    """The sentence for a picture that could not be made, though the program did what it should; None for our bugs."""
    if isinstance(error, ArithmeticError) and hasattr(error, "part"):
        return f"{error}, so there is no picture. The weights, or these settings, are at fault."
    if isinstance(error, MemoryError) or ("memory" in str(error).lower() and isinstance(error, RuntimeError)):
        return "there is not enough memory. Try a smaller size, a smaller batch, --low-memory or --tiled-vae."
    return None


@contextmanager
def failures_as(kind: type[Exception], before: str = "") -> Iterator[None]:
    """Inside, a failure that is no bug of ours is raised as this kind of error, with these words before it."""
    try:
        yield
    except Exception as error:
        problem = failure_of(error)
        if problem is None:
            raise
        raise kind(before + problem) from None
