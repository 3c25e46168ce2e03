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

from sd.networks.text_encoder import TextEncoder
from sd.networks.unet import UNet
from sd.networks.vae import VAE
from sd.runtime.cpu.attention import attention_applied
from sd.runtime.cpu.gates import gates_joined
from sd.runtime.cpu.norms import joined, norms_joined
from sd.runtime.cpu.packing import PackedConvolutions, make_whole
from sd.runtime.cpu.upsampling import UpsampledConvolutions
from sd.runtime.cpu.winograd import WinogradConvolutions
from sd.runtime.device import RunOptions, one_by_one, visiting
from sd.runtime.gpu.compile import CompiledUNet, Forward, compiler_for
from sd.runtime.gpu.cuda_graphs import CapturedUNet, Recorder
from sd.runtime.low_memory.lean_vae import lean
from sd.runtime.low_memory.tiled_vae import decode_tiled, encode_tiled
from sd.runtime.patching import exchanged
from sd.runtime.seamless import seamless
from sd.runtime.shortcuts.feature_reuse import ReusedFeatures
from sd.runtime.shortcuts.shared_halves import halves_shared
from sd.runtime.shortcuts.token_merging import tokens_merged


class Execution:
    """Runs networks as the options have it.

    visited   where each network computes, if its weights rest elsewhere and go there only while it is used
    packed    the UNet's convolutions, where they are packed already
    compiler  in place of PyTorch's, see `sd.runtime.gpu.compile.CompiledUNet`
    recorder  in place of CUDA's, see `sd.runtime.gpu.cuda_graphs.CapturedUNet`
    watched   somebody looks at what happens in the UNet, or between two steps: it is neither compiled nor captured

    on_compile  may be set, to be called with the shape of the latents (B, C, H, W) before the UNet is compiled for
                them; with guidance, B is twice the number of pictures
    on_build    may be set, to be called before kernels of ours are compiled, once on a machine
    """

    def __init__(
        self,
        options: RunOptions | None = None,
        visited: torch.device | None = None,
        packed: PackedConvolutions | None = None,
        compiler: Callable[[Forward], Forward] | None = None,
        recorder: Recorder | None = None,
        watched: bool = False,
    ):
        self.options, self.visited, self.packed = options or RunOptions(), visited, packed
        self.compiler, self.compiled = compiler, None
        # of the UNet and of the VAE
        self.upsampled: dict[type[nn.Module], UpsampledConvolutions] = {}
        self.winograd: dict[type[nn.Module], WinogradConvolutions] = {}
        self.recorder, self.captured = recorder, None
        self.watched = watched
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
        if self.options.low_memory or self.options.compile or tile:
            make_whole(unet)  # they run it, or a part of it, by its plain weights
        if reused:
            reused.begin(x)
        options = {"tile": tile, "reused": reused, "merge": merge}
        parts = self._parts(x, guided)
        if len(parts) == 1:
            return self._predict(unet, x, timestep, context, guided=guided, **options)
        guided = guided and not self.options.low_memory
        predictions = [
            self._predict(unet, x[rows], timestep, context[rows], guided=guided, part=part, **options)
            for part, rows in enumerate(parts)
        ]
        order = torch.tensor([row for rows in parts for row in rows], device=x.device)
        return torch.cat(predictions)[order.argsort()]

    def _parts(self, x: Tensor, guided: bool) -> list[list[int]]:
        """The numbers of the rows that are predicted together: all, or those of one picture, or half of them."""
        pictures = len(x) // 2 if guided else len(x)
        halves = [0, pictures] if guided else [0]  # where they begin
        groups = [[picture] for picture in range(pictures)] if one_by_one(x) else [list(range(pictures))]
        if self.options.low_memory:
            return [[half + picture for picture in group] for half in halves for group in groups]
        return [[half + picture for half in halves for picture in group] for group in groups]

    def encode_text(self, text_encoder: TextEncoder, tokens: Tensor, *, skip_layers: int = 0) -> Tensor:
        """What the text encoder, which is at work, makes of tokens (B, 77): (B, 77, D)."""
        parts = tokens.split(1) if one_by_one(text_encoder.position_embedding.weight) else [tokens]
        return torch.cat([text_encoder(part, skip_layers=skip_layers) for part in parts])

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
        """The same for one part of the rows; see `_parts`."""
        same_each_time = reused is None and not merge and not self.watched

        def compiled(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            x, context = x.contiguous(), context.contiguous()
            forwards = self.convolutions(unet, x, x.shape[-2:].numel(), tile)
            with self._compiled(unet).applied(x, context, forwards, guided=guided, tile=tile):
                return unet(x, timestep, context)

        def plain(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            with self._changed(unet, x, guided=guided, tile=tile, reused=reused, merge=merge, part=part):
                return unet(x, timestep, context)

        predict = compiled if self.options.compile and same_each_time else plain
        with self._one_thread:
            if same_each_time and self.captures(x.device) and not torch.is_grad_enabled():
                return self._captured(unet).predict(predict, x, timestep, context, kind=(guided, tile))
            return predict(x, timestep, context)

    @contextmanager
    def _changed(
        self,
        unet: UNet,
        x: Tensor,
        *,
        guided: bool,
        tile: str,
        reused: ReusedFeatures | None,
        merge: float,
        part: int,
    ) -> Iterator[None]:
        """As long as it lasts, the functions of the network are those for such a prediction, without a compiler."""
        with ExitStack() as changes:
            changes.enter_context(exchanged(self.convolutions(unet, x, x.shape[-2:].numel(), tile)))
            changes.enter_context(attention_applied(unet, x, self._about_to_build))
            changes.enter_context(gates_joined(unet, x))
            changes.enter_context(norms_joined(unet, x, self._about_to_build))
            changes.enter_context(seamless(unet, tile))
            if guided:
                changes.enter_context(halves_shared(unet))
            if reused:
                changes.enter_context(reused.applied(unet, part))
            if merge:
                changes.enter_context(tokens_merged(unet, merge, x))
            yield

    def captures(self, device: torch.device) -> bool:
        """Whether predictions on that device are captured as CUDA graphs, as far as they are always alike.

        Then a step is begun before the one before it is known to be done, see `LatentDiffusion.sample`.
        """
        on_gpu = device.type == "cuda" or self.recorder is not None
        return on_gpu and not self.options.low_memory and not self.watched

    def encode(self, vae: VAE, image: Tensor, tile: str) -> tuple[Tensor, Tensor]:
        """`VAE.encode`."""
        latents = image.shape[-2:].numel() // 64
        with self._one_thread, self.at_work(vae), self._changed_vae(vae, image, latents, tile):
            return encode_tiled(vae, image, axes=tile) if self.options.tiled_vae else vae.encode(image)

    def decode(self, vae: VAE, latents: Tensor, tile: str) -> Tensor:
        """`VAE.decode`."""
        with self._one_thread, self.at_work(vae), self._changed_vae(vae, latents, latents.shape[-2:].numel(), tile):
            return decode_tiled(vae, latents, axes=tile) if self.options.tiled_vae else vae.decode(latents)

    @contextmanager
    def _changed_vae(self, vae: VAE, x: Tensor, latents: int, tile: str) -> Iterator[None]:
        """As long as it lasts, the functions of the VAE are those for inputs like x; `latents` as in `convolutions`."""
        with ExitStack() as changes:
            if self.options.tiled_vae:
                changes.enter_context(lean(vae))
            else:
                changes.enter_context(lean(vae, joined(x, latents, self._about_to_build)))
                changes.enter_context(attention_applied(vae, x, self._about_to_build, latents))
                changes.enter_context(exchanged(self.convolutions(vae, x, latents, tile)))
            changes.enter_context(seamless(vae, tile))
            yield

    def convolutions(
        self, network: UNet | VAE, x: Tensor, latents: int, tile: str = ""
    ) -> dict[nn.Module, Callable[..., Tensor]]:
        """Forward functions for convolutions, and for upsampling before one, where that pays for inputs like x.

        latents  the number of positions in the latents that belong to x
        """
        part, is_unet = type(network), isinstance(network, UNet)
        if is_unet and self.options.low_memory:
            return {}
        packed = self._packed(network).forwards() if is_unet else {}
        if tile:
            return packed
        if part not in self.upsampled or self.upsampled[part].network is not network:
            self.upsampled[part] = UpsampledConvolutions(network)
            self.winograd[part] = WinogradConvolutions(network, keep=is_unet)
        others = packed | self.upsampled[part].forwards(x)
        return others | self.winograd[part].forwards(x, latents, others, self._about_to_build)

    def _packed(self, unet: UNet) -> PackedConvolutions:
        if self.packed is None or self.packed.network is not unet:
            self.packed = PackedConvolutions(unet)
        return self.packed

    def _compiled(self, unet: UNet) -> CompiledUNet:
        if self.compiled is None or self.compiled.network is not unet:
            compiler = self.compiler or compiler_for(unet.out.conv.weight.device)
            self.compiled = CompiledUNet(unet, compiler, self._about_to_compile, self._about_to_build)
        return self.compiled

    def _captured(self, unet: UNet) -> CapturedUNet:
        if self.captured is None or self.captured.network is not unet:
            self.captured = CapturedUNet(unet, self.recorder)
        return self.captured

    def _about_to_compile(self, shape: torch.Size) -> None:
        if self.on_compile:
            self.on_compile(shape)

    def _about_to_build(self) -> None:
        told, self.on_build = self.on_build, None  # once for all of them
        if told:
            told()

    def for_watching(self) -> "Execution":
        """The same with the UNet as it is, so that everything in it can be seen, step by step."""
        execution = Execution(replace(self.options, compile=False), self.visited, self.packed, watched=True)
        execution.on_build = self.on_build
        return execution
