"""How the networks of a model are run: where their weights are, and which of their functions are others meanwhile.

B pictures; C channels, H W height and width of the latents.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from sd.running.compiling import CompiledUNet, Forward, compiler_for
from sd.running.fast_attention import attention_applied
from sd.running.joined_gates import gates_joined
from sd.running.merged_tokens import tokens_merged
from sd.running.packing import PackedConvolutions
from sd.running.reused_features import ReusedFeatures
from sd.running.shared_halves import halves_shared
from sd.running.tiled_vae import decode_tiled, encode_tiled
from sd.runtime import RunOptions, visiting
from sd.tiling import seamless
from sd.unet import UNet
from sd.vae import VAE


class Execution:
    """Runs networks as the options have it.

    visited   where each network computes, if its weights rest elsewhere and go there only while it is used
    packed    the UNet's convolutions, where they are packed already
    compiler  in place of PyTorch's, see `sd.running.compiling.CompiledUNet`

    on_compile  may be set, to be called with the shape of the latents (B, C, H, W) before the UNet is compiled for
                them; with guidance, B is twice the number of pictures
    on_build    may be set, to be called before a kernel of ours is compiled, once on a machine
    """

    def __init__(
        self,
        options: RunOptions | None = None,
        visited: torch.device | None = None,
        packed: PackedConvolutions | None = None,
        compiler: Callable[[Forward], Forward] | None = None,
    ):
        self.options, self.visited, self.packed = options or RunOptions(), visited, packed
        self.compiler, self.compiled = compiler, None
        self.on_compile: Callable[[torch.Size], object] | None = None
        self.on_build: Callable[[], object] | None = None
        self._hosts: Counter[nn.Module] = Counter()  # how many need a network where it computes
        self._ends: dict[nn.Module, ExitStack] = {}  # of its visit
        self._one_thread = threading.RLock()

    @contextmanager
    def at_work(self, network: nn.Module) -> Iterator[None]:
        """As long as it lasts, also for somebody else, the weights of a network are where it computes."""
        if self.visited is None:
            yield
            return
        if not self._hosts[network]:
            self._ends[network] = ExitStack()
            self._ends[network].enter_context(visiting(network, self.visited))
        self._hosts[network] += 1
        try:
            yield
        finally:
            self._hosts[network] -= 1
            if not self._hosts[network]:
                self._ends.pop(network).close()

    def predict(
        self,
        unet: UNet,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        *,
        guided: bool = False,
        tile: str = "",
        reused: ReusedFeatures | None = None,
        merge: float = 0.0,
    ) -> Tensor:
        """What the UNet, which is at work, predicts for x (B, C, H, W).

        guided  the second half of x is the same as the first, and the context has the negative prompts' rows first
        tile    the axes, "x" and "y", along which the picture goes on at its other side
        reused  what the run keeps from prediction to prediction, if it does; then the UNet is not a compiled one
        merge   the share of tokens that is merged before self-attention with the most of them; if any, the same
        """
        if reused:
            reused.begin(x)
        if guided and self.options.low_memory:
            halves = zip(x.chunk(2), context.chunk(2), strict=True)
            return torch.cat(
                [
                    self._predict(unet, half, timestep, words, tile=tile, reused=reused, merge=merge, part=part)
                    for part, (half, words) in enumerate(halves)
                ]
            )
        return self._predict(unet, x, timestep, context, guided=guided, tile=tile, reused=reused, merge=merge)

    def _predict(
        self,
        unet: UNet,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        *,
        guided: bool = False,
        tile: str,
        reused: ReusedFeatures | None,
        merge: float,
        part: int = 0,
    ) -> Tensor:
        """The same for one part of the rows: all of them, or one half after the other."""
        with self._one_thread, ExitStack() as changes:
            if self.options.compile and reused is None and not merge:
                x, context = x.contiguous(), context.contiguous()
                program = self._compiled(unet).applied(x, context, self._packed(unet), guided=guided, tile=tile)
                changes.enter_context(program)
                return unet(x, timestep, context)
            if not self.options.low_memory:
                changes.enter_context(self._packed(unet).applied())
            changes.enter_context(attention_applied(unet, x, self._about_to_build))
            changes.enter_context(gates_joined(unet, x))
            changes.enter_context(seamless(unet, tile))
            if guided:
                changes.enter_context(halves_shared(unet))
            if reused:
                changes.enter_context(reused.applied(unet, part))
            if merge:
                changes.enter_context(tokens_merged(unet, merge, x))
            return unet(x, timestep, context)

    def encode(self, vae: VAE, image: Tensor, tile: str) -> tuple[Tensor, Tensor]:
        """`VAE.encode`."""
        with self._one_thread, self.at_work(vae), seamless(vae, tile):
            return encode_tiled(vae, image, axes=tile) if self.options.tiled_vae else vae.encode(image)

    def decode(self, vae: VAE, latents: Tensor, tile: str) -> Tensor:
        """`VAE.decode`."""
        with self._one_thread, self.at_work(vae), seamless(vae, tile):
            return decode_tiled(vae, latents, axes=tile) if self.options.tiled_vae else vae.decode(latents)

    def _packed(self, unet: UNet) -> PackedConvolutions:
        if self.packed is None or self.packed.network is not unet:
            self.packed = PackedConvolutions(unet)
        return self.packed

    def _compiled(self, unet: UNet) -> CompiledUNet:
        if self.compiled is None or self.compiled.network is not unet:
            compiler = self.compiler or compiler_for(unet.out.conv.weight.device)
            self.compiled = CompiledUNet(unet, compiler, self._about_to_compile, self._about_to_build)
        return self.compiled

    def _about_to_compile(self, shape: torch.Size) -> None:
        if self.on_compile:
            self.on_compile(shape)

    def _about_to_build(self) -> None:
        if self.on_build:
            self.on_build()

    def without_compiling(self) -> "Execution":
        """The same with the UNet as it is."""
        execution = Execution(replace(self.options, compile=False), self.visited, self.packed)
        execution.on_build = self.on_build
        return execution
