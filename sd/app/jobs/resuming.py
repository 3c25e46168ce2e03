"""Resuming a run of several pictures that was stopped: which pictures exist, and which seed it had drawn.

Nothing is stored beside the pictures: each carries its settings, and a file that has its name is complete.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from convert.checkpoint import Checkpoint
from convert.files.hashing import FileHash
from sd.app.jobs.outputs import Names
from sd.app.jobs.plan import with_seed_moved
from sd.app.jobs.request import ModelRequest
from sd.pipeline.settings import FIELDS, OF_THE_RUN, Settings


class Noted(Protocol):
    """Files that prompts name, each known by its hash."""

    def noted(self, job: Settings) -> list[dict] | None:
        """What a picture of a job notes of them."""


def same_facts(
    model: ModelRequest, checkpoint: Checkpoint, used: Mapping[str, Noted], exact: dict
) -> Callable[[dict], bool]:
    """A test of whether a picture was made with the same model, words and adapters, and from the same input picture.

    used   "embeddings" and "adapters", as they are here
    exact  what a picture of this run notes of its input picture
    """
    from sd.pipeline.image.metadata import settings_from

    sha256, refiner_sha256 = FileHash(model.file), FileHash(model.refiner) if model.refiner else lambda: None
    vaes = [(path, path and FileHash(path)) for path in (model.vae, model.tiny_vae)]
    said = checkpoint.said
    told = (said.prediction if said.outside else None, list(said.noise) if said.noise else None)

    def same(stored: dict) -> bool:
        others = {name: value for name, value in stored.items() if name not in {*FIELDS, *OF_THE_RUN}}
        made_with = stored.get("model")
        if others != exact or not isinstance(made_with, dict) or made_with.get("weights") != checkpoint.weights:
            return False
        settings = settings_from(stored)
        if settings is None or any(stored.get(name, []) != each.noted(settings) for name, each in used.items()):
            return False
        refiner = stored.get("refiner")
        refined_by = None if settings.switch_at is None else refiner_sha256()
        if (refiner.get("sha256") if isinstance(refiner, dict) else None) != refined_by:
            return False
        noted = [made_with.get(name) for name in ("vae", "tiny_vae")]  # a folder has a name and no hash
        theirs = [vae.get("sha256") or vae.get("name") if isinstance(vae, dict) else None for vae in noted]
        return (
            theirs == [path and (hashed() or path.name) for path, hashed in vaes]
            and (made_with.get("prediction"), made_with.get("noise")) == told
            and made_with.get("sha256") == sha256()
        )

    return same


def stored_in(paths: Iterable[Path], names: Names, same: Callable[[dict], bool]) -> Iterator[tuple[Path, Settings]]:
    """The files that a run of this kind may have left, with their settings."""
    from sd.pipeline.image.metadata import read_exact, settings_from

    for path in paths:
        exact = read_exact(path)
        settings = settings_from(exact)
        if settings is not None and names.index_of(path, settings) is not None and same(exact):
            yield path, settings


def finished_pictures(names: Names, jobs: Sequence[Settings], same: Callable[[dict], bool]) -> dict[int, Path]:
    """The pictures that an earlier run left, by the number of their job."""
    wanted: dict[Settings, list[int]] = {}
    for i, job in reversed(list(enumerate(jobs))):
        wanted.setdefault(job, []).append(i)
    if names.numbered:
        paths = sorted(names.folder.glob("*.png"), key=lambda path: (len(path.name), path.name))
    else:
        paths = [path for job in jobs if (path := names.path(job, 1)).is_file()]
    finished = {}
    for path, settings in stored_in(paths, names, same):
        if wanted.get(settings):
            finished[wanted[settings].pop()] = path
    return finished


def stopped_seed(
    names: Names, jobs: Sequence[Settings], counting: Sequence[bool], same: Callable[[dict], bool]
) -> int | None:
    """By how much larger the seed was of a run of these jobs that was stopped; None if there is none.

    jobs      planned with another seed
    counting  for each of them: whether its seed counts on from the run's

    A stopped run left its first picture, but not all of them. Of several, the one that wrote last is meant.
    """
    if not any(counting):
        return None
    number = counting.index(True)
    first = jobs[number]
    found = {settings: path for path, settings in stored_in(names.folder.glob("*.png"), names, same)}
    newest, moved = 0.0, None
    for settings, path in found.items():
        if settings.seed < number or settings != replace(first, seed=settings.seed):
            continue
        if settings.seed and replace(settings, seed=settings.seed - 1) in found:
            continue  # this is from the middle of a run
        by = settings.seed - first.seed
        if all(job in found for job in with_seed_moved(jobs, counting, by)):
            continue  # that run is complete
        if path.stat().st_mtime > newest:
            newest, moved = path.stat().st_mtime, by
    return moved
