"""A prediction of the UNet as one CUDA graph: more than a thousand kernels, launched by a single call.

A modern GPU finishes a small kernel before the processor has launched the next one. A graph holds all kernels of a
prediction with the addresses that they read and write: Gray, "Getting Started with CUDA Graphs" (2019). So it belongs
to one size of pictures and one set of weights: inputs are copied to where it reads, and its result is copied before the
next run overwrites it. The kernels, and the picture, are the same as without it.

Other patches of the network are captured with it, and so are compiled programs.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sd.runtime.gpu.compile import reason_of

KEPT = 4  # graphs; one of v1 at 512x512 takes some tens of megabytes
WARM_UPS = 2  # runs before a graph is captured, in which libraries initialise and choose kernels

Predict = Callable[..., Tensor]  # (x, timestep, context), and perhaps a vector -> what the network predicts
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
        return self.output.clone()  # multistep samplers keep predictions


class CapturedUNet:
    """The most recent kinds of predictions of a network, captured, without gradients; one thread at a time.

    record   (function without arguments) -> a function that runs it again, and the tensor with the result; by default
             `CudaRecorder`
    problem  why the last capture that failed did so: one line
    """

    def __init__(self, unet: nn.Module, record: Recorder | None = None):
        self.network, self.record, self._given = unet, record, record
        self.problem: str | None = None
        self._captured: OrderedDict[Hashable, Captured | None] = OrderedDict()  # None: it cannot be
        self._parameters = [module._parameters for module in unet.modules()]
        self._addresses: tuple[int, ...] = ()

    def predict(self, predict: Predict, *inputs: Tensor, kind: Hashable) -> Tensor:
        """The result of `predict`, which is the same function for each kind; all inputs are on the network's device."""
        if (addresses := self.addresses()) != self._addresses:  # weights that were replaced, not changed in place
            self._captured.clear()
            self._addresses = addresses
            self.record = self._given or CudaRecorder(inputs[0].device)
        key = kind, *((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._captured:
            self._captured[key] = self._capture(predict, inputs)
            if len(self._captured) > KEPT:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        captured = self._captured[key]
        return predict(*inputs) if captured is None else captured(*inputs)

    def addresses(self) -> tuple[int, ...]:
        """The address of each weight."""
        return tuple(
            weight.data_ptr() for weights in self._parameters for weight in weights.values() if weight is not None
        )

    def _capture(self, predict: Predict, inputs: tuple[Tensor, ...]) -> Captured | None:
        """None if it cannot be captured. Errors that are not about capturing are raised."""
        places = tuple(given.clone(memory_format=torch.contiguous_format) for given in inputs)
        try:
            replay, output = self.record(lambda: predict(*places))
        except CannotCapture as error:
            self.problem = reason_of(error.__cause__)
            return None
        return Captured(inputs=places, replay=replay, output=output)


class CannotCapture(Exception):
    """A function runs, but cannot be captured; the cause says why."""


class CudaRecorder:
    """Captures functions into CUDA graphs, as PyTorch's "CUDA semantics" describes it.

    All graphs share one memory pool and may overwrite each other's results, so a result has to be copied before another
    graph runs. Other threads may use the device meanwhile.
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
                torch.cuda.set_stream(own)  # after a failed capture, PyTorch stays on the side stream
                self.pool = torch.cuda.graph_pool_handle()  # and considers the old pool in use
                raise CannotCapture from error
            return graph.replay, output
