"""Describe the networks by running them on the meta device, where nothing is computed and no memory is needed.

Hooks record shapes, operations, the order of the modules and the skip connections; sizes, names and source lines come
from the modules themselves. So the description cannot differ from the code.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.config import ModelConfig
from sd.networks.attention import Attention
from sd.networks.build import build_networks
from sd.study.architecture.calls import Call, Shape, Watcher

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    name: str  # as in our files: "unet.out.conv.weight"
    shape: Shape
    original: str  # its key in an original file
    original_shape: Shape  # two more axes of length 1 where that file has a 1x1 convolution


@dataclass(frozen=True, kw_only=True)
class Node:
    """A module and everything inside it."""

    path: str  # "unet.input_blocks.4.residual"
    kind: str  # its class
    built_as: str  # how PyTorch prints one of its own layers; empty for our classes
    purpose: str  # first line of the docstring, for our classes
    file: str  # relative to the repository: where our class is defined, or PyTorch's is used ("sd/networks/unet.py")
    line: int
    heads: int  # of an attention; otherwise 0
    inputs: dict[str, Shape]  # tensors by the names of `forward`'s parameters; empty for a table that is only read
    output: Shape
    skips: tuple[str, ...]  # paths of the modules whose outputs are concatenated to the input
    parameter_count: int  # with the children's
    operations: int  # of one call, with the children's
    milliseconds: float | None  # of one call; None if not measured
    parameters: tuple[Parameter, ...]  # without the children's
    children: "tuple[Node, ...]"  # in the order they run

    def walk(self) -> "Iterator[Node]":
        """This node and every node inside it."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, kw_only=True)
class Architecture:
    config: ModelConfig
    width: int  # of the picture, in pixels
    height: int
    networks: tuple[Node, ...]
    measured_on: str  # device and precision; empty without times


def passes(
    config: ModelConfig, networks: Mapping[str, nn.Module], width: int, height: int, device: torch.device
) -> dict[str, list[Callable[[], object]]]:
    """What each network does for one picture, ready to run: encode text, one denoising step, encode and decode."""
    sides = height // config.vae.factor, width // config.vae.factor
    tokens = torch.zeros(1, config.text_encoder.context_length, dtype=torch.int64, device=device)

    def filled(component: str, *shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=next(networks[component].parameters()).dtype)

    def unet() -> Tensor:
        context = filled("unet", 1, config.text_encoder.context_length, config.unet.context_width)
        timestep = torch.zeros((), dtype=torch.int64, device=device)
        widths = {"vector": config.unet.vector_width, "guidance": config.unet.guidance_width}
        beside = {name: filled("unet", 1, width) for name, width in widths.items() if width}
        return networks["unet"](filled("unet", 1, config.unet.in_channels, *sides), timestep, context, **beside)

    few = {}  # that few models have
    if config.depth:
        side = config.depth.native_size
        few = {"depth_network": [lambda: networks["depth_network"](filled("depth_network", 1, 3, side, side))]}
    if config.text_encoder_2:
        few |= {"text_encoder_2": [lambda: networks["text_encoder_2"](tokens)]}
    return {
        **few,
        "text_encoder": [lambda: networks["text_encoder"](tokens)],
        "unet": [unet],
        "vae": [
            lambda: networks["vae"].encode(filled("vae", 1, config.vae.image_channels, height, width)),
            lambda: networks["vae"].decode(filled("vae", 1, config.vae.latent_channels, *sides)),
        ],
    }


def describe(
    config: ModelConfig,
    originals: Mapping[str, tuple[str, int]],
    *,
    width: int,
    height: int,
    milliseconds: Mapping[str, float] | None = None,
    measured_on: str = "",
) -> Architecture:
    """The networks of a model as trees of modules, with the shapes of one picture.

    originals      for each of our parameters its key in an original file, and how many more axes of length 1 it has
                   there; from `convert.layouts.joined.keys_in_files`
    width, height  of the picture in pixels, multiples of `config.vae.factor`
    milliseconds   of modules by path, if measured (`sd.study.architecture.timing`)
    """
    networks = build_networks(config)
    with torch.no_grad(), Watcher(networks) as watcher:
        for runs in passes(config, networks, width, height, torch.device("meta")).values():
            for run in runs:
                run()
    times = milliseconds or {}
    look = functools.partial(_node, calls=watcher.calls, originals=originals, milliseconds=times)
    texts_first = sorted(networks.items(), key=lambda item: not item[0].startswith("text_encoder"))
    roots = (look(component, network, type(network)) for component, network in texts_first)
    return Architecture(config=config, width=width, height=height, networks=tuple(roots), measured_on=measured_on)


def _node(
    path: str,
    module: nn.Module,
    owner: type,
    *,
    calls: Mapping[str, Call],
    originals: Mapping[str, tuple[str, int]],
    milliseconds: Mapping[str, float],
) -> Node:
    """A module and everything inside it. owner: our class that it is, or that contains it."""
    ours = not type(module).__module__.startswith("torch.")
    owner = type(module) if ours else owner
    file, line = _source(owner, "" if ours else path.rpartition(".")[2])
    inner = [(f"{path}.{name}", part) for name, part in _parts(module) if any(True for _ in part.parameters())]
    inner.sort(key=lambda item: _turn(*item, calls))
    look = functools.partial(_node, calls=calls, originals=originals, milliseconds=milliseconds)
    children = tuple(look(name, part, owner) for name, part in inner)
    call = calls.get(path, Call(number=-1, inputs={}, skips=()))
    inside = [child.milliseconds for child in children if child.milliseconds is not None]
    return Node(
        path=path,
        kind=type(module).__name__,
        built_as="" if ours or children else repr(module),
        purpose=(type(module).__doc__ or "").strip().partition("\n")[0] if ours else "",
        file=file,
        line=line,
        heads=module.heads if isinstance(module, Attention) else 0,
        inputs=call.inputs,
        output=call.output,
        skips=call.skips,
        parameter_count=sum(parameter.numel() for parameter in module.parameters()),
        operations=call.operations + sum(child.operations for child in children),
        milliseconds=milliseconds.get(path, sum(inside) if inside and path not in calls else None),
        parameters=tuple(
            Parameter(name=name, shape=tuple(values.shape), **_original(tuple(values.shape), *originals[name]))
            for name, values in module.named_parameters(prefix=path, recurse=False)
        ),
        children=children,
    )


def _turn(path: str, module: nn.Module, calls: Mapping[str, Call]) -> int:
    """When a module runs. Tables that are only read come first; what never runs comes last."""
    if path in calls:
        return calls[path].number
    return -1 if isinstance(module, nn.Embedding) else len(calls)


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside; those in a list, which is never called itself, under the list's name."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", part) for index, part in _parts(child))
        else:
            yield name, child


def _original(shape: Shape, key: str, unit_axes: int) -> dict:
    return {"original": key, "original_shape": shape + (1,) * unit_axes}


@functools.cache
def _source(kind: type, name: str) -> tuple[str, int]:
    """File and line of one of our classes, or of the line in it that makes the layer of that name."""
    lines, first = inspect.getsourcelines(kind)
    makes = re.compile(rf"\b{re.escape(name)}\s*=[^=]")
    offset = next((i for i, line in enumerate(lines) if makes.search(line)), 0) if name else 0
    return Path(inspect.getsourcefile(kind)).resolve().relative_to(ROOT).as_posix(), first + offset
