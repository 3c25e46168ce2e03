"""The UNet as one program for CUDA, compiled by PyTorch for one size of pictures.

Convolutions, linear layers and attention remain NVIDIA's. The gain lies between them: norms, activations, gates, sums
and skips are fused, so that each goes through memory once.

- The whole network is one program. Blocks of v1 have some twenty shapes for each size of pictures, so that programs for
  single blocks would have to be looked up at every call.
- Every size and kind of call has its own program, in which all loop lengths are constants.
- cuDNN tries its convolution algorithms when a size is first met.
- PyTorch's own CUDA graphs are off: they overwrite their result at the next run, while multistep samplers keep
  predictions. `sd.runtime.gpu.cuda_graphs` makes the graphs instead.
- The VAE is not compiled, as it runs once per picture. Nor are networks on a CPU, where that gained nothing.

PyTorch's compiler takes seconds to import, so it is imported only when needed.

B rows, one or with guidance two for each picture; C channels, H W height and width of the latents.
"""

import atexit
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

import torch
from torch import Tensor, nn

from convert.files.own_files import open_trusted_folder
from sd.files import cache_folder
from sd.networks.unet import UNet
from sd.pipeline.errors import SettingError
from sd.runtime.patching import patched
from sd.runtime.seamless import circular
from sd.runtime.shortcuts.shared_halves import computed_once

Forward = Callable[..., Tensor]

OLDEST_GPU = (7, 0)  # compute capability, below which Triton writes no kernels
OPTIONS = {"conv_1x1_as_mm": True}  # the shortcuts of residual blocks are matrix products


def require_compiler(device: torch.device) -> None:
    """Raises SettingError where networks on that device cannot be compiled."""
    problem = problem_of(device)
    if problem:
        raise SettingError("compile", problem)


def problem_of(device: torch.device) -> str | None:
    """Why networks on a device cannot be compiled, as a sentence after "compile"; None if they can, as far as known."""
    if device.type != "cuda":
        return f"is for NVIDIA GPUs; on {device.type}, pictures are made as fast without it. Leave it out."
    if find_spec("triton") is None:
        return "needs Triton, which is not installed: pip install triton. Or leave it out."
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named else ["cc", "gcc", "clang"])):
        there = f"{named} is not there" if named else "there is none"
        return f"needs a C compiler for Triton, and {there}. Install one, or name it in CC, or leave it out."
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        oldest, own = (".".join(map(str, each)) for each in (OLDEST_GPU, capability))
        return f"needs a GPU of compute capability {oldest} or newer, this one has {own}. Leave it out."
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "needs the header files of Python, which are not there. Install them (python3-dev), or leave it out."
    return None


def keep_programs() -> None:
    """Have PyTorch keep compiled programs in the user's cache folder, unless TORCHINDUCTOR_CACHE_DIR names another.

    By default it runs programs from a folder in /tmp with a predictable name, in which another user could put some.
    Without a cache folder that only the user can write to, they are kept in a new folder until the process ends.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    try:
        folder = cache_folder() / "compiled"
        os.close(open_trusted_folder(folder))
    except (OSError, RuntimeError):
        folder = tempfile.mkdtemp(prefix="sd-zoo-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def compiler_for(device: torch.device) -> Callable[[Forward], Forward]:
    """PyTorch's compiler, set to make one program of the whole network or to fail.

    Raises SettingError if something that it needs is missing.
    """
    require_compiler(device)
    keep_programs()
    return lambda function: torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS)


class CompiledUNet:
    """A UNet's programs, without gradients. Weights are inputs of a program, so they may change.

    compiler    turns the network's forward function into one that is compiled when first called
    on_compile  called with the shape (B, C, H, W) of the input before a new program is compiled
    """

    def __init__(
        self,
        unet: UNet,
        compiler: Callable[[Forward], Forward],
        on_compile: Callable[[torch.Size], object] | None = None,
    ):
        self.network, self.compiler, self.on_compile = unet, compiler, on_compile
        self._programs: dict[Hashable, dict[nn.Module, Forward]] = {}

    @contextmanager
    def applied(self, x: Tensor, context: Tensor, *, guided: bool, tile: str) -> Iterator[None]:
        """Within this context, the network runs the program for x (B, C, H, W) and context, both contiguous.

        For guided and tile see `sd.runtime.execution.Execution.predict`. Raises SettingError if PyTorch cannot compile
        the network.
        """
        key = x.shape, x.dtype, x.device, context.shape, guided, tile
        new = key not in self._programs
        if new:
            if self.on_compile:
                self.on_compile(x.shape)
            self._programs[key] = self._program(guided, tile)
        done = False
        try:
            with torch.no_grad(), patched(self._programs[key]), fastest_convolutions():
                yield
            done = True
        except RuntimeError as error:
            if new and is_of_the_compiler(error):
                raise SettingError("compile", f"does not work here: {reason_of(error)}. Leave it out.") from error
            raise
        finally:
            if new and not done:
                del self._programs[key]

    def _program(self, guided: bool, tile: str) -> dict[nn.Module, Forward]:
        """The forward functions for one kind of prediction."""
        unet = self.network
        forwards = circular(unet, tile)
        with patched(forwards):
            forwards |= computed_once(unet) if guided else {}
        try:
            forwards[unet] = self.compiler(
                own_code(lambda *inputs, **named: type(unet).forward(unet, *inputs, **named))
            )
        except RuntimeError as error:  # a version of Python that PyTorch's compiler does not know, for example
            raise SettingError("compile", f"does not work here: {reason_of(error)}. Leave it out.") from error
        return forwards


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Within this context, cuDNN tries its algorithms for each new shape and remembers which is the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def own_code(function: Forward) -> Forward:
    """The same function with its own code object: PyTorch keeps at most eight programs for each."""
    return FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def is_of_the_compiler(error: Exception) -> bool:
    """Whether an error came from compiling, not from running a program."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def reason_of(error: Exception) -> str:
    """The most telling line of the innermost error of PyTorch's compiler."""
    while isinstance(getattr(error, "inner_exception", None), Exception):
        error = error.inner_exception
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    telling = next((line for line in lines if "error:" in line), lines[0])
    return f"{type(error).__name__}: {telling[:200]}".rstrip(".: ")
