"""What `sd diff` says of two files: against the same numbers computed at once with torch."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from convert.actions.convert import convert
from convert.actions.diff import block_of, diff
from convert.checkpoint import POSITION_IDS

UNET = "model.diffusion_model."
NORM = UNET + "input_blocks.1.0.in_layers.0.weight"
CONV = UNET + "input_blocks.0.0.weight"


@pytest.fixture
def run(call):
    return lambda *arguments: call("diff", *arguments)


@pytest.fixture
def two(tmp_path, plain):
    """Two files of the same tensors, but for what is given for the second: another tensor, or None for none."""

    def two(changes, first=None):
        state = {name: value for name, value in (plain | changes).items() if value is not None}
        paths = tmp_path / "a.safetensors", tmp_path / "b.ckpt"
        save_file(plain | (first or {}), paths[0])
        torch.save({"state_dict": state, "global_step": 1}, paths[1])
        return paths

    return two


def moved(value, seed=0):
    return value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))


def test_the_same_tensors_in_another_container_and_order_are_the_same(two, run, plain):
    found = diff(*two({}))
    assert found.is_same
    assert (found.same, found.blocks, found.understood) == (len(plain), (), True)
    code, out, _ = run(*two({}))
    assert code == 0
    assert f"The same: {len(plain)} tensors, bit for bit." in out


def test_distances_are_those_of_the_norms(two, plain):
    changes = {NORM: moved(plain[NORM]), CONV: moved(plain[CONV], 1)}
    found = diff(*two(changes))
    assert set(found.changed) == {NORM, CONV}
    for name, new in changes.items():
        old = plain[name].double()
        assert found.changed[name].relative == pytest.approx(float((new.double() - old).norm() / old.norm()), rel=1e-12)
        assert not found.changed[name].rounding
    block = next(block for block in found.blocks if block.name == "input_blocks.1")
    inside = {name: value for name, value in plain.items() if name.startswith(UNET + "input_blocks.1.")}
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in inside.values()))
    distance = float((changes[NORM].double() - plain[NORM].double()).norm())
    assert block.change.relative == pytest.approx(distance / norm, rel=1e-12)
    assert (block.part, block.tensors, block.changed) == ("unet", len(inside), 1)


def test_one_bit_is_a_difference(two, plain, run):
    value = plain[NORM].clone()
    value[3] = value[3].nextafter(torch.tensor(9.0))
    found = diff(*two({NORM: value}))
    assert set(found.changed) == {NORM}
    assert 0 < found.changed[NORM].relative < 1e-7
    assert run(*two({NORM: value}))[0] == 1


def test_numbers_in_another_order_in_the_file_are_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.files.arrays.PIECE", 5)
    value = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.save({"x": value}, tmp_path / "a.pt")
    torch.save({"x": value.to(memory_format=torch.channels_last)}, tmp_path / "b.pt")
    assert diff(tmp_path / "a.pt", tmp_path / "b.pt").is_same


def test_added_removed_and_reshaped_tensors_are_named(two, run, plain):
    changes = {"extra.thing": torch.zeros(2), "betas": None, POSITION_IDS: torch.zeros(1, 5)}
    found = diff(*two(changes))
    assert (found.added, found.removed) == (("extra.thing",), ("betas",))
    assert found.shapes == {POSITION_IDS: ((1, 77), (1, 5))}
    assert found.changed == {}
    code, out, _ = run(*two(changes), "--keys")
    assert code == 1
    for line in ("- betas", "+ extra.thing", f"s {POSITION_IDS}"):
        assert line in out.splitlines()


def test_axes_of_length_one_at_the_end_do_not_matter(two, plain):
    name = UNET + "input_blocks.1.1.proj_in.weight"
    assert diff(*two({name: plain[name].flatten(1)})).is_same


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rounding_alone_is_said_to_be_so(tmp_path, tiny_ckpt, run, precision):
    small = tmp_path / "small.safetensors"
    convert(tiny_ckpt, small, precision=precision)
    for paths in ((tiny_ckpt, small), (small, tiny_ckpt)):
        found = diff(*paths)
        assert found.is_rounding
        assert not found.is_same
        assert any(name.startswith("model_ema.") for name in found.not_compared)
        code, out, _ = run(*paths)
        assert code == 1
        assert "Only the precision differs" in out


def test_more_than_rounding_is_not_called_rounding(two, plain):
    value = plain[NORM].half()
    value[0] = value[0] + 2**-10  # the next number but one
    found = diff(*two({NORM: value, CONV: plain[CONV].half()}))
    assert not found.changed[NORM].rounding
    assert found.changed[CONV].rounding
    assert not found.is_rounding
    assert found.dtypes == {"float32 -> float16": 2}


def test_the_same_numbers_in_another_precision_are_rounding(two, plain):
    found = diff(*two({POSITION_IDS: plain[POSITION_IDS].half()}))
    assert found.is_rounding
    assert found.changed[POSITION_IDS].difference == 0


def test_an_overflow_is_not_rounding(two, plain):
    value = plain[NORM].clone()
    value[0] = 1e6
    found = diff(*two({NORM: value.half()}, first={NORM: value}))
    assert found.changed[NORM].not_finite == 1
    assert not found.changed[NORM].rounding
    assert math.isfinite(found.changed[NORM].relative)


def test_numbers_beyond_reason_do_no_harm(tmp_path, run):
    huge = torch.full((4,), 1e300, dtype=torch.float64)
    save_file({"a": huge, "b": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"a": -huge, "b": torch.zeros(2)}, tmp_path / "b.safetensors")
    code, out, err = run("a.safetensors", "b.safetensors")
    assert (code, err) == (1, "")
    assert "inf" in out
    data = json.loads(run("a.safetensors", "b.safetensors", "--json")[1], parse_constant=pytest.fail)
    assert data["changed"]["a"]["relative"] is None
    assert data["changed"]["b"]["relative"] == 1


def test_nan_in_both_files_is_no_difference(two, plain):
    value = plain[NORM].clone()
    value[1] = float("nan")
    assert diff(*two({NORM: value}, first={NORM: value})).is_same
    found = diff(*two({NORM: value}))
    assert found.changed[NORM].not_finite == 1


@pytest.mark.slow
def test_the_average_is_recognised(tmp_path, tiny_ckpt, run):
    average, model = tmp_path / "average.ckpt", tmp_path / "model.ckpt"
    convert(tiny_ckpt, average, layout="original", weights="ema")
    convert(tiny_ckpt, model, layout="original", weights="model")
    assert diff(tiny_ckpt, average).averages == ("second",)
    assert diff(average, tiny_ckpt).averages == ("first",)
    assert diff(tiny_ckpt, model).averages == ()
    assert diff(average, model).averages == ()
    half = tmp_path / "half.safetensors"
    convert(tiny_ckpt, half, weights="ema", precision="fp16")
    assert diff(tiny_ckpt, half).averages == ("second",)
    code, out, _ = run(tiny_ckpt, average)
    assert code == 1
    assert "B's UNet is the training average (EMA) that A holds in addition to its own." in out


@pytest.mark.slow
def test_layouts_are_compared_by_original_names(tmp_path, tiny_ckpt, run):
    ours = tmp_path / "ours.safetensors"
    convert(tiny_ckpt, ours)
    found = diff(tiny_ckpt, ours)
    assert found.is_same
    assert found.same == 970
    assert POSITION_IDS in found.not_compared
    assert run(tiny_ckpt, ours)[0] == 0


def test_files_that_hold_no_model_are_compared_by_their_names(tmp_path, run):
    save_file({"a.x": torch.ones(3), "b": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"a.x": torch.ones(3) * 3, "b": torch.ones(2)}, tmp_path / "b.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not found.understood
    assert found.changed["a.x"].relative == pytest.approx(2)
    assert found.changed["b"].relative == math.inf
    code, out, _ = run("a.safetensors", "b.safetensors", "--json")
    data = json.loads(out)
    assert code == 1
    assert data["changed"]["b"]["relative"] is None
    assert data["changed"]["a.x"]["relative"] == pytest.approx(2)
    assert "compared by their names" in run("a.safetensors", "b.safetensors")[1]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        (NORM, ("unet", "input_blocks.1")),
        (UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight", ("unet", "middle_block")),
        (UNET + "time_embed.0.weight", ("unet", "time_embed")),
        (UNET + "out.2.bias", ("unet", "out")),
        ("first_stage_model.encoder.down.2.block.1.conv1.weight", ("vae", "encoder.down.2")),
        ("first_stage_model.decoder.mid.attn_1.q.weight", ("vae", "decoder.mid")),
        ("first_stage_model.quant_conv.bias", ("vae", "quant_conv")),
        ("cond_stage_model.transformer.text_model.encoder.layers.7.mlp.fc1.bias", ("text_encoder", "encoder.layers.7")),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", ("text_encoder", "final_layer_norm")),
        ("model_ema.diffusion_modelout2bias", ("ema", "all")),
        ("betas", ("other", "betas")),
    ],
)
def test_a_block_is_what_a_name_says_up_to_its_first_number(name, block):
    assert block_of(name) == block


def test_the_longest_bar_is_the_largest_difference(two, run, plain):
    changes = {NORM: plain[NORM] * 1.5, CONV: plain[CONV] * 1.25}
    code, out, _ = run(*two(changes))
    rows = {line.split()[0]: line for line in out.splitlines() if "input_blocks." in line}
    assert code == 1
    assert rows["input_blocks.0"].count("█") == 30 or rows["input_blocks.1"].count("█") == 30
    numbers = {name: float(line.split()[1]) for name, line in rows.items()}
    longest = max(numbers.values())
    for name, line in rows.items():
        assert line.count("█") == max(1, round(30 * numbers[name] / longest))


@pytest.mark.parametrize("order", [0, 1])
def test_a_file_that_cannot_be_read_is_bad_input(run, tmp_path, tiny_ckpt, order):
    (tmp_path / "page.ckpt").write_bytes(b"<html>")
    paths = ["page.ckpt", tiny_ckpt][:: 1 - 2 * order]
    code, out, err = run(*paths)
    assert (code, out) == (2, "")
    assert "page.ckpt is a web page" in err


def test_a_wrong_checksum_names_the_right_file(run, tmp_path, plain):
    torch.save({"state_dict": plain}, tmp_path / "sound.ckpt")
    data = bytearray((tmp_path / "sound.ckpt").read_bytes())
    start = data.find(plain[NORM].numpy().tobytes())
    data[start] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(data)
    for paths in (("sound.ckpt", "damaged.ckpt"), ("damaged.ckpt", "sound.ckpt")):
        code, out, err = run(*paths)
        assert (code, out) == (2, "")
        assert err.startswith("sd: damaged.ckpt is damaged at byte ")
        assert "wrong checksum" in err
