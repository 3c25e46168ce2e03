"""Captured predictions make the same pictures, with inputs and weights as they are now; and what is not captured.

On the CPU, what stands for a CUDA graph is a function that is really run again, and leaves its result where its first
run left it. Tests of CUDA graphs themselves need a GPU.
"""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, assemble, fill, final, pixels, settings
from torch import nn

from sd.pipeline.runner import NonFiniteError
from sd.runtime.device import RunOptions, is_set, send
from sd.runtime.execution import Execution, one_ahead
from sd.runtime.gpu.cuda_graphs import KEPT, CannotCapture, CapturedUNet
from sd.study.benchmark.measuring import make_once
from sd.study.explain.recording import explain

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


class Again:
    """In place of CUDA: what was recorded is run again, and writes where it wrote before."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, function):
        self.recorded += 1
        output = function()

        def replay():
            self.replayed += 1
            output.copy_(function())

        output.fill_(torch.nan)  # nobody may read what has not been run
        return replay, output


@pytest.fixture
def models(tiny_networks):
    """One that runs as it is, and one that is captured, with the same networks."""
    plain, recorder = assemble(TINY, tiny_networks), Again()
    return plain, replace(plain, runner=Execution(recorder=recorder)), recorder


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "plms", "heun"])
def test_captured_predictions_make_the_same_pictures_with_every_kind_of_sampler(models, sampler):
    plain, captured, recorder = models
    batch = [settings(sampler=sampler), settings(sampler=sampler, prompt="a horse", seed=2)]
    for _ in range(2):
        assert torch.equal(final(captured, batch), final(plain, batch))
    assert recorder.recorded == 1


def test_an_embedded_guidance_scale_is_an_input_of_the_captured_prediction():
    """And of a compiled one, whose program it does not change."""
    config = replace(TINY, unet=replace(TINY.unet, guidance_width=32))
    recorder, plain = Again(), assemble(config, fill(config))
    programs = []
    compiled = Execution(RunOptions(compile=True), compiler=lambda function: programs.append(function) or function)
    runners = Execution(recorder=recorder), compiled
    for scale in (8.0, 2.0):
        batch = [settings(sampler="lcm", steps=2, guidance_scale=scale)]
        for runner in runners:
            captured = replace(plain, runner=runner)
            assert torch.equal(final(captured, batch), final(plain, batch))
    assert (recorder.recorded, len(programs)) == (1, 1)


@pytest.mark.slow
def test_each_size_and_kind_of_prediction_is_captured_once(models):
    """Prompts that change on the way are inputs of the same graph."""
    plain, captured, recorder = models
    kinds = [{}, {"width": 128}, {"guidance_scale": 1.0}, {"tile": "x"}]
    for options in (*kinds, {"prompt": "a [horse:house:0.5]"}, *kinds):
        batch = [settings(steps=2, **options)]
        assert torch.equal(final(captured, batch), final(plain, batch))
    assert recorder.recorded == len(kinds) <= KEPT
    assert recorder.replayed == 2 * (2 * len(kinds) + 1)


def test_only_the_last_few_are_kept():
    network, recorder = nn.Linear(2, 2), Again()
    captured = CapturedUNet(network, recorder)

    def ask(rows, kind=0):
        x = torch.randn(rows, 2)
        found = captured.predict(lambda x, t, c: network(x) + t + c, x, torch.ones(()), x, kind=kind)
        assert torch.equal(found, network(x) + 1 + x)

    for rows in (*range(1, KEPT + 2), KEPT + 1, 2):
        ask(rows)
    assert recorder.recorded == KEPT + 1
    ask(1)  # the one that was not used for longest had to go
    ask(2, kind="other")
    assert recorder.recorded == KEPT + 3


def test_a_result_stays_when_the_next_prediction_is_made():
    captured = CapturedUNet(nn.Identity(), Again())
    given = [torch.randn(1, 2) for _ in range(3)]
    found = [captured.predict(lambda x, t, c: x + t, x, torch.zeros(()), x, kind=0) for x in given]
    assert all(torch.equal(one, other) for one, other in zip(found, given, strict=True))


def test_weights_that_are_changed_are_used_and_replaced_ones_captured_anew():
    plain, recorder = assemble(TINY, fill(TINY)), Again()
    captured = replace(plain, runner=Execution(recorder=recorder))
    batch = [settings(steps=1)]
    before = final(captured, batch)
    plain.unet.out.conv.weight.mul_(2)
    assert torch.equal(final(captured, batch), final(plain, batch))
    assert recorder.recorded == 1
    block = plain.unet.middle_block.residual1
    block.time_proj.weight = nn.Parameter(-block.time_proj.weight, requires_grad=False)
    assert torch.equal(final(captured, batch), final(plain, batch))
    assert not torch.equal(final(captured, batch), before)
    assert recorder.recorded == 2


def test_what_cannot_be_captured_is_run_as_it_is_and_says_why(tiny_networks):
    asked = []

    def never(function):
        asked.append(function())
        raise CannotCapture from RuntimeError("operation not permitted\nwhen the stream is capturing")

    plain = assemble(TINY, tiny_networks)
    captured = replace(plain, runner=Execution(recorder=never))
    assert torch.equal(final(captured, [settings()]), final(plain, [settings()]))
    assert captured.runner.captured.problem == "RuntimeError: operation not permitted"
    assert len(asked) == 1


def test_errors_that_have_nothing_to_do_with_capturing_stay_what_they_are():
    def out_of_memory(*_):
        raise RuntimeError("not enough memory")

    captured = CapturedUNet(nn.Identity(), Again())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not enough memory"):
            captured.predict(out_of_memory, *torch.ones(3, 1), kind=0)


@pytest.mark.parametrize("options", [{"reuse_features": 2}, {"merge_tokens": 0.5}])
def test_predictions_that_are_not_always_alike_are_not_captured(models, options):
    plain, captured, recorder = models
    batch = [settings(**options)]
    assert torch.equal(final(captured, batch), final(plain, batch))
    assert not recorder.recorded


def test_with_low_memory_gradients_or_without_cuda_nothing_is_captured(models):
    plain, _, recorder = models
    low = RunOptions(low_memory=True)
    found, expected = (
        final(replace(plain, runner=Execution(low, recorder=each)), [settings()]) for each in (recorder, None)
    )
    assert torch.equal(found, expected)
    given = torch.randn(1, 4, 8, 8, requires_grad=True), torch.tensor(5.0), torch.randn(1, 77, 64)
    with torch.enable_grad():
        assert Execution(recorder=recorder).predict(plain.unet, *given).requires_grad
    assert not recorder.recorded
    captures = [Execution().captures(torch.device(kind)) for kind in ("cpu", "mps", "cuda:1")]
    assert captures == [False, False, True]


def test_a_compiled_program_is_captured_too(models):
    plain, _, recorder = models
    programs = []
    execution = Execution(
        RunOptions(compile=True), compiler=lambda function: programs.append(function) or function, recorder=recorder
    )
    compiled = replace(plain, runner=execution)
    found, expected = (final(model, [settings()]) for model in (compiled, plain))
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert (len(programs), recorder.recorded, recorder.replayed) == (1, 1, 4)


def test_an_explained_run_is_not_captured(models):
    plain, captured, recorder = models
    expected, found = (explain(model, settings(steps=2)) for model in (plain, captured))
    assert not recorder.recorded
    assert torch.equal(found.steps[-1].after, expected.steps[-1].after)


def test_items_are_handed_on_when_the_next_one_is_there():
    made = []

    def items(count):
        for number in range(count):
            made.append(number)
            yield number

    for count in range(4):
        made.clear()
        seen = [(number, len(made)) for number in one_ahead(items(count))]
        assert seen == [(number, min(number + 2, count)) for number in range(count)]


def test_steps_come_in_order_with_their_own_clean_latents(models):
    plain, captured, _ = models
    seen = {"plain": [], "captured": []}
    for name, model in (("plain", plain), ("captured", captured)):
        clean = []
        for latents in model.sample([settings()], on_clean=clean.append):
            seen[name] += [latents, clean[-1]]
            assert 2 * len(clean) == len(seen[name])
    assert len(seen["plain"]) == 2 * 4
    assert all(torch.equal(one, other) for one, other in zip(*seen.values(), strict=True))
    assert len(make_once(captured, [settings()]).steps) == 3


@pytest.mark.slow
def test_a_network_that_fails_gives_no_latents_and_is_run_again_in_float32():
    model = assemble(TINY, fill(TINY, dtype=torch.bfloat16))
    model.runner = Execution(recorder=Again())
    broken = replace(model, unet=fill(TINY)["unet"])
    broken.unet.out.conv.bias.fill_(torch.inf)
    with pytest.raises(NonFiniteError):
        next(broken.sample([settings()]))

    def overflow(unet, given, output):
        return output * torch.inf if given[0].dtype == torch.bfloat16 else output

    handle = model.unet.register_forward_hook(overflow)
    said, steps = [], []
    (picture,) = model.make([settings()], on_retry=said.append, on_step=steps.append)
    handle.remove()
    assert len(said) == 1
    assert len(steps) == 4  # none of them from the run that failed
    assert pixels(picture).std() > 0


def test_on_the_cpu_flags_and_copies_are_plain():
    assert is_set(torch.tensor(True))()
    assert not is_set(torch.tensor([1.0, torch.nan]).isfinite().all())()
    values = torch.randn(3)
    assert send(values, torch.device("cpu")) is values


@pytest.fixture(scope="module")
def gpu_models():
    """In float16 on the GPU: one that is watched, and so runs as it is, and one that is captured."""
    networks = {name: network.to("cuda", torch.float16) for name, network in fill(TINY).items()}
    captured = assemble(TINY, networks)
    return replace(captured, runner=Execution(watched=True)), captured


@on_cuda
@pytest.mark.parametrize("sampler", ["ddim", "plms", "heun", "unipc"])
def test_cuda_graphs_make_the_pictures_of_plain_calls(gpu_models, sampler):
    plain, captured = gpu_models
    for options in ({}, {"width": 128}, {"guidance_scale": 1.0}, {"prompt": "a [horse:house:0.5]"}):
        batch = [settings(sampler=sampler, **options), settings(sampler=sampler, seed=2, **options)]
        expected, found = final(plain, batch), final(captured, batch)
        assert ((found - expected).norm() / expected.norm()) < 1e-3, options
    assert captured.runner.captured.problem is None
    assert any(captured.runner.captured._captured.values())


@on_cuda
def test_cuda_graphs_of_many_sizes_do_not_disturb_each_other(gpu_models):
    plain, captured = gpu_models
    batches = [[settings(width=64 * n, steps=2)] for n in range(1, KEPT + 3)]
    expected = [final(plain, batch) for batch in batches]
    for batch, latents in [*zip(batches, expected, strict=True), *zip(batches, expected, strict=True)]:
        assert ((final(captured, batch) - latents).norm() / latents.norm()) < 1e-3
    assert len(captured.runner.captured._captured) == KEPT


@on_cuda
def test_a_function_that_waits_for_the_device_is_not_captured_and_still_runs():
    network = nn.Linear(2, 2).cuda()
    captured = CapturedUNet(network)
    x = torch.ones(1, 2, device="cuda")
    for _ in range(2):
        found = captured.predict(lambda x, t, c: x * x.sum().item(), x, x, x, kind=0)
        assert found.tolist() == [[2.0, 2.0]]
    assert captured.problem


@on_cuda
def test_on_cuda_answers_are_those_of_the_moment_they_were_asked_for():
    flag = torch.ones((), dtype=torch.bool, device="cuda")
    answer = is_set(flag)
    flag.zero_()
    assert answer()
    assert send(torch.ones(2), torch.device("cuda")).tolist() == [1.0, 1.0]


@on_cuda
def test_within_the_loop_nothing_waits_for_the_device(gpu_models):
    """PyTorch raises where a call waits for it; the first step, with the text and the capture, may wait."""
    _, captured = gpu_models
    for sampler in ("ddim", "dpmpp_2m", "euler_a", "plms"):
        states = captured.sample([settings(sampler=sampler, steps=6)])
        next(states)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in states:
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_cuda
def test_with_low_memory_the_picture_on_a_gpu_is_the_same_up_to_rounding():
    networks = fill(TINY)
    expected = final(assemble(TINY, {name: network.cuda() for name, network in fill(TINY).items()}), [settings()])
    visited = Execution(RunOptions(low_memory=True), visited=torch.device("cuda"))
    low = replace(assemble(TINY, networks), runner=visited)
    found = final(low, [settings()])
    assert found.device.type == "cuda"
    assert ((found - expected).norm() / expected.norm()) < 1e-3
