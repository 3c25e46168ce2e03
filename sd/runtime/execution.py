"""Runs the networks of a model: moves weights to the device, and patches forwards while a network runs.

Each way to save time or memory is a file of its own in a folder beside this one, imported when a run first needs it.

B pictures; C channels, H W height and width of the latents.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sd.networks.text_encoder import TextEncoder
from sd.networks.unet import UNet
from sd.networks.vae import VAE
from sd.pipeline.runner import NonFiniteError, Predict, Runner, T, finite
from sd.pipeline.settings import Settings
from sd.runtime.device import LARGE, LATENTS, RunOptions, is_set, one_by_one, send
from sd.runtime.patching import patched
from sd.runtime.shortcuts.shared_halves import computed_once
from sd.runtime.weights import Weights

if TYPE_CHECKING:
    from sd.networks.depth import DepthNetwork
    from sd.networks.text_tower import TextTower
    from sd.networks.tiny_vae import TinyVAE
    from sd.pipeline.stable_diffusion import StableDiffusion
    from sd.runtime.cpu.winograd import WinogradConvolutions
    from sd.runtime.gpu.compile import CompiledUNet, Forward
    from sd.runtime.gpu.cuda_graphs import CapturedUNet, Recorder
    from sd.runtime.shortcuts.feature_reuse import ReusedFeatures


class Execution(Runner):
    """The calls of `Runner`, with the options applied.

    visited   where each network computes, if its weights are copied there while it runs: see `sd.runtime.low_memory`
    compiler  used instead of PyTorch's, see `sd.runtime.gpu.compile.CompiledUNet`
    recorder  used instead of CUDA's, see `sd.runtime.gpu.cuda_graphs.CapturedUNet`
    watched   the UNet is neither compiled nor captured, so that hooks see every layer and step

    on_compile  may be set: called with the shape of the latents (B, C, H, W) before the UNet is compiled for them; with
                guidance, B is twice the number of pictures, or three times if one is edited
    on_build    may be set: called before the project's C++ kernels are compiled, once per machine
    """

    def __init__(
        self,
        options: RunOptions | None = None,
        visited: torch.device | None = None,
        compiler: "Callable[[Forward], Forward] | None" = None,
        recorder: "Recorder | None" = None,
        watched: bool = False,
    ):
        self.options, self.visited = options or RunOptions(), visited
        self.winograd: dict[type[nn.Module], WinogradConvolutions] = {}  # of the UNet and of the VAE
        self.compiler, self.compiled = compiler, None
        self.recorder, self.captured = recorder, None
        self.watched = watched
        self.on_compile: Callable[[torch.Size], object] | None = None
        self.on_build: Callable[[], object] | None = None
        self.weights = Weights()
        self._one_thread = threading.RLock()

    def for_watching(self) -> "Execution":
        """A copy that neither compiles nor captures the UNet, so that hooks see every layer and step."""
        execution = Execution(replace(self.options, compile=False), self.visited, watched=True)
        execution.winograd, execution.on_build, execution.weights = self.winograd, self.on_build, self.weights
        return execution

    def __reduce__(self) -> tuple:
        """Copies and pickles take options and adapters along; locks, compiled code and packed weights are made anew."""
        arguments = self.options, self.visited, self.compiler, self.recorder, self.watched
        return type(self), arguments, {"weights": self.weights}

    # What the pipeline calls

    def device(self, network: nn.Module) -> torch.device:
        return self.visited or super().device(network)

    def send(self, values: Tensor, device: torch.device) -> Tensor:
        return send(values, device)

    def notes(self, settings: Settings) -> dict[str, object]:
        options = replace(self.options, compile=self.options.compile and not settings.acts_inside)
        return {} if options == RunOptions() else {"run": asdict(options)}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with self.weights.lock:  # waits while adapters change
            self.weights.users += 1
        try:
            yield
        finally:
            with self.weights.lock:
                self.weights.users -= 1

    @property
    def adapters(self) -> tuple:
        return self.weights.adapters

    def apply(self, model: "StableDiffusion", adapters: Sequence) -> None:
        from sd.runtime.adapters import apply

        apply(model, adapters, self.weights, self.drop_copies)

    def learn(self, model: "StableDiffusion", files: Sequence) -> None:
        from sd.runtime.learned_words import learn

        learn(model, files, self.weights)

    def encode_text(self, text_encoder: TextEncoder, tokens: Tensor, *, skip_layers: int = 0) -> Tensor:
        with self.at_work(text_encoder):
            parts = tokens.split(1) if one_by_one(text_encoder.position_embedding.weight) else [tokens]
            context = torch.cat([text_encoder(part, skip_layers=skip_layers) for part in parts])
            return finite(context, "text_encoder", text_encoder)

    def encode_in_tower(
        self, tower: "TextTower", tokens: Tensor, part: str, *, skip_layers: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        with self.at_work(tower):
            parts = tokens.split(1) if one_by_one(tower.position_embedding.weight) else [tokens]
            encode = partial(super().encode_in_tower, tower, part=part, skip_layers=skip_layers)
            encoded = [encode(each) for each in parts]
        contexts, pooled = zip(*encoded, strict=True)
        return torch.cat(contexts), None if pooled[0] is None else torch.cat(pooled)

    def predictor(self, unet: UNet, settings: Settings, pictures: int) -> Predict:
        reused = None
        if settings.reuse_features > 1:
            from sd.runtime.shortcuts.feature_reuse import ReusedFeatures

            reused = ReusedFeatures(settings.reuse_features)  # each run has its own

        def predict(
            x: Tensor, timestep: Tensor, context: Tensor, vector: Tensor | None = None, guidance: Tensor | None = None
        ) -> Tensor:
            options = {"tile": settings.tile, "reused": reused, "merge": settings.merge_tokens}
            options["predictions"] = len(context) // pictures
            return self.predict(unet, x, timestep, context, vector, guidance, **options)

        return predict

    def run(self, unet: UNet, steps: Iterable[tuple[Tensor, T]]) -> Iterator[tuple[Tensor, T]]:
        def checked() -> Iterator[tuple[Tensor, T, Callable[[], bool]]]:
            for latents, beside in steps:
                yield latents, beside, is_set(latents.isfinite().all())

        with self.at_work(unet):
            ahead = self.captures(self.device(unet))
            for latents, beside, is_finite in one_ahead(checked()) if ahead else checked():
                if not is_finite():  # waits for the device
                    raise NonFiniteError("unet", unet)
                yield latents, beside

    def encode(self, vae: VAE, image: Tensor, tile: str = "") -> Tensor:
        latents = image.shape[-2:].numel() // 64
        with self._one_thread, self.at_work(vae), self._patched_vae(vae, image, latents, tile):
            if self.options.tiled_vae:
                from sd.runtime.low_memory.tiled_vae import encode_tiled

                mean, _ = encode_tiled(vae, image, axes=tile)
            else:
                mean, _ = vae.encode(image)
            return finite(mean, "vae", vae)

    def decode(self, vae: "VAE | TinyVAE", latents: Tensor, tile: str = "") -> Tensor:
        if latents.device.type == "cpu" and latents.shape[-2:].numel() >= LARGE:
            from sd.runtime.cpu.process_memory import give_back_freed_memory

            give_back_freed_memory()
        with self._one_thread, self.at_work(vae), self._patched_vae(vae, latents, latents.shape[-2:].numel(), tile):
            if self.options.tiled_vae and isinstance(vae, VAE):  # a tiny one needs little memory
                from sd.runtime.low_memory.tiled_vae import decode_tiled

                return finite(decode_tiled(vae, latents, axes=tile), "vae", vae)
            return super().decode(vae, latents)

    def estimate_depth(self, depth_network: "DepthNetwork", image: Tensor) -> Tensor:
        with self._one_thread, self.at_work(depth_network):
            return super().estimate_depth(depth_network, image)

    # How it is done

    @contextmanager
    def at_work(self, network: nn.Module) -> Iterator[None]:
        """Within this context, in all threads, the weights of a network are on the device where it computes."""
        with self.in_use(), self._visit(network):
            yield

    def _visit(self, network: nn.Module) -> AbstractContextManager[None]:
        if self.visited is None and not hasattr(network, "rests_as"):
            return nullcontext()
        with self.weights.lock:
            if self.weights.visits is None:
                from sd.runtime.low_memory.visits import Visits

                self.weights.visits = Visits(self.device(network))
        return self.weights.visits.of(network, self.weights.release)

    def drop_copies(self, layers: Iterable[nn.Module]) -> None:
        """Forget what was made of the weights of layers that are about to change: it would take memory."""
        for layer in layers:
            vars(layer).pop("_packed", None)
            for made in self.winograd.values():
                made.forget(layer)

    def predict(
        self,
        unet: UNet,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
        *,
        predictions: int = 1,
        tile: str = "",
        reused: "ReusedFeatures | None" = None,
        merge: float = 0.0,
    ) -> Tensor:
        """The UNet's prediction for x (B, C, H, W), called within `at_work`.

        predictions  for each picture. 2: the second half of x is the same as the first, and the context has the
                     negative prompts' rows first; 3: see `sd.sampling.denoiser`
        vector       (B, V) beside the context, for families that have one
        guidance     (1, G) the embedded guidance scale, for UNets distilled with it
        tile         the axes, "x" and "y", along which the picture continues at its opposite edge
        reused       the features that the run keeps from prediction to prediction; the UNet is then not compiled
        merge        the share of tokens merged before self-attention in the blocks with the most; above 0, not compiled
        """
        if reused:
            reused.begin(x, context)
        beside = {"vector": vector, "guidance": None if guidance is None else guidance.expand(len(x), -1)}
        given = {"context": context} | {name: each for name, each in beside.items() if each is not None}
        parts = self._parts(x, predictions)
        guided = predictions == 2 and not self.options.low_memory
        if len(parts) == 1:
            return self._predict(unet, x, timestep, given, guided, tile, reused, merge)
        predicted = [
            self._predict(
                *(unet, x[rows], timestep, {name: each[rows] for name, each in given.items()}),
                *(guided, tile, reused, merge, part),
            )
            for part, rows in enumerate(parts)
        ]
        order = torch.tensor([row for rows in parts for row in rows], dtype=torch.int64, device=x.device)
        return torch.cat(predicted)[order.argsort()]

    def _parts(self, x: Tensor, predictions: int) -> list[list[int]]:
        """The rows that are predicted together: all, or one picture's, or one prediction of either."""
        pictures = len(x) // predictions
        begins = [prediction * pictures for prediction in range(predictions)]
        groups = [[picture] for picture in range(pictures)] if one_by_one(x) else [list(range(pictures))]
        if self.options.low_memory:
            return [[begin + picture for picture in group] for begin in begins for group in groups]
        return [[begin + picture for begin in begins for picture in group] for group in groups]

    def _predict(
        self,
        unet: UNet,
        x: Tensor,
        timestep: Tensor,
        given: dict[str, Tensor],
        guided: bool,
        tile: str,
        reused: "ReusedFeatures | None",
        merge: float,
        part: int = 0,
    ) -> Tensor:
        """`predict` for one part of the rows, see `_parts`; given: the context, and what there is beside it."""
        same_each_time = reused is None and not merge and not self.watched

        def compiled(x: Tensor, timestep: Tensor, *values: Tensor) -> Tensor:
            x, inputs = x.contiguous(), {name: each.contiguous() for name, each in zip(given, values, strict=True)}
            with self._compiled(unet).applied(x, inputs["context"], guided=guided, tile=tile):
                return unet(x, timestep, **inputs)

        def plain(x: Tensor, timestep: Tensor, *values: Tensor) -> Tensor:
            with ExitStack() as changes:
                self._patch(changes, unet, x, x.shape[-2:].numel(), tile)
                if guided:
                    changes.enter_context(patched(computed_once(unet)))
                if reused:
                    changes.enter_context(reused.applied(unet, part))
                if merge:
                    from sd.runtime.shortcuts.token_merging import tokens_merged

                    changes.enter_context(tokens_merged(unet, merge, x))
                return unet(x, timestep, **dict(zip(given, values, strict=True)))

        predict = compiled if self.options.compile and same_each_time else plain
        with self._one_thread:
            if same_each_time and self.captures(x.device) and not torch.is_grad_enabled():
                return self._captured(unet).predict(predict, x, timestep, *given.values(), kind=(guided, tile))
            return predict(x, timestep, *given.values())

    def captures(self, device: torch.device) -> bool:
        """Whether predictions on that device are captured as CUDA graphs, if all of a run do the same operations.

        The next step then begins before the previous one is known to be finite, see `run`.
        """
        on_gpu = device.type == "cuda" or self.recorder is not None
        return on_gpu and not self.options.low_memory and not self.watched

    @contextmanager
    def _patched_vae(self, vae: "VAE | TinyVAE", x: Tensor, latents: int, tile: str) -> Iterator[None]:
        with ExitStack() as changes:
            self._patch(changes, vae, x, latents, tile, fast=not self.options.tiled_vae)
            yield

    def _patch(
        self, changes: ExitStack, network: UNet | VAE, x: Tensor, latents: int, tile: str, *, fast: bool = True
    ) -> None:
        """Patch a network's forwards for inputs like x, until the stack is closed; `latents` as in `convolutions`."""
        if fast:
            changes.enter_context(patched(self.convolutions(network, x, latents, tile)))
        if fast and x.device.type == "cpu" and x.dtype == torch.bfloat16:
            from sd.runtime.cpu.attention import attention_applied
            from sd.runtime.cpu.gates import gates_joined

            changes.enter_context(attention_applied(network, x, self._about_to_build, latents))
            changes.enter_context(gates_joined(network, x))
        if tile:
            from sd.runtime.seamless import seamless

            changes.enter_context(seamless(network, tile))

    def _give_back(self, unet: nn.Module) -> Callable[[nn.Conv2d], None]:
        """Gives back the memory of a weight that is still as it is in the file."""
        from sd.runtime.cpu.packing import origin

        names = {module: f"unet.{name}.weight" for name, module in unet.named_modules()}

        def give_back(conv: nn.Conv2d) -> None:
            weight, version = origin(conv)
            if version == 0 and weight.data_ptr() == self.weights.address(names[conv]):
                self.weights.release(names[conv])

        return give_back

    def convolutions(
        self, network: UNet | VAE, x: Tensor, latents: int, tile: str = ""
    ) -> dict[nn.Module, Callable[..., Tensor]]:
        """Faster forward functions for inputs like x, of convolutions and of upsampling followed by one.

        latents  the number of positions in the latents that belong to x
        """
        part, is_unet = type(network), isinstance(network, UNet)
        if tile or (is_unet and self.options.low_memory) or x.device.type != "cpu" or latents < LATENTS:
            return {}
        if part not in self.winograd or self.winograd[part].network is not network:
            from sd.runtime.cpu.winograd import WinogradConvolutions

            kind = WinogradConvolutions
            if is_unet and self.options.int8:
                from sd.runtime.cpu.int8 import WinogradIn8Bits as kind
            self.winograd[part] = kind(network, keep=is_unet, on_kept=self._give_back(network))
        return self.winograd[part].forwards(x, latents, self._about_to_build)

    def _compiled(self, unet: UNet) -> "CompiledUNet":
        if self.compiled is None or self.compiled.network is not unet:
            from sd.runtime.gpu.compile import CompiledUNet, compiler_for

            compiler = self.compiler or compiler_for(unet.out.conv.weight.device)
            self.compiled = CompiledUNet(unet, compiler, lambda shape: self.on_compile and self.on_compile(shape))
        return self.compiled

    def _captured(self, unet: UNet) -> "CapturedUNet":
        if self.captured is None or self.captured.network is not unet:
            from sd.runtime.gpu.cuda_graphs import CapturedUNet

            self.captured = CapturedUNet(unet, self.recorder)
        return self.captured

    def _about_to_build(self) -> None:
        callback, self.on_build = self.on_build, None  # once for all kernels
        if callback:
            callback()


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each yielded once the next one exists.

    If an item is work queued on a device, the device stays busy while the caller waits for the previous one.
    """
    items = iter(items)
    for item in items:
        for following in items:
            yield item
            item = following
        yield item
