"""Errors of foreign files, and their text.

Inner readers raise the predicate of a sentence whose subject is the file ("ends after 1.9 of 4.27 GB"). They know
neither the name of the file nor the remedy; `named` adds both where the file was opened.
"""

import unicodedata

SHOWN_CHARACTERS = 200  # of one piece of text that came from the file
SHOWN_NAMES = 8  # of a list of names that came from the file


class CheckpointError(ValueError):
    """A file that cannot be read. Its text is at most three lines, safe to print on a terminal."""

    named = False  # whether the file's name stands in front


class UnsafeFileError(CheckpointError):
    """Names code, uses a forbidden opcode, or has a structure that only a hostile file has.

    names: every name of code that the file holds and that does not belong in a checkpoint ("module.name").
    """

    def __init__(self, message: str, names: tuple[str, ...] = ()):
        super().__init__(message)
        self.names = names


class CorruptFileError(CheckpointError):
    """Damaged: cut off, changed, or a checksum that does not match."""


class UnsupportedFileError(CheckpointError):
    """Another kind of file, compression method or protocol."""


class WeightMismatchError(CheckpointError):
    """The file is sound, but its weights are not the ones asked for: missing, other shape, other dtype, not finite."""


def named(error: CheckpointError, file: str) -> CheckpointError:
    """The same error for the user: with the name of the file in front and the remedy behind."""
    advice = ""
    if isinstance(error, UnsafeFileError):
        advice = "\nNothing in it was run. Get the model from another source, or its .safetensors copy."
    elif isinstance(error, CorruptFileError):
        advice = "\nThe file is damaged or its download was cut off: download it again."
    result = type(error)(f"{shown(file)} {str(error).rstrip('.')}.{advice}")
    result.named = True
    if isinstance(error, UnsafeFileError):
        result.names = error.names
    return result


def shown(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Text from the file, escaped and capped for a terminal.

    Control characters, separators other than the space, bidirectional and other invisible format characters, lone
    surrogates and unassigned code points appear as escapes (\\x1b, \\u202e), which count as they are shown.
    """
    escaped = ""
    for character in text:
        piece = character
        if unicodedata.category(character)[0] in "CZ" and character != " ":
            piece = character.encode("unicode_escape", "surrogatepass").decode("ascii")
        if len(escaped) + len(piece) > limit:
            return f"{escaped}... ({len(text)} characters)"
        escaped += piece
    return escaped


def shown_list(names: list[str] | tuple[str, ...]) -> str:
    """The first few names of a list, escaped, and how many more there are."""
    first = ", ".join(shown(name, 100) for name in names[:SHOWN_NAMES])
    more = len(names) - SHOWN_NAMES
    return f"{first} and {more} more" if more > 0 else first


def joined(words: list[str], last: str = "and") -> str:
    """ "a", "a and b", "a, b and c" """
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def counted(number: int, noun: str) -> str:
    """ "1 weight", "2 weights" """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def part_text(part: int, whole: int) -> str:
    """ "1.9 GB of the 4.27 GB"; in bytes where these look alike: "2,000,100 of the 2,000,200 bytes" """
    few, many = size_text(part), size_text(whole)
    return f"{part:,} of the {whole:,} bytes" if few == many else f"{few} of the {many}"


def size_text(size: int) -> str:
    """A byte count as a reader expects it: 134 bytes, 12.5 kB, 4.27 GB."""
    if size < 10_000:
        return f"{size} byte" if size == 1 else f"{size} bytes"
    for unit, scale in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if size < 1000 * scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"
