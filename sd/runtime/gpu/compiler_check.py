"""Whether PyTorch's compiler can work here, before minutes are lost; and where it keeps what it has compiled."""

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from sd.files import cache_folder
from sd.pipeline.setting_checks import SettingError

OLDEST_GPU = (7, 0)  # compute capability, below which Triton writes no kernels


def require_compiler(device: torch.device) -> None:
    """Raises SettingError where networks on that device cannot be compiled."""
    problem = problem_of(device)
    if problem:
        raise SettingError("compile", problem)


def problem_of(device: torch.device) -> str | None:
    """What keeps networks on a device from being compiled, to be read behind "compile"; None if nothing is known to."""
    if device.type == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        compiler = os.environ.get("CXX", usual)
        if shutil.which(compiler) is None:
            return (
                f"needs a C++ compiler, and {compiler or 'the one that CXX names'} is not there. Install one, or name "
                "it in the variable CXX, or do without."
            )
    elif device.type == "cuda":
        if find_spec("triton") is None:
            return "needs Triton for a GPU, which is not installed: pip install triton. Or do without."
        named = os.environ.get("CC")
        if not any(map(shutil.which, [named] if named else ["cc", "gcc", "clang"])):
            there = f"{named} is not there" if named else "there is none"
            return f"needs a C compiler for Triton, and {there}. Install one, or name it in CC, or do without."
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_GPU:
            oldest, own = (".".join(map(str, each)) for each in (OLDEST_GPU, capability))
            return f"needs a GPU of compute capability {oldest} or newer, this one has {own}. Do without."
    else:
        return f"is for cpu and cuda, not for {device.type}. Do without."
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "needs the header files of Python, which are not there. Install them (python3-dev), or do without."
    return None


def keep_programs() -> None:
    """Have PyTorch keep what it compiles in the user's cache folder, unless TORCHINDUCTOR_CACHE_DIR names another.

    Its own choice is a folder in /tmp with a name that everybody can guess, and programs that are found there are run.
    Where the user has no folder to write to, it stays with that.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    try:
        folder = cache_folder() / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
