"""From a file to a model: every weight exactly, in any precision, checked on the way."""

import subprocess
import sys

import make_checkpoint
import pytest
import torch
from conftest import TINY
from weights_of import equal, expected, parameters

import sd
from convert.errors import CorruptFileError, WeightMismatchError
from sd.networks.build import build_networks
from sd.runtime.cpu.packing import can_pack


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("ema", [False, True])
def test_every_weight_is_the_one_in_the_file(tmp_path, tiny_state, suffix, ema):
    path = tmp_path / f"x{suffix}"
    make_checkpoint.save_original(path, tiny_state)
    model = sd.load(path, precision="fp32", weights="ema" if ema else "auto")
    equal(parameters(model), expected(tiny_state, ema=ema))
    assert model.source.weights == ("ema" if ema else "model")
    assert model.config == TINY


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_rounded_once_to_the_precision_asked_for(tiny_ckpt, tiny_state, precision, dtype):
    model = sd.load(tiny_ckpt, precision=precision)
    assert set(model.dtypes.values()) == {dtype}
    assert not any(value.requires_grad for value in model.unet.parameters())
    found = {name: value.to(dtype) for name, value in parameters(model).items()}  # packed ones stay as in the file
    equal(found, {name: value.to(dtype) for name, value in expected(tiny_state).items()})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_precisions_load(tmp_path, tiny_state, dtype):
    path = tmp_path / "x.ckpt"
    stored = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tiny_state.items()}
    make_checkpoint.save_original(path, stored)
    equal(parameters(sd.load(path, precision="fp32")), {n: v.float() for n, v in expected(stored).items()})


def test_convolutions_lie_in_channels_last_order_where_they_will_not_be_packed(tiny_ckpt):
    for low_memory in (False, True):
        model = sd.load(tiny_ckpt, device="cpu", precision="fp32", low_memory=low_memory)
        with model.runner.at_work(model.unet), model.runner.at_work(model.vae):
            in_file_order = model.unet.input_blocks[1]["residual"].conv1.weight.is_contiguous()
            assert in_file_order == (not low_memory and can_pack(torch.device("cpu"), torch.float32))
            assert model.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_file_is_not_changed_by_changing_the_model(tiny_ckpt):
    before = tiny_ckpt.read_bytes()
    model = sd.load(tiny_ckpt, precision="fp32")
    for parameter in model.unet.parameters():
        parameter.zero_()
    assert tiny_ckpt.read_bytes() == before


def test_a_flipped_bit_in_a_weight_is_found(tmp_path, tiny_ckpt):
    data = bytearray(tiny_ckpt.read_bytes())
    data[len(data) // 2] ^= 4
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"x\.ckpt is damaged at byte \d+: wrong checksum in its record"):
        sd.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, tiny_state, value):
    name = "model.diffusion_model.out.2.bias"
    path = tmp_path / "x.ckpt"
    make_checkpoint.save_original(path, {**tiny_state, name: torch.tensor([0.0, value, 0.0, 0.0])})
    with pytest.raises(WeightMismatchError, match=r"x\.ckpt .*NaN, infinite .*out\.2\.bias"):
        sd.load(path)


def test_weights_beyond_the_precision_are_named(tmp_path, tiny_state):
    name = "model.diffusion_model.out.2.bias"
    path = tmp_path / "x.ckpt"
    make_checkpoint.save_original(path, {**tiny_state, name: torch.tensor([0.0, 1e5, 0.0, 0.0])})
    assert sd.load(path, precision="fp32").unet.out.conv.bias[1].item() == 1e5
    with pytest.raises(WeightMismatchError, match=r"beyond fp16 in 1 weight: model\.diffusion_model\.out\.2\.bias"):
        sd.load(path, precision="fp16")


def test_networks_are_built_without_memory():
    for network in build_networks(TINY).values():
        assert all(parameter.is_meta for parameter in network.parameters())
        assert not list(network.buffers())


def test_progress_adds_up_to_the_bytes_of_the_weights(tiny_ckpt):
    seen = []
    model = sd.load(tiny_ckpt, precision="fp32", on_tensor=seen.append)
    assert sum(seen) == sum(value.nbytes for value in parameters(model).values())


def test_importing_sd_does_not_import_torch():
    code = "import sys, sd; assert 'torch' not in sys.modules; sd.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = sd.lode


@pytest.mark.parametrize(("option", "value"), [("device", "tpu"), ("precision", "fp8"), ("weights", "best")])
def test_options_that_do_not_exist_are_refused(tiny_ckpt, option, value):
    with pytest.raises(ValueError, match=value):
        sd.load(tiny_ckpt, **{option: value})
