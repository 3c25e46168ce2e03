"""The networks of a model as ONNX files for a browser, with a map of every word from the UNet's cross-attention.

The networks are exported as they are. Hooks read what the cross-attention layers compute, as
`sd.study.explain.attention` does, and the maps become a second output of the UNet.

S tokens of the context, H W height and width of the latents.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sd.config import ModelConfig
from sd.networks.attention import TransformerBlock
from sd.networks.block_plan import block_plan
from sd.runtime.loading import load
from sd.runtime.onnx.export import export_onnx, write_checked
from sd.runtime.onnx.graphs import Graph, Input
from sd.study.explain.attention import attention_weights


def write_networks(
    model: str | os.PathLike, tiny_vae: str | os.PathLike, folder: Path, on_file: Callable[..., object]
) -> ModelConfig:
    """Write the networks of a model into a new folder, with weights in float16, which a browser widens to float32.

    tiny_vae  the file of the tiny VAE that decodes previews
    on_file   called after each

    Needs the packages of `sd export`, and raises its errors.
    """
    config = export_onnx(model, folder, precision="fp16", adapt=with_maps, on_file=on_file).checkpoint.config
    network = load(model, tiny_vae=tiny_vae, precision="fp32").tiny_vae
    latents = Input(shape=("batch", config.vae.latent_channels, "height", "width"))
    sides = {"inputs": {"latents": latents}, "outputs": ("image",)}
    graph = Graph(name="tiny_vae_decoder", part="tiny_vae", method="decode", **sides)
    written, _ = write_checked(folder / f"{graph.name}.onnx", graph, network, config, "fp16")
    on_file(written)
    return config


def with_maps(graph: Graph, config: ModelConfig) -> Graph:
    """The UNet with a second output: how much each position attends to each token. Other networks stay as they are."""
    if graph.name != "unet":
        return graph
    # Layers further inside see too few positions for a map. In a block that ends in an upsampling, attention comes
    # before it, at half the size of the output.
    rows = [row for row in block_plan(config.unet) if row.heads and row.scale == 1 and "upsample" not in row.layers]
    fields = {name: getattr(graph, name) for name in ("name", "part", "method", "inputs", "fixed")}
    layers = tuple(f"{row.name}.attention" for row in rows)
    return WatchedUNet(**fields, outputs=(*graph.outputs, "maps"), layers=layers)


@dataclass(frozen=True, kw_only=True)
class WatchedUNet(Graph):
    """A UNet with maps of what these layers attend to."""

    layers: tuple[str, ...]  # their names

    def call(self, network: nn.Module) -> nn.Module:
        blocks = [block for name in self.layers for block in network.get_submodule(name).blocks]
        return WithMaps(super().call(network), blocks).eval()


class WithMaps(nn.Module):
    """Calls a UNet, and also returns (S, H, W): how much each position attends to each token, the mean of heads and
    layers. Each position sums to 1. Of a batch, it is the last row's."""

    def __init__(self, unet: nn.Module, blocks: Sequence[TransformerBlock]):
        super().__init__()
        self.unet, self.blocks = unet, blocks  # which the UNet has already

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        maps: list[Tensor] = []
        with ExitStack() as stack:
            for block in self.blocks:
                for handle in hooks(block, maps.append):
                    stack.callback(handle.remove)
            outputs = self.unet(*values)
        return *outputs, torch.stack(maps).mean(0).transpose(0, 1).unflatten(-1, tuple(values[0].shape[-2:]))


def hooks(block: TransformerBlock, add: Callable[[Tensor], None]) -> Iterator[RemovableHandle]:
    """Hooks for one block, which call `add` with its cross-attention weights (T, S), the mean of its heads."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            seen[name] = output[-1]  # with guidance, the negative prompt comes first

        return hook

    def read(attention: nn.Module, *_: object) -> None:
        add(attention_weights(seen.pop("q"), seen.pop("k"), attention.heads).mean(0))

    attention = block.cross_attention
    yield attention.q.register_forward_hook(note("q"))
    yield attention.k.register_forward_hook(note("k"))
    yield attention.register_forward_hook(read)
