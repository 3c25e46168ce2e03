"""Compare v1's 3x3 convolutions by oneDNN, which PyTorch uses, and by Winograd's algorithm, in turn.

    python scripts/benchmarks/benchmark_convolutions.py                      # in bf16
    python scripts/benchmarks/benchmark_convolutions.py --precision fp32 --rounds 20

Inputs are random; both get their weights in the layout they need. Prints milliseconds of the fastest round, operations
per second by the definition of a convolution, and the error against float64, |a - b| / |b|, in a corner of the result.
"""

import argparse
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from sd.runtime.cpu.packing import convolve, pack
from sd.runtime.cpu.winograd import KERNEL, OPERATOR, is_supported, lay_out
from sd.runtime.device import PRECISIONS
from sd.study.benchmark.hardware import cpu_name
from sd.study.benchmark.table import markdown

LAYERS = [  # where, rows, inputs, outputs, height and width of the input, upsampled before
    ("UNet, 64x64", 2, 320, 320, 64, False),
    ("UNet, 64x64", 2, 640, 320, 64, False),
    ("UNet, 32x32", 2, 640, 640, 32, False),
    ("UNet, 32x32", 2, 1920, 640, 32, False),
    ("UNet, 16x16, not used there", 2, 1280, 1280, 16, False),
    ("UNet, 16x16 to 32x32", 2, 1280, 1280, 16, True),
    ("UNet, 32x32 to 64x64", 2, 640, 640, 32, True),
    ("VAE, 64x64", 1, 512, 512, 64, False),
    ("VAE, 128x128", 1, 512, 512, 128, False),
    ("VAE, 256x256", 1, 256, 256, 256, False),
    ("VAE, 512x512", 1, 128, 128, 512, False),
    ("VAE, 256x256 to 512x512", 1, 256, 256, 256, True),
]
CORNER = 8  # positions of a side


def measured(layer: tuple, dtype: torch.dtype, rounds: int) -> list[str]:
    where, rows, inputs, outputs, side, upsampled = layer
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    conv.weight.normal_(0, (9 * inputs) ** -0.5, generator=generator)
    conv.bias.normal_(generator=generator)
    conv.to(dtype)
    last = {"memory_format": torch.channels_last}
    x = torch.randn(rows, inputs, side, side, generator=generator).to(dtype).contiguous(**last)
    large = F.interpolate(x, scale_factor=2.0, mode="nearest").contiguous(**last) if upsampled else x
    packed, weights = pack(conv, conv.weight), lay_out(conv.weight, upsampled=upsampled)
    ways = {
        "direct": lambda: convolve(conv, packed, large),
        "winograd": lambda: OPERATOR.call(x, weights, conv.bias, upsampled),
    }
    corner = large[:1, :, : CORNER + 1, : CORNER + 1].double()
    exact = F.conv2d(corner, conv.weight.double(), conv.bias.double(), padding=1)[:, :, :CORNER, :CORNER]
    seconds, errors = dict.fromkeys(ways, math.inf), {}
    for _ in range(1 + rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            found = way()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
            found = found[:1, :, :CORNER, :CORNER].double()
            errors[name] = ((found - exact).norm() / exact.norm()).item()
    operations = 2 * 9 * inputs * outputs * large.shape[-2:].numel() * rows
    return [
        where,
        f"{inputs} to {outputs}",
        *(f"{1000 * taken:.1f}" for taken in seconds.values()),
        *(f"{operations / taken / 1e9:.0f}" for taken in seconds.values()),
        f"{seconds['direct'] / seconds['winograd']:.2f}",
        *(f"{error:.1e}" for error in errors.values()),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small maps: to try the script")
    args = parser.parse_args(arguments)
    dtype = PRECISIONS[args.precision]
    if not is_supported(torch.device("cpu"), dtype) or KERNEL.library() is None:
        print(
            "Winograd's algorithm does not run on this CPU in that precision, or there is no compiler", file=sys.stderr
        )
        return 2
    layers = [(where, 1, 32, 64, 8, upsampled) for where, *_, upsampled in LAYERS[-2:]] if args.tiny else LAYERS
    with torch.no_grad():
        rows = [measured(layer, dtype, args.rounds) for layer in tqdm(layers, unit="layer", leave=False)]
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, {args.precision}\n")
    heads = ["layer", "channels", "direct, ms", "Winograd, ms", "direct, GFLOP/s", "Winograd, GFLOP/s", "times as fast"]
    print(markdown([*heads, "error, direct", "error, Winograd"], rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
