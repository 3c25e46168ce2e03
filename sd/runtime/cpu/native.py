"""The project's C++, compiled once per machine and kept in the user's cache folder. It is optional: without a compiler,
PyTorch's own functions are used.
"""

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
from contextlib import suppress
from pathlib import Path

from convert.files.own_files import UntrustedError, open_own, open_trusted_folder
from sd.files import cache_folder

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp"]
SECONDS = 120  # limit for the compiler
CPU_INFO = Path("/proc/cpuinfo")
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
PAIRS = "avx512_bf16"  # products of vectors of bf16
TILES = {"amx_tile", "amx_bf16"}  # of small matrices, which are faster still
ADDRESS, NUMBER = ctypes.c_void_p, ctypes.c_long


def cpu_flags() -> frozenset[str]:
    """The processor's features, by Linux's names; empty on other systems."""
    return _flags_in(CPU_INFO)


@functools.cache
def _flags_in(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def compiler() -> list[str] | None:
    """The command of the C++ compiler, `g++` or the one in CXX; None if there is none."""
    try:
        words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    except ValueError:
        return None
    return words if shutil.which(words[0]) else None


class Kernel:
    """One C++ file in this folder. The result of the first search for it is kept for the life of the process.

    features   the processor features it needs, by the names in `cpu_flags`
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
        self.problem: str | None = None  # why the folder of compiled files was not used, if it was not
        self._found: list[ctypes.CDLL | None] = []
        self._lock = threading.Lock()

    def library(self, on_build: Callable[[], object] = lambda: None) -> ctypes.CDLL | None:
        """The compiled kernel, or None. May be called by several threads at once.

        on_build  called before it is compiled, once per machine
        """
        with self._lock:
            if not self._found:
                self._found.append(self._checked(self._search(on_build)))
            return self._found[0]

    def _search(self, on_build: Callable[[], object]) -> ctypes.CDLL | None:
        try:
            return library(self.source, flags_for(self.features()), on_build)
        except UntrustedError as error:
            self.problem = str(error)
            return None

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
    """Compiler flags for a processor with these features."""
    names = (name.replace("_", "-").replace("avx512-", "avx512") for name in sorted(features))
    return [*FLAGS, *(f"-m{name}" for name in names)]


def library(source: Path, flags: Sequence[str], on_build: Callable[[], object] = lambda: None) -> ctypes.CDLL | None:
    """The compiled source. The file's name depends on the source, the headers beside it, the flags and the compiler.

    on_build  called before it is compiled, which takes a few seconds
    returns   None without a working compiler or a folder to keep the result in, and on systems other than Linux

    Raises UntrustedError if other users could change that folder: then nothing is compiled or loaded.
    """
    command = compiler()
    if command is None or sys.platform != "linux":
        return None
    try:
        parts = [source.read_bytes(), *(header.read_bytes() for header in sorted(source.parent.glob("*.h")))]
        key = hashlib.sha256(repr([parts, shutil.which(command[0]), command, flags]).encode())
        path, stem = cache_folder() / "native", f"{source.stem}-{key.hexdigest()[:16]}"
        folder = open_trusted_folder(path)
        try:
            found = opened(folder, stem)
            if found is None and os.access(path, os.W_OK):
                on_build()
                compiled([*command, *flags], source, path, stem)
                found = opened(folder, stem)
        finally:
            os.close(folder)
        # The open file is loaded, whatever its name stands for by now. It stays open for the life of the process: the
        # system takes two libraries with the same path for one.
        return None if found is None else ctypes.CDLL(f"/proc/self/fd/{found}")
    except UntrustedError:
        raise
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
        return None


def opened(folder: int, stem: str) -> int | None:
    """The descriptor of the compiled file of that name, which ends with its digest.

    Damaged ones could end the process, and links, pipes and what others own or can change could be anything: they go.
    """
    for name in os.listdir(folder):
        if not (name.startswith(f"{stem}-") and name.endswith(".so")):
            continue
        with suppress(UntrustedError):
            file = open_own(name, folder=folder)
            with open(file, "rb", closefd=False) as content:
                if os.fstat(file).st_mode & 0o022 == 0 and name == file_name(stem, content.read()):
                    return file
            os.close(file)
        with suppress(FileNotFoundError, IsADirectoryError):  # removed by another process, or a folder
            os.unlink(name, dir_fd=folder)
    return None


def file_name(stem: str, content: bytes) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def compiled(command: Sequence[str], source: Path, folder: Path, stem: str) -> None:
    """Compile, then move the complete file into place, as other processes may compile the same source meanwhile.

    OpenMP is not linked: its functions are found in the library that PyTorch has loaded, whose threads already exist.
    """
    quiet = {"check": True, "capture_output": True, "stdin": subprocess.DEVNULL, "timeout": SECONDS}
    with tempfile.TemporaryDirectory(prefix=f".{stem}-", dir=folder) as mine:
        parts, whole = Path(mine, "parts.o"), Path(mine, "whole.so")
        subprocess.run([*command, "-c", os.fspath(source), "-o", os.fspath(parts)], **quiet)
        linking = [word for word in command if word != "-fopenmp"]
        subprocess.run([*linking, "-shared", os.fspath(parts), "-o", os.fspath(whole)], **quiet)
        whole.chmod(0o755)
        os.replace(whole, folder / file_name(stem, whole.read_bytes()))
