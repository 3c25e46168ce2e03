"""Relatives of LoRA: other ways to write the change of a weight with few numbers.

All are called as `lora` is: the base weight W (o, i) or (o, i, k, k), a factor for the result, and the tensors of the
file by name. They return ΔW with o rows in fp32. The letters are those of lora.py.

Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation" (2024), compare them.
"""

import torch
from torch import Tensor

from sd.networks.adapters.lora import low_rank


def loha(
    base: Tensor,
    scale: float,
    w1_a: Tensor,
    w1_b: Tensor,
    w2_a: Tensor,
    w2_b: Tensor,
    t1: Tensor | None = None,
    t2: Tensor | None = None,
) -> Tensor:
    """ΔW = scale · (A₁ B₁) ⊙ (A₂ B₂): an element-wise product of two products has up to the square of their rank.

    With cores t1 and t2 (r, r, k, k), w1_a and w2_a are stored as (r, o).

    Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning" (2022),
    prop. 1; with cores prop. 3.
    """
    w1_a = scale * (w1_a if t1 is None else w1_a.T).float()
    w2_a = w2_a if t2 is None else w2_a.T
    return low_rank(w1_a, w1_b, t1).mul_(low_rank(w2_a, w2_b, t2))


def lokr(
    base: Tensor,
    scale: float,
    w1: Tensor | None = None,
    w2: Tensor | None = None,
    w1_a: Tensor | None = None,
    w1_b: Tensor | None = None,
    w2_a: Tensor | None = None,
    w2_b: Tensor | None = None,
    t2: Tensor | None = None,
) -> Tensor:
    """ΔW = scale · W₁ ⊗ W₂: each value of the small W₁ multiplies a copy of W₂, which has the kernel.

    Each is stored whole, or as a product of low rank. With a core t2 (r, r, k, k), w2_a is stored as (r, rows of W₂).

    Edalati et al., "KronA: Parameter Efficient Tuning with Kronecker Adapter" (2022); Yeh et al., section 3.2.
    """
    if w1 is None:
        w1 = low_rank(w1_a, w1_b)
    if w2 is None:
        w2 = low_rank(w2_a if t2 is None else w2_a.T, w2_b, t2)
    return torch.kron(scale * w1.float().flatten(1), w2.float().flatten(1))


def glora(
    base: Tensor, scale: float, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, bm: Tensor | None = None
) -> Tensor:
    """ΔW = scale · (W A + B), where A = a1 a2 mixes the inputs of W, and B = b1 b2.

    a1 (i, r), a2 (r, i), b1 (o, r), b2 (r, i·k·k), and bm (r, r, k, k) as the core of B. Early LyCORIS files have both
    pairs the other way round, a1 (r, i) and b1 (r, i·k·k), which their shapes tell.

    Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning" (2023), the terms A and B.
    """
    a1, a2, b1, b2 = (part.float().flatten(1) for part in (a1, a2, b1, b2))
    if b1.shape[0] != len(base):
        a1, a2, b1, b2 = a2, a1, b2, b1
    read = base[:, : len(a1)].float().reshape(len(base), len(a1), -1)
    mixed = (read.mT @ (scale * a1) @ a2).mT  # (o, i, k·k), along i
    return low_rank(scale * b1, b2, bm).add_(mixed.flatten(1))


def ia3(
    base: Tensor, scale: float, weight: Tensor | None = None, factor: Tensor | None = None, *, on_input: bool
) -> Tensor:
    """ΔW = scale · W w: every output, or else every input, is multiplied by 1 + w.

    weight  w as LyCORIS stores it, o or i values in any shape
    factor  1 + w, as PEFT stores it

    Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (2022),
    section 3.3, where 1 + w is called l.
    """
    w = scale * (weight.float() if factor is None else factor.float() - 1).flatten()
    if on_input:
        return base[:, : len(w)] * w.reshape(-1, *[1] * (base.ndim - 2))
    return base.flatten(1) * w[:, None]


def full(base: Tensor, scale: float, weight: Tensor | None = None) -> Tensor:
    """ΔW = scale · D: the difference itself is stored; no change if there is none, as beside that of a bias."""
    return (
        torch.zeros(base.shape, dtype=torch.float32, device=base.device) if weight is None else scale * weight.float()
    )


def replacement(base: Tensor, scale: float, weight: Tensor) -> Tensor:
    """ΔW = scale · (D - W): the new weight is stored. ComfyUI, whose spelling it is, ignores the strength."""
    known = base if weight.numel() == base.numel() else base[:, : weight.shape[1]]
    return (weight.float().reshape(known.shape) - known).mul_(scale)


def skew(blocks: Tensor, constraint: float | None) -> Tensor:
    """Q = B - Bᵀ for each block B (..., n, n), shrunk until the norm of all together is at most the constraint."""
    q = blocks.float() - blocks.float().mT
    if constraint and (norm := torch.linalg.vector_norm(q)) > constraint:
        q = q * (constraint / norm)
    return q


def oft(
    base: Tensor, scale: float, blocks: Tensor, rescale: Tensor | None = None, *, constraint: float | None
) -> Tensor:
    """ΔW = scale · (s Rᵀ W - W), with a rotation R of the outputs, block by block, and if stored a factor s per output.

    blocks      (count, n, n), count · n = o
    rescale     o values in any shape
    constraint  the largest norm of Q, alpha · o in files of Kohya and LyCORIS; None or 0 sets no limit

    Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (2023), with R = (I + Q)(I - Q)⁻¹,
    Cayley's form. Kohya and LyCORIS multiply by Rᵀ, and so do we. ComfyUI limits Q to alpha alone and applies the
    strength twice; LyCORIS applies s in full at any strength.
    """
    q = skew(blocks, constraint)
    rows = base.float().reshape(*q.shape[:2], -1)
    turn = torch.linalg.solve(torch.eye(q.shape[-1], dtype=torch.float32, device=q.device) + q, -2 * q)  # Rᵀ - I
    return _scaled(base, (turn @ rows).reshape(len(base), -1), rescale, scale)


def boft(
    base: Tensor, scale: float, blocks: Tensor, rescale: Tensor | None = None, *, constraint: float | None
) -> Tensor:
    """ΔW = scale · (s R_m … R_1 W - W): all outputs are turned by m stages of small rotations, as in a butterfly.

    blocks  (m, count, n, n), count · n = o, n even; stage j of 0 … m-1 joins rows that are n/2 · 2ʲ apart
    The rest is as in `oft`.

    Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization" (2024). At strengths other than
    1, LyCORIS weakens every stage, the AUTOMATIC1111 web UI the first and the result; here it is the result alone.
    """
    q = skew(blocks, constraint)
    eye = torch.eye(q.shape[-1], dtype=torch.float32, device=q.device)
    rows = base.float().flatten(1)
    for stage, turn in enumerate(torch.linalg.solve(eye - q, eye + q)):  # R
        pairs = rows.unflatten(0, (-1, 2, q.shape[-1] // 2 * 2**stage)).transpose(1, 2)  # joined rows become neighbours
        turned = (turn @ pairs.reshape(*turn.shape[:2], -1)).reshape(pairs.shape)
        rows = turned.transpose(1, 2).flatten(0, 2)
    return _scaled(base, rows - base.flatten(1), rescale, scale)


def _scaled(base: Tensor, change: Tensor, rescale: Tensor | None, scale: float) -> Tensor:
    """scale · (s (W + ΔW) - W)"""
    if rescale is not None:
        base = base.flatten(1)
        change = (base + change).mul_(rescale.float().reshape(-1, 1)).sub_(base)
    return change.mul_(scale)
