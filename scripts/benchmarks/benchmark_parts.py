"""Measure how much each speed-up of a UNet step gains, in turn, in one process.

    python scripts/benchmarks/benchmark_parts.py                        # v1, 512x512, on this machine's CPU
    python scripts/benchmarks/benchmark_parts.py --size 256 --precision bf16 --rounds 5
    python scripts/benchmarks/benchmark_parts.py --device cuda --precision fp16 --rounds 20

Weights are made up; the step has guidance. Each round runs every variant once, on a GPU ten times, so that all see the
same state of the machine. Prints the time of each variant's fastest round, its speed relative to the plain network, and
the relative difference of its prediction, |a - b| / |b|. A variant that does not run here is named.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import make_checkpoint
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from sd.config import SD_V1
from sd.networks.build import build_networks
from sd.networks.unet import UNet
from sd.pipeline.runner import PRECISIONS
from sd.runtime.cpu.attention import attention_applied
from sd.runtime.cpu.gates import gates_joined
from sd.runtime.cpu.packing import PackedConv2d, convolutions_of, make_packed, pack
from sd.runtime.cpu.precise_norms import make_precise
from sd.runtime.cpu.winograd import WinogradConvolutions
from sd.runtime.device import pick_device
from sd.runtime.execution import Execution
from sd.runtime.gpu.compile import fastest_convolutions, reason_of
from sd.runtime.gpu.cuda_graphs import CannotCapture, CudaRecorder
from sd.runtime.patching import patched
from sd.runtime.shortcuts.shared_halves import computed_once
from sd.study.benchmark.hardware import cpu_name
from sd.study.benchmark.table import markdown
from sd.study.clock import synchronize

Change = Callable[[], AbstractContextManager]
Run = Callable[[], torch.Tensor]
BACKENDS = {"flash": "FLASH_ATTENTION", "memory-efficient": "EFFICIENT_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}


def made_up_unet(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> tuple[UNet, int]:
    """The network, and the width of its context."""
    config = make_checkpoint.tiny(SD_V1) if tiny else SD_V1
    unet = build_networks(config)["unet"].to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in unet.named_parameters():
        weight.copy_(make_checkpoint.made_up(name, weight.shape, generator))
    if device.type == "cpu":
        make_precise(unet)
    return unet.to(dtype, memory_format=torch.channels_last).requires_grad_(False), config.unet.context_width


def attention_by(backend: str) -> AbstractContextManager:
    """Attention by that PyTorch kernel where it is supported, by others elsewhere."""
    others = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([getattr(SDPBackend, backend), *others], set_priority=True)


@contextmanager
def packed_convolutions(unet: UNet) -> Iterator[None]:
    """Within this context, convolutions have packed weights."""
    convolutions = convolutions_of(unet).values()
    if any(vars(conv).get("_packed") is None for conv in convolutions):
        make_packed({conv: pack(conv, conv.weight.detach()) for conv in convolutions}, unet.out.conv.bias.dtype)
    for conv in convolutions:
        conv.__class__ = PackedConv2d
    try:
        yield
    finally:
        for conv in convolutions:
            conv.__class__ = torch.nn.Conv2d


def variants_for(unet: UNet, x_t: torch.Tensor) -> dict[str, tuple[list[Change], bool]]:
    """By name: what acts on the network when it predicts for x_t (B, C, H, W), and whether it is captured."""

    def halves() -> AbstractContextManager:
        return patched(computed_once(unet))

    if x_t.device.type != "cuda":
        latents, execution = x_t.shape[-2:].numel(), Execution()
        winograd = WinogradConvolutions(unet, keep=True)
        packed = partial(packed_convolutions, unet)
        attending, gates = partial(attention_applied, unet, x_t), partial(gates_joined, unet, x_t)

        def convolutions() -> AbstractContextManager:
            return patched(execution.convolutions(unet, x_t, latents))

        return {
            "plain": ([], False),
            "halves shared": ([halves], False),
            "packed convolutions": ([packed], False),
            "Winograd's algorithm": ([lambda: patched(winograd.forwards(x_t, latents))], False),
            "attention of ours": ([attending], False),
            "joined gates": ([gates], False),
            "all, as pictures are made": ([packed, convolutions, attending, gates, halves], False),
        }
    return {
        "plain": ([], False),
        "halves shared": ([halves], False),
        "captured": ([], True),
        "both, as pictures are made": ([halves], True),
        "both, cuDNN's fastest convolutions": ([halves, fastest_convolutions], True),
        **{
            f"both, attention by {name}": ([halves, partial(attention_by, backend)], True)
            for name, backend in BACKENDS.items()
        },
    }


def runs_of(variants: dict[str, tuple[list[Change], bool]], predict: Run, device: torch.device) -> dict[str, Run]:
    """What to run for each variant. Variants that do not run here are named on standard error and left out."""
    recorder = CudaRecorder(device) if device.type == "cuda" else None
    runs = {}
    for name, (changes, captured) in variants.items():

        def run(changes: list[Change] = changes) -> torch.Tensor:
            with ExitStack() as stack:
                for change in changes:
                    stack.enter_context(change())
                return predict()

        try:
            runs[name] = replaying(*recorder(run)) if captured else run
            runs[name]()
        except (RuntimeError, CannotCapture) as error:
            print(f"left out: {name}: {reason_of(error.__cause__ or error)}", file=sys.stderr)
            runs.pop(name, None)
    return runs


def replaying(replay: Callable[[], object], output: torch.Tensor) -> Run:
    def run() -> torch.Tensor:
        replay()
        return output

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--size", type=int, default=512, help="pixels of a side (default: %(default)s)")
    add("--batch-size", type=int, default=1, help="pictures at a time (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    add("--precision", choices=["fp32", "fp16", "bf16"], default="fp32", help="(default: %(default)s)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--tiny", action="store_true", help="a narrow network: to try the script")
    args = parser.parse_args(arguments)
    device, dtype = pick_device(args.device), PRECISIONS[args.precision]
    with torch.no_grad():
        unet, width = made_up_unet(device, dtype, tiny=args.tiny)
    side = args.size // 8
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(args.batch_size, 4, side, side, generator=generator).repeat(2, 1, 1, 1).to(device, dtype)
    context = torch.randn(2 * args.batch_size, 77, width, generator=generator).to(device, dtype)
    timestep = torch.tensor(500.0, device=device)
    together = 1 if device.type == "cpu" else 10
    outputs = {}
    with torch.no_grad():
        runs = runs_of(variants_for(unet, x_t), lambda: unet(x_t, timestep, context), device)
        seconds = dict.fromkeys(runs, math.inf)
        for _ in tqdm(range(args.rounds), unit="round", leave=False):
            for name, run in runs.items():
                synchronize(device)
                started = time.perf_counter()
                for _ in range(together):
                    output = run()
                synchronize(device)
                seconds[name] = min(seconds[name], (time.perf_counter() - started) / together)
                outputs[name] = output.float()
    plain = outputs["plain"]
    rows = [
        [
            name,
            f"{taken:.2f} s" if taken >= 1 else f"{1000 * taken:.2f} ms",
            f"{seconds['plain'] / taken:.2f}",
            f"{(outputs[name] - plain).norm() / plain.norm():.1e}",
        ]
        for name, taken in seconds.items()
    ]
    on = f"{cpu_name()}, {torch.get_num_threads()} threads"
    on = on if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{on}, {args.precision}, {args.size}x{args.size}, batch {args.batch_size}\n")
    print(markdown(["variant", "a step", "times as fast", "difference"], rows), end="")


if __name__ == "__main__":
    main()
