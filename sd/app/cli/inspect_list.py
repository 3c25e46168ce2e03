"""`sd inspect` of several files, or of folders of them: a line each."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from convert.actions.inspect import Report
from convert.errors import CheckpointError, UnsafeFileError, UnsupportedFileError, counted, shown, shown_list, size_text
from convert.families.table import TASKS, family_named
from convert.files.reader import open_checkpoint
from sd.app.cli import say
from sd.app.cli.inspect_adapter import adapter_use
from sd.app.cli.inspect_word import word_use
from sd.app.cli.terminal import aligned
from sd.app.jobs.model_folder import is_model_folder, models_in

LONGEST = 100  # characters of a reason
READABLE, UNREADABLE = 0, 2


def expanded(given: Iterable[Path]) -> Iterator[Path]:
    """The files to look at: those that are given, and all models in folders that are not one model themselves."""
    for path in given:
        if not path.is_dir() or is_model_folder(path) or _opens(path):
            yield path
            continue
        others: list[Path] = []
        found = False
        for model in models_in(path, others.append):
            yield model
            found = True
        if not found:
            yield path  # which says what it is not
        elif others:
            say(f"{path}: {counted(len(others), 'other file')} passed over: {shown_list([o.name for o in others])}")


def _opens(folder: Path) -> bool:
    try:
        open_checkpoint(folder).close()
    except UnsafeFileError:
        return True
    except (UnsupportedFileError, OSError):
        return False
    return True


def each(paths: Iterable[Path], look: Callable[[Path], object], broken: Callable[[Path, str], object]) -> int:
    """Look at every file. One that cannot be read is reported, and the rest follow; then the result is UNREADABLE.

    look    may raise CheckpointError or OSError
    broken  called with a file and what is wrong with it, the predicate of a sentence
    """
    count = unreadable = 0
    for path in paths:
        count += 1
        try:
            look(path)
        except (CheckpointError, OSError) as error:
            unreadable += 1
            broken(path, reason(error, path))
    if unreadable:
        say(f"{unreadable} of {counted(count, 'file')} could not be read.")
    return UNREADABLE if unreadable else READABLE


def reason(error: CheckpointError | OSError, path: Path) -> str:
    """The first line of an error, without the name of the file."""
    text = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    for name in (str(path), path.resolve().name, path.name):
        text = text.removeprefix(f"{shown(name)} ").removeprefix(f"{name} ")
    return text


def name_of(path: Path, given: Iterable[Path]) -> str:
    """A file's name as it is listed: from the folder that was given, if one was."""
    for folder in given:
        if folder != path and folder in path.parents:
            return shown(path.relative_to(folder).as_posix() if len(list(given)) == 1 else path.as_posix())
    return shown(str(path))


def row(name: str, report: Report) -> tuple[str, ...]:
    """What a file is and whether it can be used, as cells."""
    kind = "DANGEROUS" if not report.safe else report.kind or "unknown"
    described = report.adapter or report.word
    family = report.family or (described and described.family) or "-"
    pixels = str(report.native_size or "-")
    return name, shown(kind), family, pixels, report.precision or "-", size_text(report.bytes), usable(report)


def broken_row(name: str, path: Path, problem: str) -> tuple[str, ...]:
    size = "-"
    with suppress(OSError):
        size = size_text(path.stat().st_size)
    return name, "unreadable", "-", "-", "-", size, f"no: {shown(problem, LONGEST)}"


def usable(report: Report) -> str:
    """What a file can be used for, or why it cannot."""
    if not report.safe:
        return f"no: it names {shown_list(report.dangerous)}" if report.dangerous else "no: made to mislead a reader"
    if report.adapter:
        use = adapter_use(report.adapter, Path(report.path))
    elif report.word:
        use = word_use(report.word, Path(report.path))
    elif report.tiny_vae:
        use = tiny_vae_use(report.tiny_vae)
    elif report.problem is None:
        family = family_named(report.family)
        use = ", ".join(TASKS[task][0] for task in family.tasks)
    elif report.part:
        use = f"{'--vae, ' if report.part == 'vae' else ''}sd convert --only {report.part}"
    else:
        return f"no: {shown(reason(ValueError(report.problem), Path(report.path)), LONGEST)}"
    return use + (f"; other programs would call {shown_list(report.calls)}" if report.calls else "")


def tiny_vae_use(halves: tuple[str, ...]) -> str:
    """What the halves of a tiny VAE can be used for."""
    if "decoder" not in halves:
        return "no: it is the encoder, and pictures are decoded with the other half, taesd_decoder"
    return "--tiny-vae, the decoder" + ("; the encoder is not used" if "encoder" in halves else "")


def lines(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield from aligned([("file", "kind", "family", "pixels", "precision", "size", "usable for"), *rows], "<<<><><")
