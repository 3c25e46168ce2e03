"""Measure what each of the things is worth that make a step of the UNet faster, in turn, in one process.

    python scripts/benchmark_parts.py                        # v1, 512x512, on this machine's processor
    python scripts/benchmark_parts.py --size 256 --precision bf16 --rounds 5

Made-up weights; one step with guidance. Every variant is run once in each round, so that all see the same machine.
Printed are the seconds of each variant's fastest round, how many times as fast that is as the plain network, and by how
much its prediction differs from the plain one's, |a - b| / |b|.
"""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from score_samplers import markdown
from tqdm import tqdm

from sd.config import SD_V1
from sd.machine import cpu_name
from sd.networks import build_networks
from sd.running.fast_attention import attention_applied
from sd.running.joined_gates import gates_joined
from sd.running.packing import PackedConvolutions
from sd.running.precise_norms import make_precise
from sd.running.shared_halves import halves_shared, twice
from sd.runtime import PRECISIONS
from sd.unet import UNet


def made_up_unet(dtype: torch.dtype) -> UNet:
    unet = build_networks(SD_V1)["unet"].to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in unet.parameters():
        weight.normal_(0, 0.02, generator=generator)
    make_precise(unet)
    return unet.to(dtype, memory_format=torch.channels_last)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--size", type=int, default=512, help="pixels of a side (default: %(default)s)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="(default: %(default)s)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    dtype = PRECISIONS[args.precision]
    unet = made_up_unet(dtype)
    packed = PackedConvolutions(unet)

    def attending() -> AbstractContextManager[None]:
        return attention_applied(unet, x_t)

    def joined() -> AbstractContextManager[None]:
        return gates_joined(unet, x_t)

    variants: dict[str, list[Callable[[], AbstractContextManager]]] = {
        "plain": [nullcontext],
        "halves shared": [lambda: halves_shared(unet)],
        "packed convolutions": [packed.applied],
        "attention of ours": [attending],
        "joined gates": [joined],
        "all, as pictures are made": [packed.applied, attending, joined, lambda: halves_shared(unet)],
    }
    side = args.size // 8
    generator = torch.Generator().manual_seed(1)
    x_t = twice(torch.randn(1, 4, side, side, generator=generator)).to(dtype)
    context = torch.randn(2, 77, SD_V1.unet.context_width, generator=generator).to(dtype)
    seconds = dict.fromkeys(variants, math.inf)
    outputs = {}
    with torch.no_grad(), tqdm(total=(1 + args.rounds) * len(variants), unit="step", leave=False) as bar:
        for number in range(1 + args.rounds):  # the first one warms up
            for name, changes in variants.items():
                with ExitStack() as stack:
                    for change in changes:
                        stack.enter_context(change())
                    started = time.perf_counter()
                    outputs[name] = unet(x_t, torch.tensor(500.0), context).float()
                    taken = time.perf_counter() - started
                if number > 0:
                    seconds[name] = min(seconds[name], taken)
                bar.update()
    plain = outputs["plain"]
    rows = [
        [
            name,
            f"{taken:.2f} s",
            f"{seconds['plain'] / taken:.2f}",
            f"{(outputs[name] - plain).norm() / plain.norm():.1e}",
        ]
        for name, taken in seconds.items()
    ]
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, {args.precision}, {args.size}x{args.size}\n")
    print(markdown(["variant", "a step", "times as fast", "difference"], rows), end="")


if __name__ == "__main__":
    main()
