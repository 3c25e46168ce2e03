"""A package of npm at a fixed version, for what runs in a browser: fetched once, checked, and kept in the cache.

npm itself is not needed. Where it is installed, its registry is asked, which may be a mirror.
"""

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from convert.files.own_files import make_private
from convert.published.download import download
from sd.app.errors import UsageError
from sd.files import cache_folder, folder_written_whole

REGISTRY = "https://registry.npmjs.org"
SECONDS = 20  # for npm to answer


@dataclass(frozen=True, kw_only=True)
class Package:
    """A version of a package, and the files that are taken from it."""

    name: str
    version: str
    size: int  # bytes of the archive
    sha512: str  # of the archive, in base64, as npm states it
    files: Mapping[str, str]  # name -> its path in the archive

    @property
    def address(self) -> str:
        return f"{registry()}/{self.name}/-/{self.name}-{self.version}.tgz"


def registry() -> str:
    """The address of the registry that npm uses here, or npm's own."""
    npm = shutil.which("npm")
    if npm is None:
        return os.environ.get("NPM_CONFIG_REGISTRY", REGISTRY).rstrip("/")
    try:
        result = subprocess.run([npm, "config", "get", "registry"], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return REGISTRY
    found = result.stdout.strip().rstrip("/")
    return found if result.returncode == 0 and found.startswith(("http://", "https://")) else REGISTRY


def is_fetched(package: Package) -> bool:
    return all((folder_of(package) / name).is_file() for name in package.files)


def folder_of(package: Package) -> Path:
    return cache_folder() / "npm" / f"{package.name}-{package.version}"


def fetched(package: Package, on_bytes: Callable[[int], object] | None = None) -> Path:
    """The folder with the files of a package; they are downloaded if they are not there yet.

    Raises DownloadError without a network; UsageError for an archive that is not the one that was published.
    """
    folder = folder_of(package)
    if is_fetched(package):
        return folder
    make_private(folder.parent)
    archive = folder.with_name(f"{folder.name}.tgz")
    if not archive.is_file():
        download(package.address, archive, size=package.size, on_bytes=on_bytes)
    try:
        check(package, archive)
        with folder_written_whole(folder, force=True) as place, tarfile.open(archive) as tar:
            for name, path in package.files.items():
                with tar.extractfile(path) as source:
                    (place / name).write_bytes(source.read())
    finally:
        archive.unlink(missing_ok=True)
    return folder


def check(package: Package, archive: Path) -> None:
    """Raise UsageError unless the archive is the published one."""
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise UsageError(
            f"{package.name} {package.version} from {registry()} is not the published one: its sha512 is {found}, not "
            f"{package.sha512}. It was deleted; run the command again, or use another registry."
        )
