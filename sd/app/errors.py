"""Errors that are the user's to mend; the face that the user sees (`sd.app.cli`) turns them into messages."""


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
