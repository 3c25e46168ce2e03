"""A prediction of the UNet as one CUDA graph: more than a thousand kernels, launched by a single call.

A modern GPU is done with a small kernel before the processor has launched the next one. A graph holds the kernels of a
whole prediction with the addresses that they read and write, and the device goes through them by itself: Gray, "Getting
Started with CUDA Graphs" (2019). So a graph belongs to one size of pictures and one set of weights: inputs are copied
to where it reads, and what it leaves is copied away before the next run leaves its own there. The kernels are the same
as without it, and so is the picture.

The network does not know: whatever else in this folder acts on it is captured with it, a compiled program, too.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sd.runtime.gpu.compile import reason_of

KEPT = 4  # graphs; each of v1 at 512x512 holds some tens of megabytes of its own
WARM_UPS = 2  # runs before a graph is captured, in which libraries set themselves up and choose their kernels

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, timestep, context) -> what the network predicts
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Captured:
    """One prediction that can be run again."""

    inputs: tuple[Tensor, ...]  # where it reads
    replay: Callable[[], object]
    output: Tensor  # where its result is until it runs again

    def __call__(self, *inputs: Tensor) -> Tensor:
        for place, given in zip(self.inputs, inputs, strict=True):
            place.copy_(given)
        self.replay()
        return self.output.clone()  # samplers with a memory keep predictions


class CapturedUNet:
    """The last few kinds of predictions of a network, captured. Knows no gradients; one thread at a time.

    record   (function without arguments) -> what runs it again, and where its result is then; by default
             `CudaRecorder`
    problem  why the last prediction that could not be captured could not: one line
    """

    def __init__(self, unet: nn.Module, record: Recorder | None = None):
        self.network, self.record, self._given = unet, record, record
        self.problem: str | None = None
        self._captured: OrderedDict[Hashable, Captured | None] = OrderedDict()  # None: it cannot be
        self._parameters = [module._parameters for module in unet.modules()]
        self._addresses: tuple[int, ...] = ()

    def predict(self, predict: Predict, x: Tensor, timestep: Tensor, context: Tensor, *, kind: Hashable) -> Tensor:
        """What `predict` gives, of which there is one for each kind; all inputs are on the device of the network."""
        inputs = x, timestep, context
        if (addresses := self.addresses()) != self._addresses:  # weights that were replaced, not changed in place
            self._captured.clear()
            self._addresses = addresses
            self.record = self._given or CudaRecorder(x.device)
        key = kind, *((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._captured:
            self._captured[key] = self._capture(predict, inputs)
            if len(self._captured) > KEPT:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        captured = self._captured[key]
        return predict(*inputs) if captured is None else captured(*inputs)

    def addresses(self) -> tuple[int, ...]:
        """Where each of the weights is."""
        return tuple(
            weight.data_ptr() for weights in self._parameters for weight in weights.values() if weight is not None
        )

    def _capture(self, predict: Predict, inputs: tuple[Tensor, ...]) -> Captured | None:
        """None where it cannot be captured. What fails without capturing, too, fails here."""
        places = tuple(given.clone(memory_format=torch.contiguous_format) for given in inputs)
        try:
            replay, output = self.record(lambda: predict(*places))
        except CannotCapture as error:
            self.problem = reason_of(error.__cause__)
            return None
        return Captured(inputs=places, replay=replay, output=output)


class CannotCapture(Exception):
    """A function that runs, but not while it is captured; the cause says why."""


class CudaRecorder:
    """Captures functions into CUDA graphs, as PyTorch's "CUDA semantics" describes it.

    All graphs have one pool of memory, in which each may overwrite what another has left: so what a graph gives has to
    be copied before any other of them runs. Other threads may use the device meanwhile.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Raises CannotCapture."""
        with torch.cuda.device(self.device):
            own = torch.cuda.current_stream()
            self.stream.wait_stream(own)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    function()
            own.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    output = function()
            except RuntimeError as error:
                torch.cuda.set_stream(own)  # PyTorch leaves the side stream where the capture ends with an error
                self.pool = torch.cuda.graph_pool_handle()  # and takes the other one to be in use still
                raise CannotCapture from error
            return graph.replay, output
