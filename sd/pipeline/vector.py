"""What the UNet of Stable Diffusion XL is given beside the context: one vector about the prompt and the picture.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (2023), section 2.2.
B pictures.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sd.config import ModelConfig
from sd.networks.unet import timestep_embedding
from sd.pipeline.settings import Settings

NUMBER_WIDTH = 256  # values that stand for each number


def numbers_about(
    count: int,
    size: tuple[int, int],
    *,
    original: tuple[int, int] | tuple[()] = (),
    crop: tuple[int, int] = (0, 0),
    score: float = 6.0,
) -> list[float]:
    """The numbers in the order of the vector. Sizes and places are (height, width) here, as in the original code.

    count     that the UNet takes: 6 for the base model; 5 for the refiner, which takes a score for the size
    size      of the picture, in pixels
    original  size of a training picture before it was scaled; by default the picture's
    crop      what was cut from a training picture above and on the left
    score     aesthetic score, about 1 to 10

    Raises ValueError for another count.
    """
    if count not in (5, 6):
        raise ValueError(f"the vector has 5 or 6 numbers beside the prompt, got {count}")
    return [*(original or size), *crop, *(size if count == 6 else (score,))]


def vector_of(pooled: Tensor, numbers: Sequence[float]) -> Tensor:
    """The pooled prompts (B, P) and N numbers -> (B, P + 256 * N), in the dtype of `pooled`.

    Each number is encoded as a timestep is. It goes in as float32: bfloat16 has no 1500.
    """
    numbers = torch.tensor(numbers, dtype=torch.float32, device=pooled.device)
    encoded = timestep_embedding(numbers, NUMBER_WIDTH).flatten().to(pooled.dtype)
    return torch.cat([pooled, encoded.expand(len(pooled), -1)], dim=-1)


def vectors_for(
    config: ModelConfig,
    settings: Settings,
    texts: Sequence[tuple[str, str]],
    context: Tensor,
    pooled: Tensor,
    *,
    negative: bool,
) -> tuple[Tensor, Tensor]:
    """The context (texts, S, D) and the vectors (texts, V) of a run's prompts, or of its negative ones, each a text
    for either text encoder.

    In the base model, an empty negative prompt is zeros in both, as in the original code and in the web UI. The
    refiner's is encoded like any other.
    """
    count = (config.unet.vector_width - pooled.shape[-1]) // NUMBER_WIDTH
    if negative and config.text_encoder_2:
        given = [any(text.strip() for text in pair) for pair in texts]
        given = torch.tensor(given, dtype=torch.bool, device=context.device)
        context, pooled = context * given[:, None, None], pooled * given[:, None]
    numbers = numbers_about(
        count,
        (settings.height, settings.width),
        original=settings.original_size[::-1],
        crop=settings.crop[::-1] or (0, 0),
        score=settings.negative_aesthetic_score if negative else settings.aesthetic_score,
    )
    return context, vector_of(pooled.float(), numbers)
