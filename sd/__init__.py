"""Stable Diffusion from scratch.

    import sd

    model = sd.load("v1-5-pruned-emaonly.ckpt")
    images = model.txt2img("a photograph of an astronaut riding a horse", steps=30, seed=42)
    sd.list_models()          # the families that can be loaded: ["sd-v1", ..., "sdxl-refiner"]
    sd.get_config("sdxl")     # every number of one of them

Read the code in this order: config, text, networks, sampling, pipeline. The other folders make it fast, train it,
explain it and put it behind commands.
"""

__version__ = "0.1.0"
TYPE_CHECKING = False  # true for type checkers; `typing` itself takes longer to import than the rest of this file

if TYPE_CHECKING:
    from sd.config import get_config, list_models
    from sd.pipeline.image import tensors as image
    from sd.runtime.loading import load

__all__ = ["__version__", "get_config", "image", "list_models", "load"]


def __getattr__(name: str):
    # torch takes a second to import, and `sd --help` needs none of it
    if name == "load":
        from sd.runtime.loading import load

        return load
    if name == "image":
        from sd.pipeline.image import tensors

        return tensors
    if name in ("get_config", "list_models"):
        from sd import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
