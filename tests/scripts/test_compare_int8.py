"""The script that measures what 8 bits change, with made-up weights."""

import copy

import compare_int8
import pytest
import torch
from compare_int8 import ARRAY, ROW, distance, in_8_bits, kind_of, shortcuts_of, used

from sd.config import SD_V1
from sd.networks.build import build_networks
from sd.runtime.cpu import int8
from sd.runtime.cpu.int8 import Int8Conv2d, make_int8

KINDS = ["3×3 convolutions", "proj_in", "q, k, v", "out", "value and gate", "hidden values", "proj_out"]
KINDS += ["resampling", "shortcuts"]
problem = int8.problem_of(torch.device("cpu"))
needs_int8 = pytest.mark.skipif(problem is not None, reason=f"int8 {problem}")


def test_every_layer_in_8_bits_has_a_kind():
    unet = build_networks(SD_V1)["unet"]
    layers = make_int8(unet) | shortcuts_of(unet)
    counts = [list(map(kind_of, layers)).count(kind) for kind in KINDS]
    assert counts == [44, 16, 64, 32, 16, 16, 16, 6, 14]
    assert sum(counts) == len(layers)


@pytest.fixture
def layers(tiny_networks):
    """The first of each kind, by name."""
    unet = copy.deepcopy(tiny_networks["unet"]).requires_grad_(False)
    found = {}
    for name, layer in (make_int8(unet) | shortcuts_of(unet)).items():
        found.setdefault(kind_of(name), (name, layer))
    return found


@needs_int8
@pytest.mark.parametrize("kind", KINDS)
def test_the_marked_way_is_what_int8_does(layers, kind):
    name, layer = layers[kind]
    shape = (2, layer.in_channels, 8, 8) if hasattr(layer, "in_channels") else (2, 9, layer.in_features)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = {way: in_8_bits(layer, way)(x.float()) for way in (ARRAY, ROW)}
    exact = layer(x.float())
    assert all(1e-3 < distance(each, exact) < 3e-2 for each in found.values())
    assert torch.equal(found[ARRAY], found[ROW]) == isinstance(layer, Int8Conv2d)
    if used(name) == ARRAY:
        assert torch.equal(found[ARRAY], layer(x).float())
    else:
        assert (kind, used(name)) in {("hidden values", ROW), ("shortcuts", "")}


@needs_int8
@pytest.mark.slow
@pytest.mark.parametrize(("size", "ways"), [(64, {"array*"}), (256, {"array", "tile*"})])
def test_tables_of_predictions(tiny_ckpt, capsys, size, ways):
    numbers = ["--timesteps", "600", "50", "--predictions", "1", "--single", "3", "--size", str(size)]
    compare_int8.main(["--model", str(tiny_ckpt), *numbers])
    kinds, single = (text.splitlines()[2:] for text in capsys.readouterr().out.strip().split("\n\n"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in kinds]
    assert {way for kind, way, *_ in rows if kind == "3×3 convolutions"} == ways
    assert [kind for kind, way, *_ in rows if way.endswith("*")] == [*KINDS[:-1], "all but shortcuts"]
    errors = {(kind, way): [float(value.removesuffix(" %")) for value in values] for kind, way, *values in rows}
    assert all(0.01 < value < 10 for values in errors.values() for value in values)
    assert errors["the whole UNet, int8", ""] > errors["the whole UNet, bf16", ""]
    assert len(single) == 3


@needs_int8
@pytest.mark.slow
def test_table_of_pictures(capsys):
    compare_int8.main(["--predictions", "0", "--pictures", "2", "--steps", "3"])
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:] if line
    ]
    assert rows[0][:3] == ["fp32", "", ""]
    assert float(rows[1][2].removesuffix(" dB")) > 25


@needs_int8
@pytest.mark.parametrize("given", [["--timesteps", "1000"], ["--timesteps", "-1"], ["--predictions", "0"]])
def test_numbers_that_cannot_be_are_refused(given):
    with pytest.raises(ValueError, match=r"from 0 to 999|nothing to compare"):
        compare_int8.main(given)
