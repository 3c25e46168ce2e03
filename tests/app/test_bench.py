"""`sd bench`: what it measures, its arithmetic by hand, and the command as a user meets it."""

import gc
import itertools
import json
import mmap
import os
import time

import make_checkpoint
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, assemble, fill
from torch import nn

from convert.layouts.names import original_names
from sd.config import SD_V1_DEPTH, SD_V1_EDIT, SD_V1_INPAINTING, SD_V2_DEPTH
from sd.networks.attention import Attention
from sd.study.architecture.description import describe
from sd.study.benchmark import hardware
from sd.study.benchmark import memory as process_memory
from sd.study.benchmark.hardware import cpu_name
from sd.study.benchmark.layer_kinds import (
    ATTENTION,
    CONVOLUTION,
    KINDS,
    LINEAR,
    NORM,
    REST,
    LayerWatch,
    Profile,
    Rates,
    Share,
)
from sd.study.benchmark.measuring import Benchmark, Run, Spread, case, make_once, pictures, profile_step
from sd.study.benchmark.memory import PeakMemory
from sd.study.benchmark.table import table

CPU = torch.device("cpu")
MB = 1 << 20


def share(seconds, operations=0, least=1.0, calls=1):
    return Share(seconds=seconds, least_seconds=least, operations=operations, calls=calls)


def profile_of():
    """A step of 20 seconds and 100 G operations."""
    shares = share(10, 60 * 10**9), share(5, 30 * 10**9), share(2, 10 * 10**9), share(1), share(2)
    return Profile(seconds=sum(each.seconds for each in shares), kinds=dict(zip(KINDS, shares, strict=True)))


def test_figures_of_a_case_by_hand():
    runs = [Run(steps=(1, 3), decode=0.5, total=6), Run(steps=(2, 8), decode=0.7, total=9)]
    found = case((768, 512), 2, 3, runs, profile_of(), own_memory=5, device_memory=None)
    assert found.step == Spread(median=2.5, shortest=1, longest=8, count=4)
    assert found.decode == Spread(median=0.6, shortest=0.5, longest=0.7, count=2)
    assert found.total == Spread(median=7.5, shortest=6, longest=9, count=2)
    assert (found.operations, found.operations_per_second) == (100_000_000_000, 40_000_000_000)
    assert (found.width, found.height, found.batch_size, found.steps) == (768, 512, 2, 3)


def test_calls_are_sorted_timed_and_counted_by_hand():
    """Every function takes a second, by a clock that goes on by one each time it is read."""
    ticks = itertools.count()
    rates = Rates(operations=1000, bytes=100)
    x, window, bias = torch.zeros(1, 2, 4, 4), torch.zeros(3, 2, 3, 3), torch.zeros(3)
    point, matrix = torch.zeros(5, 3, 1, 1), torch.zeros(7, 5)
    queries, keys = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 6, 8)
    with LayerWatch(CPU, rates, clock=lambda: next(ticks)) as watch:
        h = F.conv2d(x, window, bias, padding=1)  # (1, 3, 4, 4)
        h = F.silu(F.group_norm(h, 1))
        h = F.conv2d(h, point)  # (1, 5, 4, 4)
        h = F.linear(h.flatten(2).transpose(1, 2), matrix)  # (1, 16, 7)
        F.scaled_dot_product_attention(queries, keys, keys)
        h + h
    kinds = watch.profile(20).kinds
    seconds = {CONVOLUTION: 1, LINEAR: 2, ATTENTION: 1, NORM: 2, REST: 20 - 6}
    assert {kind: found.seconds for kind, found in kinds.items()} == seconds
    assert kinds[CONVOLUTION].operations == 2 * (2 * 9) * 48
    assert kinds[LINEAR].operations == 2 * 3 * 80 + 2 * 5 * 112
    assert kinds[ATTENTION].operations == 2 * 2 * 2 * 4 * 6 * 8  # two heads, two products of (4, 8) and (8, 6)
    assert kinds[NORM].operations == kinds[REST].operations == 0
    # Four bytes a number; each of these moves more seconds of bytes than it has seconds of operations, the last not.
    assert kinds[CONVOLUTION].least_seconds == pytest.approx(4 * (32 + 54 + 3 + 48) / 100)
    assert kinds[LINEAR].least_seconds == pytest.approx(4 * (48 + 15 + 80) / 100 + 4 * (80 + 35 + 112) / 100)
    assert kinds[ATTENTION].least_seconds == pytest.approx(4 * (64 + 96 + 96 + 64) / 100)
    assert kinds[NORM].least_seconds == pytest.approx(2 * 4 * (48 + 48) / 100)
    assert kinds[REST].least_seconds == pytest.approx(4 * 3 * 112 / 100)  # what only looks at h anew moves nothing
    assert kinds[REST].calls == 3


@pytest.mark.slow
def test_a_step_s_operations_are_those_of_sd_arch_and_its_kinds_add_up(model):
    profile = profile_step(model, pictures(model, (128, 64), 2, 2), Rates(operations=1e9, bytes=1e9))
    told = describe(TINY, original_names(TINY), width=128, height=64)
    (unet,) = (network for network in told.networks if network.path == "unet")
    time_layers = [node for node in unet.walk() if node.path.endswith(("time_proj", "time_embed"))]
    once = sum(node.operations for node in time_layers)  # all rows of a step have the same timestep
    assert once > 0
    counts = {node.path: node.operations for node in unet.walk()}
    block = "unet.input_blocks.1"
    common = counts["unet.input_blocks.0.conv"] + counts[f"{block}.residual"] - counts[f"{block}.residual.time_proj"]
    common += counts[f"{block}.attention.blocks.0.self_attention"]
    # two pictures, with and without the prompt, and what the halves have in common once
    assert profile.operations == 2 * 2 * (unet.operations - once) + once - 2 * common
    assert sum(found.seconds for found in profile.kinds.values()) == pytest.approx(profile.seconds)
    modules = list(model.unet.modules())
    windows = [module for module in modules if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)]
    assert profile.kinds[CONVOLUTION].calls == len(windows)
    assert profile.kinds[ATTENTION].calls == sum(isinstance(module, Attention) for module in modules)
    assert all(found.seconds > 0 and found.least_seconds > 0 for found in profile.kinds.values())


def test_the_peak_of_memory_is_kept_after_it_was_given_back():
    if not process_memory.memory_is_known():
        pytest.skip("memory is counted by Linux")
    gc.collect()  # what earlier tests left must not be freed in between
    with PeakMemory() as memory:
        before, deadline = process_memory.own_memory(os.getpid()), time.monotonic() + 60
        # from the system itself: memory that this process freed and kept would be used again, and its size not change
        with mmap.mmap(-1, 96 * MB) as held:
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1
            while memory.peak < before + 90 * MB and time.monotonic() < deadline:
                time.sleep(0.01)
        after = process_memory.own_memory(os.getpid())
    assert after < before + 50 * MB
    assert before + 90 * MB <= memory.peak < before + 150 * MB


def test_memory_is_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(process_memory, "PROCESSES", tmp_path)
    with PeakMemory() as memory:
        pass
    assert memory.peak is None


def test_the_processor_is_called_as_its_maker_calls_it(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    assert cpu_name()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast 9000 @ 2:1\nmodel name\t: other\n")
    assert cpu_name() == "Fast 9000 @ 2:1"


def test_the_table_says_what_was_found():
    runs = [Run(steps=(2.5,), decode=0.5, total=6)]
    found = Benchmark(
        rates=Rates(operations=150e9, bytes=12.3e9),
        load=Spread.of([4, 3, 8]),
        text=Spread.of([0.25]),
        depth=Spread.of([0.75]),
        cases=(case((768, 512), 4, 2, runs, profile_of(), own_memory=None, device_memory=2_500_000_000),),
    )
    lines = [" ".join(line.split()) for line in table(found, "a model", "a machine").splitlines()]
    assert lines[:3] == ["a model", "a machine", "best rates: 150.0 GFLOP/s multiplying matrices, 12.3 GB/s copying"]
    for line in (
        "loading 4.0000 3.0000 8.0000 3",
        "text encoding 0.2500 0.2500 0.2500 1",
        "depth estimation 0.7500 0.7500 0.7500 1",
        "768x512, 4 pictures at a time",
        "a guided step 2.5000 2.5000 2.5000 1",
        "decoding 0.5000 0.5000 0.5000 1",
        "all, 2 steps 6.0000 6.0000 6.0000 1",
        "peak memory of the process: unknown; on the device: 2.50 GB",
        "a step is 100.0 GFLOP, at 40.0 GFLOP/s",
        "3x3 convolutions 1 60.0 10,000.00 50.0 6.0 1,000.00 10.00",
        "norms and activations 1 1,000.00 5.0 1,000.00 1.00",
        "total 5 100.0 20,000.00 100.0 5.0 5,000.00 4.00",
    ):
        assert line in lines


FURTHER = {SD_V1_DEPTH: 2, SD_V1_EDIT: 3, SD_V1_INPAINTING: 2, SD_V2_DEPTH: 2}  # predictions in a guided step


@pytest.mark.slow
@pytest.mark.parametrize("config", FURTHER, ids=lambda config: config.family)
def test_a_unet_with_further_channels_is_given_what_it_reads(config):
    narrow = make_checkpoint.tiny(config)
    model, seen = assemble(narrow, fill(narrow)), []
    handle = model.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    batch = pictures(model, (64, 72), 2, 2)
    run = make_once(model, batch)
    handle.remove()
    assert seen == [(2 * FURTHER[config], config.unet.in_channels, 9, 8)] * 2
    assert len(run.steps) == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", FURTHER, ids=lambda config: config.family)
def test_the_command_measures_every_kind_of_model(run, tmp_path, config):
    narrow = make_checkpoint.tiny(config)
    make_checkpoint.save_original(tmp_path / "x.ckpt", make_checkpoint.made_up_state_dict(narrow))
    code, lines, err = run("bench", "-m", "x.ckpt", "--sizes", "64", "--steps", "2", "--repeat", "1")
    assert code == 0, err
    assert any(line.startswith("depth estimation") for line in lines) == (config.depth is not None)


@pytest.mark.slow
def test_json_holds_every_figure_and_goes_into_a_file_too(run, tiny_ckpt, tmp_path):
    flags = ["--sizes", "64", "--batch-sizes", "1,2", "--steps", "3", "--repeat", "1", "--precision", "fp32"]
    code, (line,), err = run("bench", "-m", tiny_ckpt, *flags, "--device", "cpu", "--json", "-o", "x.json")
    assert (code, err) == (0, "")
    told = json.loads(line)
    assert told == json.loads((tmp_path / "x.json").read_text())
    assert told["event"] == "benchmark"
    assert told["model"] == {"name": "tiny.ckpt", "family": "sd-v1", "precision": "fp32"}
    assert (told["machine"]["device"], told["machine"]["torch"]) == ("cpu", torch.__version__)
    assert told["machine"]["threads"] == torch.get_num_threads()
    assert told["load"]["count"] == told["text"]["count"] == 1
    one, two = told["cases"]
    assert [(each["width"], each["height"], each["batch_size"]) for each in told["cases"]] == [(64, 64, 1), (64, 64, 2)]
    assert 1.9 * one["operations"] < two["operations"] < 2 * one["operations"]  # the timestep is embedded once
    for each in told["cases"]:
        assert each["step"]["count"] == 2  # the first of three warms up
        assert each["total"]["median"] > each["decode"]["median"] + 2 * each["step"]["median"] > 0
        assert each["operations_per_second"] == each["operations"] / each["step"]["median"]
        assert set(each["profile"]["kinds"]) == set(KINDS)
        if process_memory.memory_is_known():
            assert 30 * MB < each["own_memory"] < 4000 * MB


@pytest.mark.slow
def test_without_json_it_is_a_table(run, tiny_ckpt, monkeypatch):
    monkeypatch.setattr("sd.runtime.cpu.winograd.KERNEL.problem", "other users can change the folder cache.")
    flags = ["--sizes", "64x128", "--steps", "2", "--repeat", "1", "--precision", "fp32", "--device", "cpu"]
    code, lines, err = run("bench", "-m", tiny_ckpt, *flags)
    told = "measured without the code that is compiled for this processor: other users can change the folder cache."
    assert (code, err) == (0, f"sd: {told}\n")
    assert lines[0] == "tiny.ckpt: sd-v1, fp32 on cpu"
    assert f"torch {torch.__version__}" in lines[1]
    assert "64x128, one picture at a time" in lines
