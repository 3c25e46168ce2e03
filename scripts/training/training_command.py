"""What the training and scoring scripts share: their parser, faster products on a GPU, and errors as one sentence."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def parser_of(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def run(main: Callable[[], None]) -> None:
    """Run a script; invalid files, changed options and a loss that is not finite end it with a sentence and code 2."""
    try:
        main()
    except (ValueError, ArithmeticError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)


def use_fast_products(device: torch.device) -> None:
    """Let NVIDIA GPUs round the factors of float32 products to TF32; the error vanishes in the noise of a batch."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
