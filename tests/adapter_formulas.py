"""What the tensors in adapter files mean, for each kind, as slow, obvious formulas in float64.

A formula takes the weight to change, (32, i) or (32, i, k, k) in float64, and makes up tensors for it.
"""

import torch


def normal(*shape, deviation=0.5):
    return torch.randn(shape) * deviation


def check(ours, expected, weight):
    """To 1e-6 of the change, which is no small one."""
    assert (ours.dtype, ours.shape) == (torch.float32, weight.shape)
    error = (ours.double() - expected.double().reshape(ours.shape)).norm()
    assert expected.norm() > 0.05 * weight.norm()
    assert error <= 1e-6 * expected.norm()


class Made:
    """Made-up tensors of a file, and the weight that they mean, calculated step by step in float64."""

    def __init__(self, kind, parts, meant, **settings):
        self.kind, self.parts, self.meant, self.settings = kind, parts, meant, settings


def product(up, core, down):
    """Of up (o, r), core (r, q, ...) and down (q, i), one kernel position at a time; (o, i · positions)."""
    up, core, down = up.double().flatten(1), core.double().reshape(*core.shape[:2], -1), down.double().flatten(1)
    return torch.stack([up @ position @ down for position in core.unbind(-1)], dim=-1).flatten(1)


def lora_with_core(w):
    up, down, mid = normal(32, 5, 1, 1), normal(3, w.shape[1], 1, 1), normal(5, 3, *w.shape[2:])
    return Made("lora", {"up": up, "down": down, "mid": mid}, w + product(up, mid, down).reshape(w.shape))


def lokr_by_blocks(w):
    w1, w2 = normal(4, 2), normal(8, w.shape[1] // 2, *w.shape[2:])
    rows = [torch.cat([w1[i, j].double() * w2.double() for j in range(2)], dim=1) for i in range(4)]
    return Made("lokr", {"w1": w1, "w2": w2}, w + torch.cat(rows))


def loha(w):
    """The product of two low-rank matrices, number by number."""
    inputs = w[0].numel()
    w1_a, w1_b, w2_a, w2_b = normal(32, 3), normal(3, inputs), normal(32, 3), normal(3, inputs)
    added = (w1_a.double() @ w1_b.double()) * (w2_a.double() @ w2_b.double())
    return Made("loha", {"w1_a": w1_a, "w1_b": w1_b, "w2_a": w2_a, "w2_b": w2_b}, w + added.reshape(w.shape))


def glora(w, *, early=False, core=False):
    inputs, *kernel = w.shape[1:]
    a1, a2, b1, b2 = normal(inputs, 3), normal(3, inputs), normal(32, 3), normal(3, inputs, *kernel)
    parts = {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
    mixed = torch.einsum("oi...,ij->oj...", w, a1.double() @ a2.double())
    added = (b1.double() @ b2.double().flatten(1)).reshape(w.shape)
    if early:
        parts = {"a1": a2, "a2": a1, "b1": b2, "b2": b1}
    if core and kernel:
        parts |= {"b2": normal(3, inputs, 1, 1), "bm": normal(3, 3, *kernel)}
        added = product(b1, parts["bm"], parts["b2"]).reshape(w.shape)
    return Made("glora", parts, w + mixed + added)


def rotations(blocks, largest=None):
    """(I + Q)(I - Q)^-1 of Q = B - B^T, with the norm of all Q at most `largest`."""
    q = blocks.double() - blocks.double().transpose(-1, -2)
    q = q * min(1, (largest or torch.inf) / q.norm())
    eye = torch.eye(q.shape[-1]).double()
    return (eye + q) @ torch.linalg.inv(eye - q)


def oft(w, *, rescale=False, largest=None):
    blocks, factors = normal(8, 4, 4), 1 + normal(32, *[1] * (w.ndim - 1)) if rescale else torch.ones(())
    turned = torch.block_diag(*rotations(blocks, largest)).T @ w.flatten(1)
    parts = {"blocks": blocks, "rescale": factors} if rescale else {"blocks": blocks}
    return Made("oft", parts, factors.double() * turned.reshape(w.shape), constraint=largest)


def boft(w, *, rescale=False, largest=None):
    """Every stage as a full matrix: rows that are 2 * 2^stage apart come together, are turned in fours, and go back."""
    blocks, factors = normal(4, 8, 4, 4), 1 + normal(32, *[1] * (w.ndim - 1)) if rescale else torch.ones(())
    turned = w.flatten(1)
    for stage, turns in enumerate(rotations(blocks, largest)):
        apart = 2 * 2**stage
        order = [
            start + member + offset * apart
            for start in range(0, 32, 2 * apart)
            for member in range(apart)
            for offset in (0, 1)
        ]
        permutation = torch.eye(32).double()[order]
        turned = permutation.T @ torch.block_diag(*turns) @ permutation @ turned
    parts = {"blocks": blocks, "rescale": factors} if rescale else {"blocks": blocks}
    return Made("boft", parts, factors.double() * turned.reshape(w.shape), constraint=largest)


def full_difference(w):
    difference = normal(*w.shape)
    return Made("full", {"weight": difference}, w + difference.double())


def replaced(w):
    weight = normal(*w.shape)
    return Made("set", {"weight": weight}, weight.double())


def ia3_on(w, axis):
    values = normal(w.shape[axis])
    meant = w.clone()
    for index, value in enumerate(values):
        meant.select(axis, index).mul_(1 + value.double())
    stored = values if w.ndim == 2 else values[None, :, None, None]
    return Made("ia3", {"weight": stored}, meant, on_input=axis == 1)


def decomposed(w, make, axis):
    """Rows or columns of the changed weight, one by one, brought to lengths of their own."""
    made = make(w)
    lengths = 1 + normal(w.shape[axis]).abs()
    meant = made.meant.clone()
    for index, length in enumerate(lengths):
        vector = meant.select(axis, index)
        vector *= length.double() / vector.norm()
    stored = lengths.reshape([-1 if number == axis else 1 for number in range(w.ndim)])
    return Made(made.kind, made.parts | {"dora_scale": stored}, meant, **made.settings)


BY_HAND = {
    "lora with a core": lora_with_core,
    "loha": loha,
    "lokr": lokr_by_blocks,
    "glora": glora,
    "glora of early files": lambda w: glora(w, early=True),
    "glora with a core": lambda w: glora(w, core=True),
    "oft": oft,
    "oft, rescaled": lambda w: oft(w, rescale=True),
    "oft, constrained": lambda w: oft(w, largest=2.0),
    "oft, within the constraint": lambda w: oft(w, largest=2000.0),
    "boft": boft,
    "boft, rescaled": lambda w: boft(w, rescale=True),
    "boft, constrained": lambda w: boft(w, largest=2.0),
    "ia3 on outputs": lambda w: ia3_on(w, 0),
    "ia3 on inputs": lambda w: ia3_on(w, 1),
    "full": full_difference,
    "set": replaced,
    **{
        f"dora {axis} of {make.__name__}": lambda w, make=make, axis=axis: decomposed(w, make, axis)
        for make in (lora_with_core, loha, lokr_by_blocks, glora, oft, boft, full_difference)
        for axis in (0, 1)
    },
}
