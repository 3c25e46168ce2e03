"""Packed convolutions give the same predictions, and the network knows nothing of them."""

import pytest
import torch
from conftest import TINY, fill, pixels, settings
from torch import nn

from sd.runtime.cpu.packing import PackedConvolutions, can_pack
from sd.runtime.patching import exchanged

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="this build of PyTorch has no oneDNN"
)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x_t, context = torch.randn(2, 4, 8, 9, generator=generator), torch.randn(2, 77, 64, generator=generator)
    return x_t.to(dtype), torch.tensor(321.5), context[..., : TINY.unet.context_width].to(dtype)


@pytest.fixture
def unet():
    return fill(TINY)["unet"]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_prediction_is_the_same(unet, dtype, error):
    """Where bf16 cannot be packed, the plain weights run."""
    unet.to(dtype)
    plain = unet(*inputs(dtype)).float()
    with exchanged(PackedConvolutions(unet).forwards()):
        packed = unet(*inputs(dtype)).float()
    assert (packed - plain).norm() / plain.norm() < error
    assert torch.equal(unet(*inputs(dtype)).float(), plain)


@torch.no_grad()
def test_every_convolution_is_packed_and_packed_once(unet, monkeypatch):
    import sd.runtime.cpu.packing

    made = []
    monkeypatch.setattr(
        sd.runtime.cpu.packing,
        "pack",
        lambda *given, own=sd.runtime.cpu.packing.pack: made.append(given[0]) or own(*given),
    )
    packed = PackedConvolutions(unet)
    for _ in range(2):
        with exchanged(packed.forwards()):
            unet(*inputs())
    assert set(made) == {module for module in unet.modules() if isinstance(module, nn.Conv2d)}
    assert len(made) == len(set(made))


@torch.no_grad()
def test_changed_weights_are_packed_anew(unet):
    packed = PackedConvolutions(unet)

    def predicted():
        with exchanged(packed.forwards()):
            return unet(*inputs())

    def expect_plain(before):
        plain = unet(*inputs())
        assert (predicted() - plain).norm() / plain.norm() < 1e-5
        assert (before - plain).norm() / plain.norm() > 1e-3

    before = predicted()
    unet.out.conv.weight.mul_(2)
    expect_plain(before)
    before = predicted()
    unet.out.conv.weight = nn.Parameter(-unet.out.conv.weight)
    expect_plain(before)
    before = predicted()
    unet.requires_grad_(True)  # in training: some optimisers change weights without a trace
    optimiser = torch.optim.AdamW(unet.parameters(), lr=0.01, fused=True)
    for weight in unet.parameters():
        weight.grad = torch.ones_like(weight)
    optimiser.step()
    expect_plain(before)
    assert not packed._packed
    unet.requires_grad_(False)
    before = predicted()
    unet.to(torch.float64)  # is not packed: the plain ones run
    assert (packed_in_double(packed, unet) - before).norm() / before.norm() < 1e-5


def packed_in_double(packed, unet):
    with exchanged(packed.forwards()):
        return unet(*inputs(torch.float64)).float()


@torch.no_grad()
def test_activations_lie_in_channels_last_order_whatever_comes_in():
    conv = nn.Conv2d(4, 16, 3, padding=1).requires_grad_(False)
    with exchanged(PackedConvolutions(nn.Sequential(conv)).forwards()):
        assert conv(torch.randn(2, 4, 8, 8)).is_contiguous(memory_format=torch.channels_last)


def test_weights_and_their_names_stay_what_they_are(unet):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    packed = PackedConvolutions(unet)
    with exchanged(packed.forwards()):
        assert list(unet.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert not any("forward" in vars(module) for module in unet.modules())


def test_pictures_are_made_with_packed_convolutions(model, monkeypatch):
    import sd.runtime.cpu.packing

    seen = []
    monkeypatch.setattr(
        sd.runtime.cpu.packing,
        "convolve",
        lambda *given, own=sd.runtime.cpu.packing.convolve: seen.append(1) or own(*given),
    )
    model.make([settings(steps=2)])
    assert len(seen) == 2 * len(model.execution.packed.convolutions)


@torch.no_grad()
def test_convolutions_are_packed_while_the_file_is_read(tiny_ckpt, monkeypatch):
    import sd

    for precision in ("fp32", "bf16"):
        model = sd.load(tiny_ckpt, device="cpu", precision=precision)
        monkeypatch.setattr(sd.runtime.cpu.packing, "pack", None)  # nothing is packed later on
        packed = model.execution.packed
        if can_pack(torch.device("cpu"), model.dtypes["unet"]):
            assert set(packed._packed) == set(packed.convolutions)
        x_t, timestep, context = inputs(model.dtypes["unet"])
        with exchanged(packed.forwards()):
            found = model._unet(x_t, timestep, context).float()
        plain = model.unet(x_t, timestep, context).float()
        assert (found - plain).norm() / plain.norm() < (1e-5 if precision == "fp32" else 3e-2)
        monkeypatch.undo()


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


@pytest.fixture
def lean(tiny_ckpt):
    """A model whose convolutions have packed weights only."""
    import sd

    if not can_pack(torch.device("cpu"), torch.bfloat16):
        pytest.skip("this processor does not pack bf16")
    model = sd.load(tiny_ckpt, device="cpu", precision="bf16")
    assert all(conv.weight.is_meta for conv in convolutions(model._unet))
    return model


def test_weights_in_another_precision_than_the_files_are_there_once_until_somebody_looks(lean, tiny_state, tiny_ckpt):
    import sd

    batch = [settings(steps=2)]
    picture = pixels(lean.make(batch)[0])
    assert all(conv.weight.is_meta for conv in convolutions(lean._unet))
    assert lean.device == torch.device("cpu")
    assert lean.dtypes["unet"] == torch.bfloat16
    exact = sd.load(tiny_ckpt, device="cpu", precision="fp32")
    assert not any(conv.weight.is_meta for conv in convolutions(exact._unet))  # these lie in the mapped file
    for name, weight in exact.unet.state_dict().items():
        assert torch.equal(lean.unet.state_dict()[name], weight.bfloat16())
    assert lean.unet is lean._unet
    assert not any(conv.weight.is_meta for conv in convolutions(lean._unet))
    assert (pixels(lean.make(batch)[0]) == picture).all()
    with torch.no_grad():
        lean.unet.out.conv.weight.zero_()
    assert (pixels(lean.make(batch)[0]) != picture).any()  # and weights that are changed are seen


@pytest.mark.parametrize("changed", ["low_memory", "compile", "tile", "packing", "precision"])
def test_a_network_is_whole_where_it_runs_by_its_plain_weights(lean, changed, monkeypatch):
    from sd.runtime.device import RunOptions
    from sd.runtime.execution import Execution

    picture = pixels(lean.make([settings(steps=2)])[0])
    again = settings(steps=2, tile="x" if changed == "tile" else "")
    if changed == "packing":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    elif changed == "precision":
        lean.unet.float()
    elif changed != "tile":
        lean.execution = Execution(RunOptions(**{changed: True}), compiler=lambda function: function)
    found = pixels(lean.make([again])[0])
    assert not any(conv.weight.is_meta for conv in convolutions(lean._unet))
    assert changed == "tile" or abs(found - picture).mean() < 8


def test_a_network_that_is_shown_has_all_of_its_weights(lean):
    """Whoever holds a model can look at it, copy it, and move it."""
    import copy
    import dataclasses

    other = dataclasses.replace(lean)
    assert not any(conv.weight.is_meta for conv in convolutions(other._unet))
    copied = copy.deepcopy(lean.unet)
    assert torch.equal(copied.out.conv.weight, lean.unet.out.conv.weight)


def test_a_watched_step_takes_no_more_memory(lean):
    from sd.study.benchmark.layer_kinds import Rates
    from sd.study.benchmark.measuring import profile_step

    profile_step(lean, [settings(steps=2)], Rates(operations=1e9, bytes=1e9))
    assert all(conv.weight.is_meta for conv in convolutions(lean._unet))
