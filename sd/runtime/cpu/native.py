"""C++ of ours, compiled once on a machine and kept in the user's cache folder; nothing where that cannot be done."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from sd.files import cache_folder

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp"]
SECONDS = 120  # that a compiler may take
CPU_INFO = Path("/proc/cpuinfo")
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
PAIRS = "avx512_bf16"  # products of vectors of bf16
TILES = {"amx_tile", "amx_bf16"}  # of small matrices, which are faster still
ADDRESS, NUMBER = ctypes.c_void_p, ctypes.c_long


def cpu_flags() -> frozenset[str]:
    """What the processor can do, as Linux calls it; empty on other systems."""
    return _flags_in(CPU_INFO)


@functools.cache
def _flags_in(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def compiler() -> list[str] | None:
    """The C++ compiler, `g++` or what CXX names, as the first words of a command; None where there is none."""
    try:
        words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    except ValueError:
        return None
    return words if shutil.which(words[0]) else None


class Kernel:
    """One source of ours in this folder. What is found when it is first needed stays for this process.

    features   what the processor must have, named as in `cpu_flags`, when it is looked for
    functions  by name: the types of their arguments, and of the result
    usable     asks the library whether it may be used
    """

    def __init__(
        self,
        name: str,
        features: Callable[[], Iterable[str]],
        functions: Callable[[], Mapping[str, tuple[list, type | None]]],
        usable: Callable[[ctypes.CDLL], object] = lambda code: True,
    ):
        self.source = Path(__file__).with_name(f"{name}.cpp")
        self.features, self.functions, self.usable = features, functions, usable
        self._found: list[ctypes.CDLL | None] = []
        self._lock = threading.Lock()

    def library(self, on_build: Callable[[], object] = lambda: None, *, build: bool = True) -> ctypes.CDLL | None:
        """The compiled kernel, or None; also when several threads ask at a time.

        on_build  called before it is compiled, which is done once on a machine
        build     False: only if it was compiled before
        """
        with self._lock:
            if not self._found:
                code = library(self.source, flags_for(self.features()), on_build, build=build)
                if code is None and not build:
                    return None
                self._found.append(self._checked(code))
            return self._found[0]

    def _checked(self, code: ctypes.CDLL | None) -> ctypes.CDLL | None:
        if code is None or not self.usable(code):
            return None
        try:
            for name, (arguments, result) in self.functions().items():
                function = getattr(code, name)
                function.argtypes, function.restype = arguments, result
        except AttributeError:
            return None
        return code


def flags_for(features: Iterable[str]) -> list[str]:
    """The compiler's, for a processor that has these features."""
    names = (name.replace("_", "-").replace("avx512-", "avx512") for name in sorted(features))
    return [*FLAGS, *(f"-m{name}" for name in names)]


def library(
    source: Path, flags: Sequence[str], on_build: Callable[[], object] = lambda: None, *, build: bool = True
) -> ctypes.CDLL | None:
    """The compiled source. Another source, other flags, headers beside it or compiler make another file.

    on_build  called before it is compiled, which takes a few seconds
    build     False: only if it was compiled before
    returns   None where there is no compiler or it fails, where nothing can be kept, and on systems that are not Linux
    """
    command = compiler()
    if command is None or sys.platform != "linux":
        return None
    try:
        parts = [source.read_bytes(), *(header.read_bytes() for header in sorted(source.parent.glob("*.h")))]
        key = hashlib.sha256(repr([parts, shutil.which(command[0]), command, flags]).encode())
        folder, stem = cache_folder() / "native", f"{source.stem}-{key.hexdigest()[:16]}"
        if build:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_own(folder):
            return None
        path = whole_file(folder, stem)
        if path is None and build and os.access(folder, os.W_OK):
            on_build()
            path = compiled([*command, *flags], source, folder, stem)
        return None if path is None else ctypes.CDLL(os.fspath(path))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
        return None


def is_own(folder: Path) -> bool:
    """Whether nobody but this user can write to a folder, so that what is in it may be run."""
    state = folder.stat()
    return state.st_uid == os.geteuid() and not state.st_mode & 0o022


def whole_file(folder: Path, stem: str) -> Path | None:
    """The compiled file of that name, which ends with its digest. Damaged ones, which could end the process, go."""
    for path in folder.glob(f"{stem}-*.so"):
        if path.name == file_name(stem, path.read_bytes()):
            return path
        path.unlink(missing_ok=True)
    return None


def file_name(stem: str, content: bytes) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def compiled(command: Sequence[str], source: Path, folder: Path, stem: str) -> Path:
    """The file, once it is complete: processes may compile the same at the same time.

    OpenMP is not linked: its functions are found in the library that PyTorch has loaded, whose threads wait already.
    """
    quiet = {"check": True, "capture_output": True, "stdin": subprocess.DEVNULL, "timeout": SECONDS}
    with tempfile.TemporaryDirectory(prefix=f".{stem}-", dir=folder) as mine:
        parts, whole = Path(mine, "parts.o"), Path(mine, "whole.so")
        subprocess.run([*command, "-c", os.fspath(source), "-o", os.fspath(parts)], **quiet)
        linking = [word for word in command if word != "-fopenmp"]
        subprocess.run([*linking, "-shared", os.fspath(parts), "-o", os.fspath(whole)], **quiet)
        path = folder / file_name(stem, whole.read_bytes())
        os.replace(whole, path)
    return path
