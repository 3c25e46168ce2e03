"""From a network to an ONNX file, and that file run."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sd.runtime.onnx.graphs import Graph

if TYPE_CHECKING:
    import onnx_ir
    import onnxruntime

OPSET = 18  # the one that PyTorch exports to directly; onnxruntime has it since 1.14
SMALL = 64  # numbers for which a Cast takes more room than it saves
LARGEST_FILE = 1_900_000_000  # bytes; protobuf allows 2 GiB


def write_graph(path: Path, graph: Graph, call: nn.Module, values: Sequence[Tensor], *, halved: bool) -> None:
    """Trace a network with these values and write it. Weights of more than 1.9 GB go to NAME.onnx.data beside it.

    halved  store weights in float16, and widen them to float32 before they are used
    """
    import onnx_ir

    sides = [
        {axis: side for axis, side in enumerate(each.shape) if isinstance(side, str)} for each in graph.inputs.values()
    ]
    with _quiet():
        program = torch.onnx.export(
            call,
            tuple(values),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=(tuple(sides),),
            verbose=False,
        )
    model = program.model
    for node in model.graph.all_nodes():  # lines of code on this machine, a sixth of the file of a small network
        node.metadata_props.clear()
    if halved:
        _halve(model.graph)
    nbytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    beside = f"{path.name}.data" if nbytes > LARGEST_FILE else None
    onnx_ir.save(model, path, external_data=beside)


def _halve(graph: "onnx_ir.Graph") -> None:
    """Store weights in float16, each with a Cast behind it: all that float16 holds exactly.

    The exporter transposes weights and gives them other names. Other constants stay as they are: they are few.
    """
    import onnx_ir as ir

    first = graph[0]
    for name, value in list(graph.initializers.items()):
        if value.const_value.dtype != ir.DataType.FLOAT or value.const_value.size < SMALL:
            continue
        full = value.const_value.numpy()
        with np.errstate(over="ignore"):
            halves = full.astype(np.float16)
        if not np.array_equal(halves, full):
            continue
        half = ir.Value(
            name=f"{name}.fp16",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(halves, name=f"{name}.fp16"),
        )
        cast = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT})
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = f"{name}.fp32", value.shape, value.type
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        graph.initializers.add(half)
        graph.insert_before(first, cast)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter tells its developers: that torchvision is missing, or what it did not fold."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def session_of(path: Path) -> "onnxruntime.InferenceSession":
    """A file, ready to run on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def run_graph(session: "onnxruntime.InferenceSession", graph: Graph, values: Sequence[Tensor]) -> list[np.ndarray]:
    return session.run(
        list(graph.outputs), {name: value.numpy() for name, value in zip(graph.inputs, values, strict=True)}
    )


def shapes_of(session: "onnxruntime.InferenceSession") -> dict[str, Mapping[str, dict[str, object]]]:
    """Inputs and outputs as the file states them: types, and shapes with names where a size may differ."""
    sides = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
    return {
        side: {
            each.name: {"type": each.type.removeprefix("tensor(").rstrip(")"), "shape": each.shape} for each in values
        }
        for side, values in sides.items()
    }
