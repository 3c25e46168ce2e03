"""The UNet as one compiled program, which PyTorch writes for one size of pictures.

Convolutions, linear layers and attention stay the libraries' own. What is gained lies between them: norms, activations,
gates, sums and joined skips become loops that go through memory once, where each would go through it by itself.

- The whole network is one program. Programs for single blocks would be smaller, and equal blocks would share one; but
  the blocks of v1 have some twenty shapes for each size of pictures, and each call of a block would look for its own.
- On the CPU, convolutions are computed as without a compiler (`Execution.convolutions`). PyTorch's compiler can lay out
  weights itself, with "frozen" weights: they become part of the program, which then has a copy of them for each size
  and does not see when they change. And PyTorch 2.13 leaves such programs out of its cache on the disk: every process
  would compile anew.
- Every size and kind of call has a program of its own, so that all lengths of loops are known when it is written.
- On CUDA, convolutions, linear layers and attention are those of NVIDIA's libraries; of cuDNN's convolutions, the
  fastest is found by trying when a size is first met. PyTorch's compiler can try kernels of its own for them, too
  ("max-autotune"), for minutes; `AUTOTUNED` has these options, which only the benchmark uses.
- PyTorch's own CUDA graphs are off. Such a graph leaves its result where its next run leaves it again, while samplers
  with a memory keep predictions; so `sd.runtime.gpu.cuda_graphs` makes them.
- The VAE is not compiled: it runs once a picture, which a program for each size would hardly pay for.

PyTorch's compiler takes seconds to import, so nothing here does that before it is needed.

B rows, one or with guidance two for each picture; C channels, H W height and width of the latents.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.networks.unet import UNet
from sd.pipeline.setting_checks import SettingError
from sd.runtime.cpu.attention import attending
from sd.runtime.cpu.gates import joining
from sd.runtime.gpu.compiled_layers import Forwards, at_hand, calling
from sd.runtime.gpu.compiler_check import keep_programs, require_compiler
from sd.runtime.patching import exchanged
from sd.runtime.seamless import going_round
from sd.runtime.shortcuts.shared_halves import sharing

Forward = Callable[..., Tensor]


CUDA_OPTIONS = {"conv_1x1_as_mm": True}  # the shortcuts of residual blocks are matrix products
# the mode "max-autotune-no-cudagraphs", without its tables of everything that was tried
AUTOTUNED = {
    **CUDA_OPTIONS,
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "autotune_num_choices_displayed": 0,
}


def compiler_for(device: torch.device) -> Callable[[Forward], Forward]:
    """PyTorch's compiler as it is used here. It has to make one program of all, or say why it cannot.

    Raises SettingError where something is missing that it needs.
    """
    require_compiler(device)
    keep_programs()
    options = CUDA_OPTIONS if device.type == "cuda" else None
    return lambda function: torch.compile(function, fullgraph=True, dynamic=False, options=options)


class CompiledUNet:
    """A UNet's programs. Knows no gradients; weights that change are seen, since programs are given them at each call.

    compiler    from the forward function of the network to one that is compiled when it is first called
    on_compile  called with the shape (B, C, H, W) of what is predicted for, before a new program is written
    on_build    called before the kernel of `sd.runtime.cpu.attention` is compiled
    """

    def __init__(
        self,
        unet: UNet,
        compiler: Callable[[Forward], Forward],
        on_compile: Callable[[torch.Size], object] | None = None,
        on_build: Callable[[], object] = lambda: None,
    ):
        self.network, self.compiler, self.on_compile, self.on_build = unet, compiler, on_compile, on_build
        self._programs: dict[Hashable, dict[nn.Module, Forward]] = {}

    @contextmanager
    def applied(self, x: Tensor, context: Tensor, forwards: Forwards, *, guided: bool, tile: str) -> Iterator[None]:
        """As long as it lasts, the network predicts by the program for x (B, C, H, W), both of them contiguous.

        forwards  of layers that are computed otherwise than by PyTorch's own functions, see `compiled_layers`

        For guided and tile see `sd.runtime.execution.Execution.predict`. Raises SettingError where PyTorch cannot
        compile the network.
        """
        key = x.shape, x.dtype, x.device, context.shape, guided, tile
        new = key not in self._programs
        if new:
            if self.on_compile:
                self.on_compile(x.shape)
            self._programs[key] = self._program(x, forwards, guided, tile)
        done = False
        try:
            with (
                torch.no_grad(),
                at_hand(self.network, forwards),
                exchanged(self._programs[key]),
                fastest_convolutions(),
            ):
                yield
            done = True
        except RuntimeError as error:
            if new and is_of_the_compiler(error):
                raise SettingError("compile", f"does not work here: {reason_of(error)}. Leave it out.") from error
            raise
        finally:
            if new and not done:
                del self._programs[key]

    def _program(self, x: Tensor, others: Forwards, guided: bool, tile: str) -> dict[nn.Module, Forward]:
        """The forward functions of such predictions, the same in each, so that nothing is compiled twice."""
        unet = self.network
        forwards = {module: _norm(module) for module in unet.modules() if isinstance(module, nn.GroupNorm)}
        forwards |= calling(unet, others)
        forwards |= attending(unet, x, self.on_build) | joining(unet, x)
        forwards |= going_round(unet, tile)
        forwards |= sharing(unet) if guided else {unet: _plain(unet)}
        try:
            forwards[unet] = self.compiler(own_code(forwards[unet]))
        except RuntimeError as error:  # a version of Python that PyTorch's compiler does not know, for example
            raise SettingError("compile", f"does not work here: {reason_of(error)}. Leave it out.") from error
        return forwards


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """As long as it lasts, cuDNN tries its algorithms for each new shape and remembers which is the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _plain(unet: UNet) -> Forward:
    return lambda x_t, timestep, context: type(unet).forward(unet, x_t, timestep, context)


def _norm(norm: nn.GroupNorm) -> Forward:
    """PyTorch's, in place of the one of `sd.runtime.cpu.precise_norms`: the compiler's own sums keep their digits.

    In channels_last order with a mean of 30 deviations, the result is off by 5e-6, that of PyTorch's kernel by 8e-4.
    """
    return lambda x: F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def own_code(function: Forward) -> Forward:
    """The same function with a code object of its own.

    PyTorch keeps programs by code object, eight at most for each, and looks through them at each call.
    """
    return FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def is_of_the_compiler(error: Exception) -> bool:
    """Whether an error says that something could not be compiled, not that a program failed."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def reason_of(error: Exception) -> str:
    """One line of what PyTorch's compiler says, of its innermost error."""
    while isinstance(getattr(error, "inner_exception", None), Exception):
        error = error.inner_exception
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    telling = next((line for line in lines if "error:" in line), lines[0])
    return f"{type(error).__name__}: {telling[:200]}".rstrip(".: ")
