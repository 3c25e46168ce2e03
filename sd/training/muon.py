"""Muon, an optimiser for weight matrices: each step moves a matrix equally far in every direction that it uses.

A gradient mostly says a few things loudly. AdamW evens out its numbers one by one, Muon its singular values. The small
model's autoencoder gets in 40 steps as far as with AdamW in 160.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # of the polynomial; from Jordan et al., who tuned it to converge fast, not exactly
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about 1: between 0.7 and 1.2.

    matrices  (..., rows, columns)
    returns   the same

    Newton-Schulz iteration: x <- (A + B x x^T + C (x x^T)^2) x applies the odd polynomial A s + B s^3 + C s^5 to every
    singular value s. All factors are polynomials in the first x x^T, so they are multiplied before they meet x, by
    products of the short side only: a third of the time.
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide.to(torch.float64 if matrices.is_cuda else torch.float32)  # for squares of small values, TF32 is too coarse
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # so that no singular value is above 1
    square = x @ x.mT
    total = identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for _ in range(ITERATIONS):
        factor = A * identity + B * square + C * (square @ square)
        total, square = factor @ total, factor @ square @ factor
    x = (total @ x).to(matrices.dtype)
    return x if wide is matrices else x.mT


def orthogonalise_together(stacks: list[Tensor]) -> list[Tensor]:
    """`orthogonalise` for each (N, rows, columns). Every process has them all, computes a share, and gets the rest."""
    if not dist.is_initialized():
        return [orthogonalise(matrices) for matrices in stacks]
    world, rank = dist.get_world_size(), dist.get_rank()
    results = [torch.empty_like(matrices) for matrices in stacks]
    shares = []  # (owner, its matrices, where their results go); owners take turns, also with stacks of one matrix
    for i, (matrices, result) in enumerate(zip(stacks, results, strict=True)):
        each = math.ceil(len(matrices) / world)
        parts = zip(matrices.split(each), result.split(each), strict=True)
        shares += [((i + j) % world, *part) for j, part in enumerate(parts)]
    for owner, part, place in shares:
        if owner == rank:
            place.copy_(orthogonalise(part))
    for owner, _, place in shares:
        dist.broadcast(place, owner)
    return results


class Muon(torch.optim.Optimizer):
    """For matrices and kernels, whose rows are output channels; everything else is left to AdamW.

    The updates' root mean square is 0.2, about that of AdamW, so both share a learning rate and a weight decay: Liu et
    al., "Muon is Scalable for LLM Training" (2025), eq. 4. Matrices of the same shape are orthogonalised together, and
    processes that train together divide them among themselves.
    """

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for value in group["params"]:
                alike[value.flatten(1).shape].append(value)
            momentum = group["momentum"]
            ahead = [torch.stack([self.ahead(value, momentum) for value in values]) for values in alike.values()]
            for (shape, values), updates in zip(alike.items(), orthogonalise_together(ahead), strict=True):
                size = 0.2 * math.sqrt(max(shape)) * group["lr"]
                for value, update in zip(values, updates, strict=True):
                    value.mul_(1 - group["lr"] * group["weight_decay"])
                    value.sub_(update.reshape(value.shape), alpha=size)

    def ahead(self, value: Tensor, momentum: float) -> Tensor:
        """(rows, columns): the averaged gradient, a step ahead as in Nesterov's method"""
        state = self.state[value]
        if not state:
            state["momentum"] = torch.zeros_like(value)
        state["momentum"].lerp_(value.grad, 1 - momentum)
        return value.grad.lerp(state["momentum"], momentum).flatten(1)


def is_matrix(name: str, value: Tensor) -> bool:
    """Whether Muon is for this parameter: not for vectors, nor for tables of embeddings."""
    return value.ndim > 1 and not name.endswith("embedding.weight")
