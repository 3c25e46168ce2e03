"""Less memory: weights that come when they are used, halves of guidance one after the other, pictures in tiles."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import make_checkpoint
import pytest
import torch
from adapters import lora, lora_shapes
from conftest import TINY as CONFIG
from conftest import assemble, fill, pixels, refused, settings, settings_of
from PIL import Image
from torch import nn

import sd
from convert.actions.convert import convert
from sd.config import SD_V1_EDIT, SD_V2_DEPTH
from sd.runtime import loading
from sd.runtime.cpu.packing import PackedConv2d
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.runtime.low_memory import visits
from sd.runtime.low_memory.visits import visiting

PARTS = ("text_encoder", "unet", "vae")
DEPTH, EDIT = map(make_checkpoint.tiny, (SD_V2_DEPTH, SD_V1_EDIT))


def test_weights_visit_a_device_and_stay_at_home():
    network = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)))
    at_home = dict(network.named_parameters())
    with visiting(network, torch.device("meta"), print):
        away = dict(network.named_parameters())
        assert list(away) == list(at_home)
        assert {value.device.type for value in away.values()} == {"meta"}
        assert {value.device.type for value in at_home.values()} == {"cpu"}
    assert all(value is at_home[name] for name, value in network.named_parameters())
    with pytest.raises(KeyError), visiting(network, torch.device("meta"), print):
        raise KeyError
    assert network[0].weight.device.type == "cpu"


def test_a_visit_ends_with_its_last_user():
    network = nn.Linear(2, 3)
    execution = Execution(visited=torch.device("meta"))
    first, second = execution.at_work(network), execution.at_work(network)
    with first:
        second.__enter__()
    assert network.weight.device.type == "meta"
    second.__exit__(None, None, None)
    assert network.weight.device.type == "cpu"


@pytest.mark.parametrize("watching", [False, True])
def test_users_in_several_threads_share_one_visit(monkeypatch, watching):
    """The second comes while the first still puts weights in place, and leaves after it."""
    network, first = nn.Linear(2, 3), Execution(visited=torch.device("meta"))
    at_home, copies, both = dict(network.named_parameters()), [], threading.Barrier(2, timeout=60)

    def slow(weight, *_):
        copies.append(weight)
        time.sleep(0.02)
        return weight.to("meta")

    def use(execution):
        both.wait()
        with execution.at_work(network):
            both.wait()
            return {weight.device.type for weight in network.parameters()}

    monkeypatch.setattr(visits, "laid_out", slow)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(use, [first, first.for_watching() if watching else first])) == [{"meta"}] * 2
    assert len(copies) == len(at_home)
    assert all(value is at_home[name] for name, value in network.named_parameters())


@pytest.fixture
def models(tiny_networks):
    plain = assemble(CONFIG, tiny_networks)
    low = replace(plain, runner=Execution(RunOptions(low_memory=True)))
    return plain, low


def latents_and_rows(model, batch):
    rows = []
    handle = model.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    *_, latents = model.sample(batch)
    handle.remove()
    return latents, rows


def test_halves_of_guidance_run_one_after_the_other_and_give_the_same_picture(models):
    batch = [settings(steps=3, seed=seed) for seed in (1, 2)]
    (plain, together), (low, apart) = (latents_and_rows(model, batch) for model in models)
    assert together == [4] * 3
    assert apart == [2] * 6
    assert (low - plain).norm() / plain.norm() < 1e-4


def test_load_keeps_the_options_and_nothing_is_packed(tiny_ckpt):
    model = sd.load(tiny_ckpt, device="cpu", low_memory=True, tiled_vae=True)
    assert model.runner.options == RunOptions(low_memory=True, tiled_vae=True)
    assert model.runner.visited is None
    assert {name: getattr(model, name).rests_as for name in PARTS} == {name: name for name in PARTS}
    model.make([settings(steps=1)])
    assert not any(isinstance(module, PackedConv2d) for module in model.unet.modules())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_on_a_cpu_weights_rest_in_the_file_and_pictures_are_the_same(tiny_ckpt, tmp_path, precision):
    """Also with a network that overflows, with an adapter put on and off, and in a copy."""
    convert(tiny_ckpt, tmp_path / "half.safetensors", precision="fp16")
    options = {"device": "cpu", "precision": precision}
    plain, low = (sd.load(tmp_path / "half.safetensors", low_memory=low, **options) for low in (False, True))
    assert plain.dtypes == low.dtypes
    batch = [settings(steps=1, guidance_scale=1)]
    expected = pixels(plain.make(batch)[0])
    low.apply([lora(tmp_path / "lora.safetensors", lora_shapes())])
    assert not (pixels(low.make(batch)[0]) == expected).all()
    low.apply([])
    for model in (low, copy.deepcopy(low), pickle.loads(pickle.dumps(low))):
        assert abs(pixels(model.make(batch)[0]) - expected).max() <= 2
    assert {parameter.dtype for parameter in low.unet.parameters()} == {torch.float16}
    weight = low.vae.decoder.conv_out.weight
    weight.data = torch.full_like(weight, 6e4)
    said = []
    low.make(batch, on_retry=said.append)
    assert len(said) == (precision == "fp16")


def test_large_text_encoders_rest_in_the_file(tiny_ckpt, monkeypatch):
    monkeypatch.setattr(loading, "LARGE", 1000)
    model = sd.load(tiny_ckpt, device="cpu", precision="bf16")
    assert [hasattr(getattr(model, name), "rests_as") for name in PARTS] == [True, False, False]
    assert {parameter.dtype for parameter in model.text_encoder.parameters()} == {torch.float32}
    assert model.encode_prompts(["a hat"]).dtype == torch.bfloat16
    assert model.dtypes["text_encoder"] == torch.bfloat16


def test_one_network_at_a_time_is_where_it_computes(tiny_networks):
    """Home and device are both the CPU, as there is no other; weights that are away are still other objects."""
    model = replace(assemble(CONFIG, fill(CONFIG)), runner=Execution(visited=torch.device("cpu")))
    homes = {part: next(getattr(model, part).parameters()) for part in ("text_encoder", "unet", "vae")}
    away = set()

    def note(*_):
        away.add(tuple(part for part in homes if next(getattr(model, part).parameters()) is not homes[part]))

    for part in homes:
        getattr(model, part).register_forward_pre_hook(note)
    model.vae.decoder.register_forward_pre_hook(note)
    picture = model.make([settings(steps=2)])[0]
    assert away == {("text_encoder",), ("unet",), ("vae",)}
    assert all(next(getattr(model, part).parameters()) is home for part, home in homes.items())
    plain = assemble(CONFIG, {part: each.to(memory_format=torch.channels_last) for part, each in fill(CONFIG).items()})
    assert picture.tobytes() == plain.make([settings(steps=2)])[0].tobytes()


def test_the_depth_network_is_where_it_computes_only_while_it_does():
    model = replace(assemble(DEPTH, fill(DEPTH)), runner=Execution(RunOptions(low_memory=True), torch.device("cpu")))
    parts = ("text_encoder", "unet", "vae", "depth_network")
    homes = {part: next(getattr(model, part).parameters()) for part in parts}
    away = []

    def note(*_):
        away.append([part for part in parts if next(getattr(model, part).parameters()) is not homes[part]])

    for network in (model.depth_network, model.unet, model.vae.decoder):
        network.register_forward_pre_hook(note)
    model.depth2img("a cave", Image.new("RGB", (64, 64)), seed=1, steps=2, strength=1, size=(64, 64))
    assert away == [["depth_network"], *[["unet"]] * 4, ["vae"]]  # two predictions in each step


@pytest.mark.slow
@pytest.mark.parametrize(("config", "task"), [(DEPTH, "depth2img"), (EDIT, "edit")], ids=["depth2img", "edit"])
def test_wide_pictures_to_begin_with_go_through_the_vae_in_tiles(config, task):
    networks, picture = fill(config), Image.radial_gradient("L").resize((576, 64)).convert("RGB")
    options = {"seed": 1, "steps": 2, "size": (576, 64)}  # 72 latents wide, a tile has 64
    runners = [Execution(RunOptions(tiled_vae=tiled)) for tiled in (False, True)]
    whole, parts = (
        pixels(getattr(replace(assemble(config, networks), runner=runner), task)("a cave", picture, **options)[0])
        for runner in runners
    )
    assert whole.shape == (64, 576, 3)
    assert abs(whole - parts).max() <= 2


@pytest.mark.slow
def test_the_flag_is_known_to_the_commands_and_noted_in_the_picture(call, tiny_ckpt, tmp_path):
    out = tmp_path / "x.png"
    common = ("-m", tiny_ckpt, "-W", "64", "-H", "64", "--steps", "2", "-s", "1", "-q")
    assert call("txt2img", "a horse", *common, "--low-memory", "-o", out)[0] == 0
    assert settings_of(out)["run"] == {"low_memory": True, "tiled_vae": False, "compile": False, "int8": False}
    again, plain = tmp_path / "again.png", tmp_path / "plain.png"
    code, printed, messages = call("txt2img", "--like", out, "-m", tiny_ckpt, "-o", again)
    assert (code, printed) == (0, f"{again}\n")
    assert "--low-memory, as x.png was made" in messages
    assert settings_of(again)["run"] == settings_of(out)["run"]
    assert Image.open(again).tobytes() == Image.open(out).tobytes()
    assert call("txt2img", "a horse", *common, "-o", plain)[0] == 0
    assert "run" not in settings_of(plain)


@pytest.mark.slow
def test_a_large_picture_goes_through_the_vae_in_tiles(tiny_networks, monkeypatch):
    import sd.runtime.low_memory.tiled_vae as used

    calls = []
    for name in ("decode_tiled", "encode_tiled"):
        own = getattr(used, name)
        monkeypatch.setattr(
            used, name, lambda *args, own=own, name=name, **kwargs: calls.append(name) or own(*args, **kwargs)
        )
    plain = assemble(CONFIG, tiny_networks)
    tiled = replace(plain, runner=Execution(RunOptions(tiled_vae=True)))
    batch = [settings(width=576, steps=1)]  # 72 latents wide, a tile has 64
    whole, parts = (pixels(model.make(batch)[0]) for model in (plain, tiled))
    assert abs(whole - parts).max() <= 1
    image = torch.rand(1, 3, 64, 576, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, parts = (model.encode_image(image) for model in (plain, tiled))
    assert (whole - parts).norm() / whole.norm() < 1e-4
    assert calls == ["decode_tiled", "encode_tiled"]


@pytest.mark.slow
def test_a_stopped_run_with_the_flag_goes_on(call, tiny_ckpt, tmp_path):
    command = ("txt2img", "a horse", "-m", tiny_ckpt, "-W", "64", "-H", "64", "--steps", "1", "-s", "1", "-q")
    command += ("--count", "2", "--low-memory", "-o", tmp_path / "{seed}.png")
    assert call(*command)[0] == 0
    (tmp_path / "2.png").unlink()
    assert call(*command) == (0, f"{tmp_path / '2.png'}\n", "")


def test_explain_refuses_what_takes_its_predictions_apart(run, tiny_ckpt):
    refused(run("explain", "a horse", "-m", tiny_ckpt, "--low-memory"), "--low-memory", "Leave it out")
