"""Stable Diffusion from scratch.

    import sd

    model = sd.load("v1-5-pruned-emaonly.ckpt")
    images = model.txt2img("a photograph of an astronaut riding a horse", steps=30, seed=42)

Read the code in this order: config, tokenizer, attention, text_encoder, unet, vae, schedule, denoiser, samplers,
latent_diffusion, pipeline.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sd.runtime.loading import load

__all__ = ["__version__", "load"]


def __getattr__(name: str):
    # torch takes a second to import, and `sd --help` needs none of it
    if name == "load":
        from sd.runtime.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
