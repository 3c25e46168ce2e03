"""A run of several pictures that was stopped: what it left, and with which seed it began.

Nothing is kept beside the pictures: each has its settings in it, and a file that has its name is complete.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.files.hashing import FileHash
from sd.app.jobs.outputs import Names
from sd.pipeline.settings import FIELDS, OF_THE_RUN, Settings


def same_facts(model: Path, checkpoint: Checkpoint, exact: dict) -> Callable[[dict], bool]:
    """Tells whether a picture was made with the same model, and from the same picture if there is one.

    exact  what a picture of this run notes of the picture that it was made from
    """
    sha256 = FileHash(model)

    def same(stored: dict) -> bool:
        others = {name: value for name, value in stored.items() if name not in FIELDS and name not in OF_THE_RUN}
        made_with = stored.get("model")
        if others != exact or not isinstance(made_with, dict) or made_with.get("weights") != checkpoint.weights:
            return False
        return made_with.get("sha256") == sha256()

    return same


def stored_in(paths: Iterable[Path], names: Names, same: Callable[[dict], bool]) -> Iterator[tuple[Path, Settings]]:
    """Those of the files that a run of this kind may have left, with their settings."""
    from sd.pipeline.image.metadata import read_exact, settings_from

    for path in paths:
        exact = read_exact(path)
        settings = settings_from(exact)
        if settings is not None and names.index_of(path, settings) is not None and same(exact):
            yield path, settings


def pictures_there(names: Names, jobs: Sequence[Settings], same: Callable[[dict], bool]) -> dict[int, Path]:
    """The pictures that an earlier run left, by the number of their job."""
    wanted: dict[Settings, list[int]] = {}
    for i, job in reversed(list(enumerate(jobs))):
        wanted.setdefault(job, []).append(i)
    if names.numbered:
        paths = sorted(names.folder.glob("*.png"), key=lambda path: (len(path.name), path.name))
    else:
        paths = [path for job in jobs if (path := names.path(job, 1)).is_file()]
    there = {}
    for path, settings in stored_in(paths, names, same):
        if wanted.get(settings):
            there[wanted[settings].pop()] = path
    return there


def stopped_seed(names: Names, plan: Callable[[int], Sequence[Settings]], same: Callable[[dict], bool]) -> int | None:
    """The seed that a run of these jobs had drawn which was stopped before it was done; None if there is none.

    plan  from a seed to the jobs of a run with it

    Such a run left the first of its pictures, and not all. Of several, the one that wrote last is meant.
    """
    at_0, at_1 = plan(0), plan(1)
    drawn = [i for i, (one, other) in enumerate(zip(at_0, at_1, strict=True)) if one.seed != other.seed]
    if not drawn:
        return None
    found = {settings: path for path, settings in stored_in(names.folder.glob("*.png"), names, same)}
    first = at_0[drawn[0]]
    newest, seed = 0.0, None
    for settings, path in found.items():
        base = settings.seed - first.seed
        if base < 0 or settings != replace(first, seed=settings.seed):
            continue
        if settings.seed and replace(settings, seed=settings.seed - 1) in found:
            continue  # this is from the middle of a run
        if all(job in found for job in plan(base)):
            continue  # that run is done
        if path.stat().st_mtime > newest:
            newest, seed = path.stat().st_mtime, base
    return seed
