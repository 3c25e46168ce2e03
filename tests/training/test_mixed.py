"""Training in bf16 on a CPU: the replaced layers compute what they replace, and only where they should."""

import pytest
import torch
import torch.nn.functional as F

from sd.training import mixed
from sd.training.mixed import FasterInHalf, mixed_precision

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _gradients():
    with torch.enable_grad():
        yield


def with_gradient(function, *inputs):
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    output = function(*inputs)
    output.float().square().sum().backward()
    return [output.detach().float(), *(value.grad.float() for value in inputs)]


def normed(x, weight, bias):
    return F.group_norm(x, 4, weight, bias, 1e-5)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


LAYERS = {
    "group norm": (normed, [(2, 8, 6, 6), (8,), (8,)]),
    "attention": (F.scaled_dot_product_attention, [(2, 2, 9, 8), (2, 2, 5, 8), (2, 2, 5, 8)]),
    "causal attention": (causal, [(2, 2, 9, 8)] * 3),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_and_gradients_are_those_of_the_layer(layer, monkeypatch):
    monkeypatch.setattr(mixed, "CACHED", 100)  # one picture at a time
    function, shapes = LAYERS[layer]
    inputs = [torch.randn(shape, generator=GENERATOR) for shape in shapes]
    inputs = [value.bfloat16() if value.ndim > 1 else value for value in inputs]  # weights stay in float32
    exact = with_gradient(function, *(value.float() for value in inputs))
    with FasterInHalf():
        found = with_gradient(function, *inputs)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_float32_is_left_alone():
    q = torch.randn(1, 2, 5, 8, generator=GENERATOR)
    plain = F.scaled_dot_product_attention(q, q, q)
    with FasterInHalf():
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), plain)


@pytest.mark.parametrize("enabled", [True, False])
def test_products_are_in_half_precision_if_enabled_and_inside_only(enabled):
    x = torch.randn(3, 3, generator=GENERATOR)
    with mixed_precision(CPU, enabled=enabled):
        assert (x @ x).dtype == (torch.bfloat16 if enabled else torch.float32)
    assert (x @ x).dtype == torch.float32
