"""Which errors are the user's to mend, and how they are told."""

import sys


def complain(text: str) -> None:
    """Say something on stderr. Control characters, which may come from names of files, do not reach the terminal."""
    from convert.errors import shown

    lines = [shown(line, 2000) for line in text.split("\n")]
    print("sd: " + "\n".join(lines), file=sys.stderr, flush=True)


class UsageError(Exception):
    """Something about the command line: what was given, what is allowed, what to do."""


class JobError(Exception):
    """Some pictures could not be made, though nothing about the command line is wrong; the rest are done."""


def failure_of(error: Exception) -> str | None:
    """The sentence for a picture that could not be made, though the program did what it should; None for our faults."""
    if isinstance(error, ArithmeticError) and hasattr(error, "part"):
        return f"{error}, so there is no picture. The weights, or these settings, are at fault."
    if isinstance(error, MemoryError) or ("memory" in str(error).lower() and isinstance(error, RuntimeError)):
        return "there is not enough memory. Try a smaller size, a smaller batch, --low-memory or --tiled-vae."
    return None


def message_of(error: Exception) -> str | None:
    """The sentence for an error that the user can do something about; None for a fault of ours."""
    from convert.actions.target import TargetError
    from convert.errors import CheckpointError
    from sd.pipeline.image.reading import PictureError
    from sd.pipeline.settings import SettingError

    if isinstance(error, SettingError):
        return f"--{error.name.replace('_', '-')} {error.problem}"
    if isinstance(error, UsageError | JobError | CheckpointError | TargetError | PictureError):
        return str(error)
    if isinstance(error, OSError):
        if error.filename is not None and error.strerror:
            return f"{error.filename}: {error.strerror}."
        return str(error)
    return None
