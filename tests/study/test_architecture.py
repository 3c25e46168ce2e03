"""What `sd arch` says, against closed forms, PyTorch's own counter, real runs, and the original file's list."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TINY, rest_slow
from torch.utils.flop_counter import FlopCounterMode

from convert.layouts.joined import keys_in_files
from sd.config import SD_V1, SD_V1_EDIT, SD_V1_INPAINTING, SD_V2, SDXL, SDXL_REFINER
from sd.networks.block_plan import block_plan
from sd.networks.build import build_networks, parameter_shapes
from sd.study.architecture.calls import Watcher
from sd.study.architecture.description import describe, passes
from sd.study.architecture.table import blocks, table
from sd.study.architecture.timing import ROUNDS, measure

META = torch.device("meta")
ROOT = Path(__file__).parents[2]


def look_at(config, width=512, height=512, **options):
    return describe(config, keys_in_files(config), width=width, height=height, **options)


def nodes_of(architecture):
    return {node.path: node for network in architecture.networks for node in network.walk()}


@pytest.fixture(scope="module")
def full():
    return look_at(SD_V1)


@pytest.fixture(scope="module")
def nodes(full):
    return nodes_of(full)


def test_parameters_add_up_to_those_of_the_published_networks(full):
    counts = {network.path: network.parameter_count for network in full.networks}
    assert counts == {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}
    for network in full.networks:
        for node in network.walk():
            own = sum(math.prod(parameter.shape) for parameter in node.parameters)
            assert node.parameter_count == own + sum(child.parameter_count for child in node.children)


def test_every_parameter_and_original_key_stands_at_exactly_one_node_with_its_shape(nodes):
    listed = [(node, parameter) for node in nodes.values() for parameter in node.parameters]
    assert len(listed) == 1130
    assert {parameter.name: parameter.shape for _, parameter in listed} == parameter_shapes(build_networks(SD_V1))
    assert all(parameter.name.rpartition(".")[0] == node.path for node, parameter in listed)
    golden = (ROOT / "tests" / "golden" / "sd-v1.txt").read_text().splitlines()
    rows = [line.split() for line in golden if not line.startswith("#")]
    weights = {name: shape for name, _, shape in rows if name.startswith(("model.d", "first_stage_", "cond_stage_"))}
    del weights["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert {each.original: "x".join(map(str, each.original_shape)) for _, each in listed} == weights


ROWS = [(SD_V2, "sd-v2"), (SDXL_REFINER, "sdxl-refiner"), (SDXL, "sdxl-base")]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "listed"), rest_slow(ROWS, quick=2))
def test_keys_are_those_of_the_original_file_where_it_joins_weights(config, listed):
    """A tensor of several weights stands at each of them, with the part that it is."""
    golden = (ROOT / "tests" / "golden" / f"{listed}.txt").read_text().splitlines()
    rows = [line.split() for line in golden if line and not line.startswith("#")]
    sizes = {name: math.prod(map(int, shape.split("x"))) for name, _, shape in rows if shape[0].isdigit()}
    found = Counter()
    for node in nodes_of(look_at(config)).values():
        for parameter in node.parameters:
            key, _, note = parameter.original.partition(" ")
            found[key] += math.prod(parameter.shape)
            assert ("in_proj" in key) == ("of 3" in note)
            assert (key.endswith("text_projection")) == ("transposed" in note)
    assert all(sizes[key] == numbers for key, numbers in found.items())


@pytest.mark.slow
@pytest.mark.parametrize(("config", "width", "height"), [(SD_V1_INPAINTING, 256, 320), (TINY, 72, 200)])
def test_operations_of_every_network_are_what_pytorch_counts(config, width, height):
    networks = build_networks(config)
    for network in look_at(config, width, height).networks:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for run in passes(config, networks, width, height, META)[network.path]:
                run()
        assert network.operations == counter.get_total_flops(), network.path


def test_operations_of_every_module_of_the_unet_are_what_pytorch_counts(nodes):
    unet = {"unet": build_networks(SD_V1)["unet"]}
    with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
        passes(SD_V1, unet, 512, 512, META)["unet"][0]()
    counted = {f"unet{name[4:]}": sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    checked = [path for path in nodes if path.startswith("unet.") and path in counted]
    assert len(checked) > 300
    for path in checked:
        assert nodes[path].operations == counted[path], path


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD_V1, SD_V1_INPAINTING, SD_V1_EDIT, TINY])
def test_blocks_of_the_unet_are_the_rows_of_the_plan(config):
    seen = nodes_of(look_at(config))
    found = [node for node in blocks(seen["unet"]) if "block" in node.path]
    plan = block_plan(config.unet)
    assert [node.path for node in found] == [f"unet.{row.name}" for row in plan]
    for i in range(12):  # the first skip made is the last one used
        assert seen[f"unet.output_blocks.{i}"].skips == (f"unet.input_blocks.{11 - i}",)
    assert sum(bool(node.skips) for node in seen.values()) == 12
    for node, row in zip(found, plan, strict=True):
        assert tuple(child.path.removeprefix(f"{node.path}.") for child in node.children) == row.layers
        assert node.inputs["x"][1] == row.in_channels
        assert node.output == (1, row.out_channels, 64 // row.scale, 64 // row.scale)
        assert sum(seen[path].output[1] for path in node.skips) == row.skip_channels
        assert [inner.heads for inner in node.walk() if inner.heads] == [row.heads] * 2 * row.depth
        assert sum(inner.kind == "TransformerBlock" for inner in node.walk()) == row.depth


def test_shapes_and_skips_match_a_real_run(tiny_networks):
    """The numbers of a skip come from the block that is named as its source; at a size that does not halve evenly."""
    unet = tiny_networks["unet"]
    given, made, hooks = {}, {}, []
    for name, module in unet.named_modules(prefix="unet"):
        hooks.append(module.register_forward_pre_hook(lambda _, args, n=name: given.__setitem__(n, args[0])))
        hooks.append(module.register_forward_hook(lambda _, args, out, n=name: made.__setitem__(n, out)))
    generator = torch.Generator().manual_seed(0)
    unet(torch.randn(1, 4, 11, 13, generator=generator), 500 * torch.ones(1), torch.randn(1, 77, 64))
    for hook in hooks:
        hook.remove()
    seen = nodes_of(look_at(TINY, width=13 * 8, height=11 * 8))
    checked = 0
    for path, node in seen.items():
        if path.startswith("unet"):
            assert node.output == tuple(made[path].shape), path
            assert next(iter(node.inputs.values())) == tuple(given[path].shape), path
            for source in node.skips:
                skip = made[source]
                assert torch.equal(given[path][:, -skip.shape[1] :], skip)
                checked += 1
    assert checked == 12


def test_modules_stand_in_the_order_in_which_they_run(nodes):
    decoder = [node.path for node in nodes["vae.decoder"].children]
    assert [path.removeprefix("vae.decoder.") for path in decoder] == [
        *("conv_in", "mid", "up.3", "up.2", "up.1", "up.0", "norm_out", "conv_out")
    ]
    residual = [node.path.rpartition(".")[2] for node in nodes["unet.output_blocks.0.residual"].children]
    assert residual == ["norm1", "conv1", "time_proj", "norm2", "conv2", "skip"]


def test_a_parameter_table_that_is_not_called_has_no_shapes(nodes):
    positions = nodes["text_encoder.position_embedding"]
    assert (positions.inputs, positions.output, positions.operations) == ({}, (), 0)
    assert positions.parameter_count == 77 * 768


def test_source_lines_point_to_the_class_or_the_layers_assignment(nodes):
    found = 0
    for node in nodes.values():
        line = (ROOT / node.file).read_text().splitlines()[node.line - 1]
        if not node.built_as and node.kind not in ("Sequential",):
            assert line.startswith(f"class {node.kind}("), node.path
        elif not line.startswith("class Block("):  # whose layers have no line each
            assert f"{node.path.rpartition('.')[2]}" in line, node.path
            assert "=" in line
            found += 1
    assert found > 500


def test_purpose_is_the_docstring_of_our_class_never_pytorchs(nodes):
    assert nodes["unet.input_blocks.1.residual"].purpose.startswith("Two convolutions beside a shortcut")
    assert nodes["unet.input_blocks.3.downsample"].purpose == ""
    assert nodes["unet.out.conv"].purpose == ""


def test_networks_keep_no_hooks():
    networks = build_networks(TINY)
    with torch.no_grad(), Watcher(networks) as watcher:
        passes(TINY, networks, 64, 64, META)["unet"][0]()
    assert "unet.middle_block" in watcher.calls
    for network in networks.values():
        for module in network.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


@pytest.mark.slow
def test_called_modules_have_measured_times():
    rounds = []
    times = measure(
        TINY, width=64, height=64, device=torch.device("cpu"), dtype=torch.float32, on_round=lambda: rounds.append(1)
    )
    assert len(rounds) == 3 * ROUNDS
    seen = nodes_of(look_at(TINY, 64, 64, milliseconds=times, measured_on="cpu, fp32"))
    for node in seen.values():
        inside = [child.milliseconds for child in node.children if child.milliseconds is not None]
        if not node.inputs and node.path != "vae":
            assert node.milliseconds is None
        else:
            assert 0 < node.milliseconds < 60_000
            assert node.milliseconds >= sum(inside) * (1 - 1e-9), node.path
    assert math.isclose(seen["vae"].milliseconds, sum(child.milliseconds for child in seen["vae"].children))


def test_table_has_a_line_for_each_block_and_the_totals(full):
    lines = table(full).splitlines()
    assert lines[0] == "sd-v1, 512x512 pixels, 64x64 latents, one picture"
    (row,) = [line.split() for line in lines if line.startswith("output_blocks.5 ")]
    expected = "output_blocks.5 residual attention upsample 1920x16x16 1280x32x32 90,479,360 67.851 input_blocks.6"
    assert row == expected.split()
    totals = [line.split() for line in lines if line.startswith("total")]
    assert totals == [
        ["total", "123,060,480", "13.299"],
        ["total", "859,520,964", "803.273"],
        ["total", "83,653,863", "3,631.177"],
    ]
    assert not any(line.endswith(" ") for line in lines)
    assert max(map(len, lines)) <= 120
    assert "a multiply-add is 2 operations" in table(full)
    assert " ms" not in table(full)


@pytest.mark.slow
def test_the_text_encoders_of_xl_stand_side_by_side_and_one_has_layers_that_never_run():
    found = nodes_of(xl := look_at(SDXL, 1024, 1024))
    assert [network.path for network in xl.networks] == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert (found["text_encoder.layers.11"].operations, found["text_encoder.final_norm"].inputs) == (0, {})
    assert found["text_encoder_2.projection"].output == (1, 1280)
    last = [child.path for child in found["text_encoder"].children][-3:]
    assert last == [f"text_encoder.{name}" for name in ("layers.10", "layers.11", "final_norm")]
    assert found["unet"].inputs == {
        "x_t": (1, 4, 128, 128),
        "timestep": (),
        "context": (1, 77, 2048),
        "vector": (1, 2816),
    }
    assert found["unet"].parameter_count == 2_567_463_684
