"""Fill the masked part of a picture with the colours around it, so that a run begins without what was there."""

import numpy as np
from PIL import Image


def filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with the colours of what the mask keeps (black) where it is white; where it is grey, mixed.

    picture  RGB
    mask     L, of the same size; if it is black nowhere, there are no such colours, and the picture stays as it is

    Gortler et al., "The Lumigraph" (1996), section 3.4: pull-push.
    """
    weights = (np.asarray(mask)[:, :, None] == 0).astype(np.float32)
    if not weights.any():
        return picture
    colours = _pull_push(np.asarray(picture) * weights, weights)
    return Image.composite(Image.fromarray(np.round(colours).astype(np.uint8)), picture, mask)


def _pull_push(weighted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(H, W, 3) colours times (H, W, 1) weights in [0, 1] -> colours everywhere: each level fills its gaps."""
    height, width = weights.shape[:2]
    if height == width == 1:
        return weighted / weights
    margins = [(0, height % 2), (0, width % 2), (0, 0)]
    # pull: a pixel of the coarser level is the weighted mean of four, and has at most the weight of one
    colours, total = (
        np.pad(each, margins).reshape(-(-height // 2), 2, -(-width // 2), 2, -1).sum((1, 3))
        for each in (weighted, weights)
    )
    capped = np.minimum(total, 1)
    coarse = _pull_push(colours * (capped / np.maximum(total, 1e-9)), capped)
    # push: what is missing here comes from there
    size = (2 * coarse.shape[1], 2 * coarse.shape[0])
    enlarged = [
        Image.fromarray(channel).resize(size, Image.Resampling.BILINEAR) for channel in np.moveaxis(coarse, 2, 0)
    ]
    return weighted + (1 - weights) * np.stack(enlarged, axis=2)[:height, :width]
