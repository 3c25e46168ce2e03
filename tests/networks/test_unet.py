"""The UNet's block plan, and mistakes that raise no error; test_parity compares its numbers with diffusers."""

import math

import pytest
import torch
from conftest import TINY

import sd.networks.unet
from sd.config import SD_V1
from sd.networks.block_plan import block_plan
from sd.networks.build import build_networks


def test_docstring_shows_the_plan_of_v1():
    rows = [str(row) for row in block_plan(SD_V1.unet)]
    shown = [line.strip() for line in sd.networks.unet.__doc__.splitlines() if "block" in line and "->" in line]
    assert shown == rows


def test_v1_has_25_blocks_which_are_what_the_network_consists_of():
    plan, network = block_plan(SD_V1.unet), build_networks(SD_V1)["unet"]
    assert len(plan) == 25
    stages = [sum(row.name.startswith(stage) for row in plan) for stage in ("input", "middle", "output")]
    assert stages == [12, 1, 12]
    assert all(tuple(network.get_submodule(row.name)) == row.layers for row in plan)


def test_plan_states_the_scale_and_channels_that_come_out(tiny_networks):
    seen, handles = {}, []
    for row in block_plan(TINY.unet):
        module = tiny_networks["unet"].get_submodule(row.name)
        hook = lambda _, inputs, output, name=row.name: seen.update({name: (inputs[0], output)})  # noqa: E731
        handles.append(module.register_forward_hook(hook))
    tiny_networks["unet"](torch.zeros(1, 4, 64, 32), torch.tensor(1), torch.zeros(1, 77, 64))
    for handle in handles:
        handle.remove()
    for row in block_plan(TINY.unet):
        given, made = seen[row.name]
        assert given.shape[1] == row.in_channels
        assert made.shape[1:] == (row.out_channels, 64 // row.scale, 32 // row.scale)


def test_timestep_embedding_has_cosines_first():
    # by hand: frequency i of 160 is 10000 ** (-i / 160)
    embedding = sd.networks.unet.timestep_embedding(torch.tensor([0, 981]), 320)
    assert embedding.shape == (2, 320)
    assert embedding[0].tolist() == [1.0] * 160 + [0.0] * 160
    for i in (0, 1, 80, 159):
        angle = 981 * 10_000 ** (-i / 160)
        assert embedding[1, i].item() == pytest.approx(math.cos(angle), abs=2e-4)  # float32 angles up to 981
        assert embedding[1, 160 + i].item() == pytest.approx(math.sin(angle), abs=2e-4)


def test_norm_eps_differs_between_residuals_and_transformers():
    network = build_networks(SD_V1)["unet"]
    eps = {name: module.eps for name, module in network.named_modules() if isinstance(module, torch.nn.GroupNorm)}
    assert {value for name, value in eps.items() if ".attention." in name} == {1e-6}
    assert {value for name, value in eps.items() if ".attention." not in name} == {1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_the_input(tiny_networks, dtype):
    network = build_networks(TINY)["unet"]
    network.load_state_dict(
        {name: value.to(dtype) for name, value in tiny_networks["unet"].state_dict().items()}, assign=True
    )
    x_t, context = torch.zeros(1, 4, 8, 8, dtype=dtype), torch.zeros(1, 77, 64, dtype=dtype)
    assert network(x_t, torch.tensor(1), context).dtype == dtype
