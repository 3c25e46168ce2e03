"""Which errors are the user's to mend, and how they are told."""


class UsageError(Exception):
    """Something about the command line: what was given, what is allowed, what to do."""


class JobError(Exception):
    """A picture could not be made, though nothing about the command line is wrong."""


def message_of(error: Exception) -> str | None:
    """The sentence for an error that the user can do something about; None for a fault of ours."""
    from convert.convert import TargetError
    from convert.errors import CheckpointError
    from sd.settings import SettingError

    if isinstance(error, SettingError):
        flag = {"spacing": "schedule"}.get(error.name, error.name.replace("_", "-"))
        return f"--{flag} {error.problem}"
    if isinstance(error, UsageError | JobError | CheckpointError | TargetError):
        return str(error)
    if isinstance(error, OSError):
        if error.filename is not None and error.strerror:
            return f"{error.filename}: {error.strerror}."
        return str(error)
    return None
