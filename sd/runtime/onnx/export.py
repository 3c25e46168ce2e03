"""A model's networks as ONNX files, for onnxruntime and what else reads them.

The networks are exported as they are, without the faster kernels of `sd.runtime.cpu`. Only one of them is in memory at
a time. Each file is compared with its network before the folder gets its name.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from convert.actions.target import TargetError
from convert.checkpoint import Checkpoint, match_shapes
from convert.errors import UnsupportedFileError, named
from convert.files.reader import CheckpointFile
from convert.other_vae import opened_model
from sd.config import ModelConfig
from sd.files import folder_written_whole, length_problem, remove_leftovers
from sd.networks.build import build_networks, parameter_shapes
from sd.pipeline.errors import SettingError
from sd.runtime.onnx.checking import LIMIT, difference, exact_outputs
from sd.runtime.onnx.description import CONFIG, FORMAT, TOKENIZER, as_json, description, tokenizer
from sd.runtime.onnx.graph_files import run_graph, session_of, shapes_of, write_graph
from sd.runtime.onnx.graphs import Graph, graphs_of, sizes
from sd.runtime.weights import read_parameters

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}  # of the weights in the files
TRACED = (2, 154, 24, 16)  # batch, tokens, height and width of the latents: all differ, and no level has a side of 1
NOTHING = "Nothing was written."
CHECKED = ((1, 77, 8, 8), (3, 231, 5, 9))  # other sizes; the sides of the second are odd


class ExportError(Exception):
    """An exported network does not compute what the original does."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """One file of an export."""

    name: str  # without its ending
    nbytes: int  # with the weights beside it, if they are
    difference: float  # from the network: see `sd.runtime.onnx.checking.difference`


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was exported."""

    checkpoint: Checkpoint
    files: list[Written]


def export_onnx(
    path: str | os.PathLike,
    folder: Path,
    *,
    precision: str = "fp32",
    clip_skip: int = 1,
    weights: str = "auto",
    prediction: str = "auto",
    variant: str | None = None,
    vae: str | os.PathLike | None = None,
    force: bool = False,
    adapt: Callable[[Graph, ModelConfig], Graph] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_file: Callable[[Written], None] | None = None,
) -> Export:
    """Write the networks of a model as ONNX files, with its tokenizer and settings, into a new folder.

    path       of the model; weights, prediction, variant, vae: as in `sd.load`
    precision  "fp32"; or "fp16": weights take half the space, and are widened to float32 before they are used
    clip_skip  which layer the text encoders give: 1 the last, 2 the one before it
    force      replace a folder that an export wrote
    adapt      called with each graph and the model's config; returns what is written in its place
    on_start   called with the number of networks to write
    on_file    called after each

    Needs the packages onnx, onnxscript and onnxruntime. Raises CheckpointError for files that cannot be read or
    exported, ValueError for other arguments, also for a folder that cannot be written, OSError where there is no room,
    and ExportError if a file does not compute what its network does.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be {' or '.join(PRECISIONS)}, got {precision!r}")
    check_folder(folder, force=force)
    remove_leftovers([folder])
    with opened_model(path, weights, prediction, variant, vae) as (file, checkpoint):
        config = checkpoint.config
        check_model(file, config, clip_skip)
        networks = build_networks(config)
        checkpoint = match_shapes(checkpoint, parameter_shapes(networks))
        _check_disk(folder, checkpoint, precision)
        graphs = [adapt(graph, config) if adapt else graph for graph in graphs_of(config, clip_skip)]
        if on_start:
            on_start(len(graphs))
        with folder_written_whole(folder, force=force) as place:
            written, shapes = [], {}
            for graph in graphs:
                if graph.part in networks:
                    network = read_network(networks.pop(graph.part), graph.part, file, checkpoint, precision)
                target = place / f"{graph.name}.onnx"
                each, shapes[graph.name] = write_checked(target, graph, network, config, precision)
                written.append(each)
                if on_file:
                    on_file(each)
            about = {"name": file.called, "precision": precision, "clip_skip": clip_skip}
            (place / CONFIG).write_text(as_json(description(checkpoint, shapes, **about)), "utf-8")
            (place / TOKENIZER).write_text(json.dumps(tokenizer(config), ensure_ascii=False) + "\n", "utf-8")
    return Export(checkpoint=checkpoint, files=written)


def check_folder(folder: Path, *, force: bool) -> None:
    """Raises FileExistsError or TargetError for a folder that cannot or should not be written."""
    if problem := length_problem(folder):
        raise TargetError(f"{folder} {problem}")
    if not folder.absolute().parent.is_dir():
        raise TargetError(f"the folder of {folder} does not exist. Make it first.")
    if os.path.lexists(folder):
        if not is_export(folder):
            raise TargetError(
                f"{folder} is not a folder that sd export wrote, so it is not replaced. Give another name."
            )
        if not force:
            raise FileExistsError(f"{folder} exists already. Give another name, or --force to replace it.")


def is_export(folder: Path) -> bool:
    """Whether this is a folder that an export wrote."""
    try:
        return json.loads((folder / CONFIG).read_text("utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def check_model(file: CheckpointFile, config: ModelConfig, clip_skip: int) -> None:
    """Raises UnsupportedFileError for a model that cannot be exported, SettingError for a layer that it lacks."""
    if config.schedule.sigma_max:
        problem = "has noise levels instead of timesteps (EDM), for which an export has no form yet."
        raise named(UnsupportedFileError(problem), file.called)
    layers = config.text_encoder.layers
    if not 1 <= clip_skip <= layers:
        raise SettingError("clip_skip", f"{clip_skip} is out of range: this text encoder has {layers} layers.")


def read_network(
    network: nn.Module, part: str, file: CheckpointFile, checkpoint: Checkpoint, precision: str
) -> nn.Module:
    """A network with its weights, in float32: rounded to the precision that is stored.

    Raises CheckpointError for weights that are damaged or do not fit that precision.
    """
    prefix, cpu = f"{part}.", torch.device("cpu")
    mine = {name: record for name, record in checkpoint.tensors.items() if name.startswith(prefix)}
    parameters, _ = read_parameters(file, replace(checkpoint, tensors=mine), cpu, PRECISIONS[precision])
    state = {name.removeprefix(prefix): parameters.pop(name).float().contiguous() for name in mine}
    network.load_state_dict(state, assign=True)
    return network


def write_checked(
    path: Path, graph: Graph, network: nn.Module, config: ModelConfig, precision: str
) -> tuple[Written, dict[str, object]]:
    """Write one file and check it; also returns its inputs and outputs. Raises ExportError."""
    call, factor = graph.call(network), config.vae.factor
    write_graph(path, graph, call, graph.examples(sizes(*TRACED, factor), 0), halved=precision == "fp16")
    session = session_of(path)
    shapes = shapes_of(session)
    for name, given in graph.inputs.items():
        if shapes["inputs"][name]["shape"] != list(given.shape):
            raise ExportError(
                f"{path.name} takes {name} in the shape {shapes['inputs'][name]['shape']} only. {NOTHING}"
            )
    found = []
    for seed, each in enumerate(CHECKED, 1):
        values = graph.examples(sizes(*each, factor), seed)
        found.append(difference(run_graph(session, graph, values), exact_outputs(call, values)))
    furthest = float(np.max(found))  # NaN if one of them is
    if not furthest <= LIMIT:
        raise ExportError(f"{path.name} differs from the network by {furthest:.1e}, more than {LIMIT:g}. {NOTHING}")
    nbytes = sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*"))
    return Written(name=graph.name, nbytes=nbytes, difference=furthest), {"file": path.name, **shapes}


def _check_disk(folder: Path, checkpoint: Checkpoint, precision: str) -> None:
    needed = sum(record.numel for record in checkpoint.tensors.values()) * PRECISIONS[precision].itemsize
    place = folder.absolute().parent
    free = shutil.disk_usage(place).free
    if free < needed + (64 << 20):
        raise OSError(f"{place} has {free / 1e9:.2f} GB free, the export needs {needed / 1e9:.2f} GB.")
