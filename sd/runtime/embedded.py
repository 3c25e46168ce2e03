"""The model that comes with the package: small, trained by us on drawn shapes, used where no other is asked for."""

from pathlib import Path

NAME = "sd-shapes.ckpt"


def embedded_model() -> Path:
    """Where it lies: inside the installed package, or in the checkout beside it."""
    package = Path(__file__).parents[1]
    installed = package / "weights" / NAME
    return installed if installed.exists() else package.parent / "weights" / NAME
