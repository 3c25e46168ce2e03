"""Feed-forwards with joined gates follow the formula, more closely than PyTorch's own functions in bf16."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, fill
from torch.overrides import TorchFunctionMode

from sd.networks.attention import GEGLU
from sd.runtime.cpu.gates import LINEAR as JOINED
from sd.runtime.cpu.gates import gates_joined
from sd.runtime.cpu.packing import can_pack
from sd.runtime.execution import Execution
from sd.study.benchmark.layer_kinds import LINEAR, NORM, kind_of, operations_of

BF16 = torch.bfloat16
needs_onednn = pytest.mark.skipif(
    JOINED is None or not can_pack(torch.device("cpu"), BF16), reason="no oneDNN that knows bf16 on this processor"
)


def feed_forward(width=48):
    generator, layer = torch.Generator().manual_seed(0), GEGLU(width)
    for weight in layer.parameters():
        weight.detach().normal_(0, weight.shape[-1] ** -0.5, generator=generator)
    return layer.requires_grad_(False).to(BF16)


def formula(layer, x):
    """Shazeer (2020), eq. 6, in float64, with the error function written out."""
    weight, bias = layer.proj_in.weight.double(), layer.proj_in.bias.double()
    half = len(weight) // 2
    value, gate = x.double() @ weight[:half].T + bias[:half], x.double() @ weight[half:].T + bias[half:]
    hidden = value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return hidden @ layer.proj_out.weight.double().T + layer.proj_out.bias.double()


@needs_onednn
@pytest.mark.parametrize("tokens", [1, 130])
def test_the_error_is_less_than_without_and_rows_do_not_depend_on_the_batch(tokens):
    layer = feed_forward()
    x = torch.randn(3, tokens, 48, generator=torch.Generator().manual_seed(1)).to(BF16)
    plain = layer(x)
    for factor in (1, 2):  # weights that change are seen
        layer.proj_in.weight.mul_(factor)
        exact = formula(layer, x)
        with gates_joined(layer, x):
            joined = layer(x)
            assert all(torch.equal(layer(x[row : row + 1])[0], joined[row]) for row in range(3))
        errors = [((each.double() - exact).norm() / exact.norm()).item() for each in (joined, layer(x))]
        assert errors[0] < 4e-3  # bf16 rounds by 1.7e-3 in the mean, here twice
        assert errors[0] < 1.05 * errors[1]
    layer.proj_in.weight.div_(2)
    assert torch.equal(layer(x), plain)


class Operations(TorchFunctionMode):
    """By kinds, as `sd bench` counts them; and how often the GELU was called by itself."""

    def __init__(self):
        super().__init__()
        self.operations, self.gelus, self.kinds = 0, 0, set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        kind = kind_of(function, args)
        self.kinds.add(kind)
        self.gelus += function is F.gelu
        if kind == LINEAR:
            self.operations += operations_of(function, args, result)
        return result


@needs_onednn
def test_predictions_use_them_and_their_operations_are_counted_the_same():
    unet = fill(TINY)["unet"].to(BF16)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, 4, 8, 9, generator=generator).to(BF16)
    context = torch.randn(1, 77, TINY.unet.context_width, generator=generator).to(BF16)
    with Operations() as before:
        plain = unet(x_t, torch.tensor(500.0), context).float()
    with Operations() as after:
        found = Execution().predict(unet, x_t, torch.tensor(500.0), context).float()
    assert (found - plain).norm() / plain.norm() < 3e-2
    assert before.gelus > 0
    assert after.gelus == 0
    assert before.operations == after.operations
    assert before.kinds == after.kinds >= {LINEAR, NORM}


def test_other_precisions_and_training_go_without():
    layer = feed_forward()
    for x, grad in ((torch.randn(1, 5, 48), False), (torch.randn(1, 5, 48).to(BF16), True)):
        with torch.set_grad_enabled(grad), gates_joined(layer, x):
            assert "forward" not in vars(layer)
