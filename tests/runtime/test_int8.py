"""Products in 8 bits: exact where the numbers fit, close everywhere else; and what surrounds them."""

import copy
import json
import pickle

import make_checkpoint
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapters import lora, lora_shapes
from conftest import fill, pixels, rest_slow, settings
from torch import nn

import sd
from sd.config import FAMILIES
from sd.networks.attention import GEGLU
from sd.networks.unet import Upsample
from sd.pipeline.errors import SettingError
from sd.runtime.cpu import int8, native, winograd
from sd.runtime.cpu.int8 import Int8Conv2d, Int8GEGLU, Int8Layer, Int8Linear, WinogradIn8Bits
from sd.runtime.device import RunOptions
from sd.study.benchmark.layer_kinds import CONVOLUTION, LINEAR, kind_of, operations_of

CPU, BF16 = torch.device("cpu"), torch.bfloat16
needs_int8 = pytest.mark.skipif(int8.problem_of(CPU) is not None, reason=f"int8 {int8.problem_of(CPU)}")


@pytest.fixture(autouse=True)
def _the_same_weights_each_time():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def numbers(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(scale)


def whole(*shape, low, high, seed=0):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def distance(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def in_8_bits(layer, kind, parts=1):
    layer.requires_grad_(False).to(BF16).__class__ = kind
    layer.parts = parts
    return layer


LAYERS = {
    "linear": lambda: (nn.Linear(48, 32), Int8Linear, (3, 5, 48), 1),
    "without bias": lambda: (nn.Linear(48, 32, bias=False), Int8Linear, (3, 5, 48), 1),
    "in two parts": lambda: (nn.Linear(48, 32), Int8Linear, (5, 48), 2),
    "3x3": lambda: (nn.Conv2d(32, 48, 3, padding=1), Int8Conv2d, (2, 32, 5, 6), 1),
    "3x3 by two": lambda: (nn.Conv2d(32, 48, 3, stride=2, padding=1), Int8Conv2d, (2, 32, 7, 6), 1),
}


@needs_int8
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("signs", [(-100, 155), (0, 255), (-128, 127)], ids=str)
def test_numbers_that_fit_into_8_bits_give_exact_sums(name, signs):
    """Whole numbers, each array with the largest ones, so that its step is 1; with borders, strides and parts."""
    layer, kind, shape, parts = LAYERS[name]()
    weight = whole(*layer.weight.shape, low=-127, high=127)
    weight.flatten(1)[:, 0] = 127
    layer.weight.data = weight
    if layer.bias is not None:
        layer.bias.data = whole(len(weight), low=-50, high=50)
    low, high = signs
    x = whole(*shape, low=low, high=high, seed=1)
    x.view(-1)[0], x.view(-1)[-1] = high, low
    expected = layer.double()(x.double())
    found = in_8_bits(layer, kind, parts)(x.to(BF16))
    assert found.dtype == BF16
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= expected.abs().max() * 2**-8  # the result is rounded to bf16


@needs_int8
@pytest.mark.parametrize("name", LAYERS)
def test_other_numbers_come_close_and_changes_of_the_weight_are_seen(name):
    layer, kind, shape, parts = LAYERS[name]()
    layer.weight.data = numbers(*layer.weight.shape, scale=0.2)
    x, layer = numbers(*shape, seed=1).to(BF16), layer.to(BF16)
    exact = copy.deepcopy(layer).double()(x.double())
    layer = in_8_bits(layer, kind, parts)
    assert 1e-3 < distance(layer(x), exact) < 2e-2
    made = layer._packed
    assert layer(x) is not None
    assert layer._packed is made
    layer.weight.mul_(2)
    bias = (
        0 if layer.bias is None else layer.bias.double().reshape(-1, *[1] * (len(shape) - 2 if len(shape) == 4 else 0))
    )
    assert distance(layer(x).double() - bias, 2 * (exact - bias)) < 2e-2
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert "_packed" not in vars(other)
        assert torch.equal(other(x), layer(x))


@needs_int8
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_stays_visible(name, value):
    layer, kind, shape, parts = LAYERS[name]()
    x = numbers(*shape)
    x.flatten()[3] = value
    assert not in_8_bits(layer, kind, parts)(x.to(BF16)).isfinite().all()


@needs_int8
@pytest.mark.parametrize("name", LAYERS)
def test_zeros_give_the_bias_and_float32_and_gradients_the_exact_product(name):
    layer, kind, shape, parts = LAYERS[name]()
    x, exact = numbers(*shape), copy.deepcopy(layer).to(BF16).float()
    layer = in_8_bits(layer, kind, parts).float()
    assert torch.equal(layer(x), exact(x))
    layer.to(BF16)
    zeros = layer(torch.zeros(shape, dtype=BF16))
    bias = torch.zeros(1) if layer.bias is None else layer.bias
    bias = bias.reshape(-1, 1, 1) if len(shape) == 4 else bias
    assert torch.equal(zeros, bias.to(BF16).expand_as(zeros))
    layer.weight.data.zero_()
    layer.weight.mul_(1)  # the version tells that it has changed
    assert torch.equal(layer(x.to(BF16)), zeros)
    with torch.enable_grad():
        given = x.to(BF16).requires_grad_()
        layer(given).sum().backward()
        assert given.grad is not None


@needs_int8
def test_in_a_feed_forward_a_token_with_large_values_does_not_blur_the_others():
    layer = GEGLU(48).requires_grad_(False).to(BF16)
    exact = copy.deepcopy(layer).double()
    in_8_bits(layer.proj_in, Int8Linear, 2)
    in_8_bits(layer.proj_out, Int8Linear)
    x = numbers(2, 9, 48).to(BF16)
    x[0, 0] *= 10  # so that the values of this token are 100 times as large
    errors = []
    for kind in (Int8GEGLU, GEGLU):
        layer.__class__ = kind
        result, expected = layer(x), exact(x.double())
        assert result.shape == x.shape
        bias = exact.proj_out.bias
        errors.append(distance((result.double() - bias)[1], (expected - bias)[1]))
    assert errors[0] < 0.12  # one scale for all inputs of the first product
    assert errors[1] > 0.4
    layer.__class__, y = Int8GEGLU, numbers(2, 9, 48, seed=2).to(BF16)
    assert distance(layer(y), exact(y.double())) < 2e-2
    assert torch.equal(layer.float()(y.float()), exact.float()(y.float()))


class Convolutions(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.plain, self.up = nn.Conv2d(inputs, outputs, 3, padding=1), Upsample(64)
        self.requires_grad_(False).to(BF16)


needs_winograd = pytest.mark.skipif(
    int8.problem_of(CPU) is not None or not winograd.is_supported(CPU, BF16), reason="no such processor"
)


@needs_winograd
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (48, 192)])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 15)])
def test_winograd_in_8_bits_comes_close(inputs, outputs, height, width):
    network = Convolutions(inputs, outputs)
    x = numbers(2, inputs, height, width).to(BF16)
    forwards = WinogradIn8Bits(network, keep=True).forwards(x, 1024)
    found, expected = forwards[network.plain](x), network.plain.double()(x.double())
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert 1e-3 < distance(found, expected) < 2e-2
    network.plain.to(BF16)
    x, size = numbers(1, 64, height, width).to(BF16), torch.Size((2 * height, 2 * width))
    found = forwards[network.up](x, size)
    expected = F.conv2d(
        F.interpolate(x.double(), size=size), *(w.double() for w in network.up.conv.parameters()), padding=1
    )
    assert 1e-3 < distance(found, expected) < 2e-2
    x[0, 0, 1, 1] = float("nan")
    assert not forwards[network.up](x, size).isfinite().all()


@needs_winograd
@pytest.mark.parametrize("upsampled", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_winograds_weights_are_those_in_float32_rounded(upsampled, layout, dtype):
    weight = numbers(64, 32, 3, 3).to(dtype, memory_format=layout)
    weight[5] = 0
    plain = winograd.lay_out(weight.float(), upsampled=upsampled)
    values, scales, begins = WinogradIn8Bits(nn.Identity(), keep=True).lay_out(weight, BF16, upsampled)
    values = values.transpose(-1, -2).flatten(2, 3).int()
    assert (values * scales[:, :, None] - plain).abs().max() <= scales.max() * 0.501
    assert values.abs().max() == 127
    assert torch.equal(begins, -128 * values.sum(2, dtype=torch.int32))


@needs_int8
def test_a_loaded_model_computes_in_8_bits_and_keeps_the_files_weights(tiny_ckpt):
    exact, model = (sd.load(tiny_ckpt, device="cpu", precision=precision) for precision in ("fp32", "int8"))
    layers = {name: each for name, each in model.unet.named_modules() if isinstance(each, Int8Layer)}
    assert {each.weight.dtype for each in layers.values()} == {torch.float32}
    others = {name for name, each in model.unet.named_modules() if type(each) in (nn.Linear,)}
    assert {name.rpartition(".")[2] for name in others} == {"linear1", "linear2", "time_proj", "k", "v"}
    assert all("cross_attention" in name for name in others if name.endswith((".k", ".v")))
    ends = {name.rpartition(".")[2] for name in layers}
    assert ends == {"q", "k", "v", "out", "proj_in", "proj_out", "conv", "conv1", "conv2"}
    assert set(model.dtypes.values()) == {BF16}
    assert model.runner.options == RunOptions(int8=True)
    batch = [settings(steps=2, guidance_scale=1)]
    expected = pixels(exact.make(batch)[0]).astype(int)
    picture = model.make(batch)[0]
    assert np.abs(pixels(picture).astype(int) - expected).mean() < 4
    assert json.loads(model.texts(batch[0])["sd"])["run"]["int8"] is True
    model.unet.float()
    assert np.abs(pixels(model.make(batch)[0]).astype(int) - expected).mean() < 4


@pytest.mark.slow
@needs_int8
@pytest.mark.parametrize("low_memory", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapters_and_copies_of_a_model(tiny_ckpt, tmp_path, low_memory):
    model, batch = sd.load(tiny_ckpt, device="cpu", precision="int8", low_memory=low_memory), [settings(steps=1)]
    expected = pixels(model.make(batch)[0])
    model.apply([lora(tmp_path / "lora.safetensors", lora_shapes())])
    assert not (pixels(model.make(batch)[0]) == expected).all()
    model.apply([])
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (pixels(other.make(batch)[0]) == expected).all()


@needs_int8
@pytest.mark.parametrize("family", rest_slow(list(FAMILIES)))
def test_the_unet_of_every_family_predicts_in_8_bits(family):
    config = make_checkpoint.tiny(FAMILIES[family])
    unet = fill(config)["unet"]
    x, context = numbers(1, config.unet.in_channels, 8, 8), numbers(1, 7, config.unet.context_width, seed=1)
    given = {"vector": numbers(1, config.unet.vector_width, seed=2)} if config.unet.vector_width else {}
    exact = unet(x, torch.tensor(600), context, **given)
    unet.to(BF16)
    assert int8.make_int8(unet)
    given = {name: each.to(BF16) for name, each in given.items()}
    found = unet(x.to(BF16), torch.tensor(600), context.to(BF16), **given)
    assert 1e-3 < distance(found, exact) < 8e-2  # made-up weights, which pass errors on undamped


@pytest.mark.slow
@needs_int8
def test_with_low_memory_the_copies_go_and_the_picture_stays(tiny_ckpt):
    plain, low = (sd.load(tiny_ckpt, device="cpu", precision="int8", low_memory=low) for low in (False, True))
    batch = [settings(steps=1, guidance_scale=1)]
    assert (pixels(low.make(batch)[0]) == pixels(plain.make(batch)[0])).all()
    assert any("_packed" in vars(each) for each in plain.unet.modules())
    assert not any("_packed" in vars(each) for each in low.unet.modules())


@pytest.mark.slow
@needs_int8
@pytest.mark.parametrize("low_memory", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_unet_that_overflows_goes_on_in_float32_without_8_bits(tiny_ckpt, monkeypatch, low_memory):
    exact, model = (
        sd.load(tiny_ckpt, device="cpu", precision=each, low_memory=low_memory) for each in ("fp32", "int8")
    )
    end, told, batch = model.unet.out.conv, [], [settings(steps=1, guidance_scale=1)]
    end.forward = lambda x: type(end).forward(end, x) * (1 if x.dtype == torch.float32 else float("inf"))
    model.make(batch, on_retry=told.append)
    monkeypatch.setattr(Int8Layer, "pack", None)  # would fail
    found, expected = (pixels(each.make(batch)[0]) for each in (model, exact))
    assert told == ["the UNet gave NaN or infinite values in bf16; retrying in fp32; the network stays in fp32"]
    assert np.abs(found - expected).mean() < 1  # the text encoder and the VAE are in bf16


def psnr(found, expected):
    return 10 * np.log10(255**2 / ((found.astype(float) - expected) ** 2).mean())


@pytest.mark.slow
@needs_int8
def test_pictures_of_the_embedded_model_stay_the_same_to_the_eye():
    models = {precision: sd.load(device="cpu", precision=precision) for precision in ("fp32", "int8")}
    pictures = {name: np.asarray(each.txt2img("a red circle", seed=3, steps=10)[0]) for name, each in models.items()}
    assert psnr(pictures["int8"], pictures["fp32"]) > 38
    x, timestep, predictions = numbers(1, 4, 32, 32), torch.tensor(600), {}  # large enough for Winograd's algorithm
    for name, each in models.items():
        context = each.encode_prompts(["a red circle"])
        with each.runner.at_work(each.unet):
            predictions[name] = each.runner.predict(each.unet, x.to(context.dtype), timestep, context)
    assert distance(predictions["int8"], predictions["fp32"]) < 2.5e-2


@pytest.mark.parametrize(
    ("flags", "told"),
    [(set(), "needs a processor with AVX512-VNNI"), (native.AVX512 | {"avx512_bf16"}, "needs a processor")],
)
def test_a_processor_without_such_products_is_refused(tiny_ckpt, monkeypatch, flags, told):
    monkeypatch.setattr(int8, "cpu_flags", lambda: frozenset(flags))
    with pytest.raises(SettingError, match=f"int8 {told}.*Zen 4"):
        sd.load(tiny_ckpt, device="cpu", precision="int8")


def test_other_devices_and_a_missing_compiler_are_refused(monkeypatch):
    assert int8.problem_of(torch.device("cuda")) == "is for CPUs"
    monkeypatch.setattr(int8, "cpu_flags", lambda: native.AVX512 | {native.PAIRS, int8.SUMS})
    monkeypatch.setattr(int8.KERNEL, "_found", [None])
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert int8.problem_of(CPU) == "needs a C++ compiler, g++ or the one named in CXX"
    monkeypatch.setenv("CXX", "true")  # succeeds and compiles nothing
    assert "but true failed, or the cache folder cannot be written (XDG_CACHE_HOME" in int8.problem_of(CPU)
    monkeypatch.setattr(int8.KERNEL, "problem", "/x/native: other users can change the folder native.")
    with pytest.raises(SettingError, match=r"kept: /x/native: other .* folder native\. Leave it out"):
        int8.require_int8(CPU)
    monkeypatch.setattr(int8, "LINEAR", None)
    assert int8.problem_of(CPU) == "needs a build of PyTorch with oneDNN"
    with pytest.raises(SettingError, match="does not go with int8"):
        RunOptions(compile=True, int8=True)


@needs_int8
def test_bench_counts_the_products(tiny_ckpt):
    weight = torch.empty(48, 32, 3, 3)
    assert kind_of(int8.CONVOLUTION, (None, 1.0, 0, weight)) == CONVOLUTION
    assert operations_of(int8.CONVOLUTION, (None, 1.0, 0, weight), torch.empty(2, 48, 5, 5)) == 2 * 288 * 2400
    x = torch.empty(7, 32)
    assert kind_of(int8.LINEAR, (x,)) == LINEAR
    assert operations_of(int8.LINEAR, (x,), torch.empty(7, 48)) == 2 * 32 * 7 * 48
    operator = int8.WINOGRAD.call
    assert kind_of(operator, (torch.empty(1, 32, 8, 8),)) == CONVOLUTION
    assert operations_of(operator, (torch.empty(1, 32, 8, 8),), torch.empty(1, 64, 8, 8)) == 2 * 288 * 4096
