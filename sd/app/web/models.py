"""The models that a server can use: the one that it was started with, and those in a folder."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from convert.errors import shown
from convert.files.hashing import file_sha256, remembered, remembered_sha256
from sd.app.errors import UsageError
from sd.app.jobs.model_folder import BESIDE, listed, models_in, stem_of
from sd.app.jobs.request import ModelRequest

HASH = re.compile(r"[0-9a-f]{8,64}")  # a sha256, or its first digits
TITLE = re.compile(r"(.+?) \[([0-9a-f]{8,64})\]")  # as the common web UI writes name and hash


@dataclass(frozen=True)
class Models:
    """Which models a request can name.

    default  how the server was started
    folder   whose files a request can choose among; None: only the default
    """

    default: ModelRequest
    folder: Path | None = None

    def files(self) -> dict[str, Path]:
        """Every file, or folder of one model, by its path from the folder; the default first."""
        found = {self.default.file.name: self.default.file}
        for path in models_in(self.folder) if self.folder else ():
            name = path.relative_to(self.folder).as_posix()
            if name.partition("/")[0] not in BESIDE and not path.samefile(self.default.file):
                found.setdefault(name, path)
        return found

    def request_for(self, path: Path) -> ModelRequest:
        """How a file is loaded: like the default, but for what is said of that file only."""
        if path == self.default.file:
            return self.default
        own = {"weights": "auto", "prediction": "auto", "variant": None, "vae": None, "tiny_vae": None}
        return replace(self.default, file=path, refiner=None, like="", made_with={}, **own)

    def find(self, given: str) -> ModelRequest:
        """The model that a request names: a file's name, with or without ending, its hash, or both as a title.

        A name is never a path: only files of `files` are found. Raises UsageError.
        """
        files = self.files()
        title = TITLE.fullmatch(given)
        name, digest = (title[1], title[2]) if title else (given, given.casefold())
        wanted = name.replace("\\", "/").casefold()
        tests = (
            lambda name: wanted in (name.casefold(), name.casefold().rpartition("/")[2]),
            lambda name: wanted in (stem_of(name), name.casefold().rpartition(".")[0]),
        )
        for test in tests:
            if found := [name for name in files if test(name)]:
                if len(found) == 1:
                    return self.request_for(files[found[0]])
                raise UsageError(f"the model {shown(given)} could be {listed(found)}. Give more of the name.")
        if HASH.fullmatch(digest):
            for path in self._by_hash(digest, files):
                return self.request_for(path)
        if self.folder is None:
            raise UsageError(
                f"this server has one model, {shown(self.default.file.name)}, and not {shown(given)}. To choose among "
                "several, start it with --models FOLDER."
            )
        raise UsageError(f"the model {shown(given)} does not exist. There are: {listed(list(files))}.")

    def _by_hash(self, digest: str, files: dict[str, Path]) -> Iterator[Path]:
        """The file that has this hash: of those whose hash is known first; then the others are read."""
        known = remembered()
        for sha256 in (lambda path: remembered_sha256(path, known), file_sha256):
            for path in files.values():
                with suppress(OSError):
                    if path.is_file() and (sha256(path) or "").startswith(digest):
                        yield path

    def listed(self) -> list[dict[str, object]]:
        """Name, hash if it is known without reading the file, and size in bytes of each."""
        known, rows = remembered(), []
        for name, path in self.files().items():
            with suppress(OSError):
                is_file = path.is_file()
                row = {"name": name, "sha256": remembered_sha256(path, known) if is_file else None}
                rows.append({**row, "bytes": path.stat().st_size if is_file else None})
        return rows
