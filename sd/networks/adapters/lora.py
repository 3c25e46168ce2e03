"""Low-rank adaptation: the change of a weight is the product of two thin matrices.

o outputs, i inputs, k side of the kernel, r rank. Factors come as files store them, as matrices or as convolutions.
A change has a row per output and a column per value that one output reads, i·k·k.
"""

import torch
from torch import Tensor


def low_rank(up: Tensor, down: Tensor, core: Tensor | None = None) -> Tensor:
    """The product of two factors, or of three: a core between them is a Tucker decomposition of a kernel.

    up       (o, r) or (o, r, 1, 1)
    down     (r, i·k·k) or (r, i, k, k); with a core (r, i) or (r, i, 1, 1)
    core     (r, r, k, k), first the rank of `up`
    returns  (o, i·k·k) fp32
    """
    if core is not None:
        down = torch.einsum("rq...,qi->ri...", core.float(), down.float().flatten(1))
    return up.float().flatten(1) @ down.float().flatten(1)


def lora(base: Tensor, scale: float, up: Tensor, down: Tensor, mid: Tensor | None = None) -> Tensor:
    """ΔW = scale · B A, where B is `up` and A is `down`. Returns (o, i·k·k).

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), eq. 3. For a convolution (LoCon), the
    kernel is in `down`, or in `mid` if there is one.
    """
    return low_rank(scale * up.float(), down, mid)


def dora(base: Tensor, change: Tensor, *, dora_scale: Tensor | None = None, magnitude: Tensor | None = None) -> Tensor:
    """W' - W, where a trained length replaces that of each row or column of W + ΔW.

    base        (o, i, ...)
    change      ΔW of the same shape, fp32, at full strength
    dora_scale  (o, 1, ...), one length per output, or (1, i, ...), one per input, as the first LyCORIS files have it
    magnitude   o lengths in any shape, always per output; PEFT's name

    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), eq. 5: W' = m (W + ΔW) / |W + ΔW|.
    Programs disagree: ComfyUI divides by |W| where lengths are per output, the AUTOMATIC1111 web UI reads every length
    as per input, and LyCORIS keeps all of ΔW at any strength.
    """
    length = dora_scale if magnitude is None else magnitude
    axis = 0
    if magnitude is None and length.numel() == base.shape[1]:  # with as many outputs, the shape decides
        axis = int(length.numel() != base.shape[0] or length.numel() > length.shape[0])
    moved = base + change
    others = [number for number in range(base.ndim) if number != axis]
    now = torch.linalg.vector_norm(moved, dim=others, keepdim=True).clamp(min=1e-12)  # a row of zeros stays one
    return moved.mul_(length.float().reshape(now.shape) / now).sub_(base)
