"""What the training scripts have in common: how they begin on a GPU, and how they end where training cannot go on."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch


def run(main: Callable[[], None]) -> None:
    """Run a script; wrong files, other options than before, and a loss that is not finite are what it may end with."""
    try:
        main()
    except (ValueError, ArithmeticError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)


def use_fast_products(device: torch.device) -> None:
    """Let NVIDIA's GPUs round the factors of float32 products to TF32, which is lost in the noise of a batch."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
