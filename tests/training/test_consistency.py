"""Distilling for few steps: the loss against a closed form and against diffusers, and what training changes."""

from dataclasses import replace

import pytest
import torch
import train_lcm
import training_example
from conftest import TINY, fill
from safetensors.torch import load_file

from convert.adapters.adapter import open_adapter, read_adapter
from convert.families.few_step_names import advice
from convert.families.few_steps import LCM
from sd.config import FAMILIES, SD_V1
from sd.sampling.samplers.lcm import consistency
from sd.sampling.schedule import alphas_cumprod
from sd.training.adapters import LowRankAdapter, adapted_layers
from sd.training.consistency import consistency_run
from sd.training.latents import EncodedAsTheyCome
from sd.training.losses import ConsistencyLoss

TABLE = alphas_cumprod(SD_V1.schedule).double()
DEVIATION = 0.6  # of the toy's data, around a mean that the prompt names
KINDS = {  # what networks predict, from x_t, eps and alpha_bar
    "eps": lambda x, eps, alpha_bar: eps,
    "v": lambda x, eps, alpha_bar: (eps - (1 - alpha_bar).sqrt() * x) / alpha_bar.sqrt(),
    "x0": lambda x, eps, alpha_bar: (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(),
}


@pytest.fixture(autouse=True)
def _gradients():
    with torch.enable_grad():
        yield


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_of(tokens):
    """The toy's text encoder: a prompt is a number, the empty prompt is 0."""
    return tokens[:, :, None].double()


def teacher_of(kind):
    """The exact network for normally distributed data."""

    def predict(x, timesteps, context):
        alpha_bar, mean = TABLE[timesteps][:, None, None, None], context[..., None]
        eps = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * mean) / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)
        return KINDS[kind](x, eps, alpha_bar)

    return predict


def student_of(kind, guidance_scale):
    """The network whose jumps end where the path with guidance ends: all points keep their distance from the mean, in
    standard deviations."""

    def predict(x, timesteps, context):
        alpha_bar, mean = TABLE[timesteps][:, None, None, None], guidance_scale * context[..., None]
        moments = [(each.sqrt() * mean, (each * DEVIATION**2 + 1 - each).sqrt()) for each in (alpha_bar, TABLE[0])]
        (centre, deviation), (last_centre, last_deviation) = moments
        end = last_centre + last_deviation * (x - centre) / deviation
        here = timesteps[:, None, None, None]
        skip, out = (consistency(a, b, here.clamp(min=1)) for a, b in ((x, 0 * x), (0 * x, torch.ones_like(x))))
        x_0 = (end - skip) / out
        return KINDS[kind](x, (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt(), alpha_bar)

    return predict


def toy_loss(kind, grid, guidance_scale, learnt):
    loss = ConsistencyLoss(
        student_of(kind, learnt), teacher_of(kind), mean_of, TABLE, torch.zeros(1, 1, dtype=torch.int64),
        prediction=kind, guidance_scale=guidance_scale, grid=grid, huber=1e-6,
    )  # fmt: skip
    places, means = torch.arange(grid), torch.arange(grid)[:, None] % 3 - 1
    latents = DEVIATION * numbers(grid, 4, 2, 2) + means[..., None, None]
    return loss(latents, means, places, numbers(grid, 4, 2, 2, seed=1)).item() * grid


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_for_gaussian_data_the_known_consistency_function_has_no_loss_but_that_of_the_teachers_steps(
    kind, guidance_scale
):
    """The error of a DDIM step falls with the square of its length, so that of all steps with the length."""
    coarse, fine = (toy_loss(kind, grid, guidance_scale, guidance_scale) for grid in (25, 200))
    assert fine < coarse / 4
    assert toy_loss(kind, 200, guidance_scale, guidance_scale + 1) > 10 * fine


@pytest.mark.parametrize(("grid", "kind"), [(50, "eps"), (50, "v"), (10, "v")])
def test_the_loss_and_its_gradient_are_those_of_diffusers_schedulers(grid, kind):
    from diffusers import DDIMScheduler, LCMScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    names = {"eps": "epsilon", "v": "v_prediction"}
    ddim = DDIMScheduler(**betas, prediction_type=names[kind], clip_sample=False, set_alpha_to_one=False,
                         timestep_spacing="trailing")  # fmt: skip
    ddim.set_timesteps(grid)
    factors = [torch.tensor(number, requires_grad=True) for number in (0.7, 0.7)]
    count, places = 6, torch.tensor([0, 1, 3, 6, 8, 9]) * grid // 10
    latents, noise, context = (numbers(count, 4, 2, 2, seed=seed).float() for seed in range(3))

    def student(factor):
        return lambda x, t, c: torch.sin(factor * x + t.reshape(-1, 1, 1, 1) / 700 + c)

    def teacher(x, t, c):
        return torch.cos(x + t.reshape(-1, 1, 1, 1) / 900 - c)

    ours = ConsistencyLoss(
        student(factors[0]), teacher, lambda tokens: context[tokens[:, 0]], TABLE.float(), torch.tensor([[5]]),
        prediction=kind, guidance_scale=4.0, grid=grid,
    )(latents, torch.arange(count)[:, None], places, noise)  # fmt: skip

    def jump(x, t, c):
        alpha_bar = ddim.alphas_cumprod[t]
        output = student(factors[1])(x, t, c)
        eps = output if kind == "eps" else alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * x
        c_skip, c_out = LCMScheduler(**betas).get_scalings_for_boundary_condition_discrete(t)
        return c_skip * x + c_out * (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()

    losses = []
    for i, place in enumerate(places):
        start = ddim.timesteps.flip(0)[place]
        end = (start - 1000 // grid).clamp(min=0)
        x, c = ddim.add_noise(latents[i : i + 1], noise[i : i + 1], start[None]), context[i : i + 1]
        positive, negative = teacher(x, start, c), teacher(x, start, context[5:])
        with torch.no_grad():
            target = jump(ddim.step(negative + 4.0 * (positive - negative), start, x).prev_sample, end, c)
        losses.append((((jump(x, start, c) - target) ** 2 + 1e-6).sqrt() - 1e-3).mean())
    theirs = sum(losses) / count
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for loss in (ours, theirs):
        loss.backward()
    torch.testing.assert_close(factors[0].grad, factors[1].grad, rtol=1e-4, atol=1e-6)


def run_of(folder, steps, **changed):
    networks = {part: network.requires_grad_(False) for part, network in fill(training_example.CONFIG).items()}
    layers = adapted_layers(networks, convolutions=False, text_encoder=False)
    adapter = LowRankAdapter(layers, rank=4, alpha=4)
    run = consistency_run(
        training_example.CONFIG,
        networks,
        EncodedAsTheyCome(networks["vae"], training_example.RandomPictures()),
        replace(training_example.options(steps), save_every=2, learning_rate=1e-2, warmup=1),
        folder,
        adapter=adapter,
        batch_size=2,
        seed=1,
        **{"guidance_scale": 3.0, "grid": 5, **changed},
    )
    return networks, adapter, run


def test_training_lowers_the_loss_and_leaves_the_teacher_as_it_is(tmp_path):
    networks, adapter, run = run_of(tmp_path, 8)
    batch = [run.batches(step) for step in range(8)]

    def loss():
        with torch.no_grad():
            return sum(run.module(*each).item() for each in batch)

    def teacher():
        with torch.no_grad(), adapter.off():
            return networks["unet"](numbers(1, 4, 4, 4).float(), torch.tensor([500]), numbers(1, 77, 64).float())

    before, as_taught = loss(), teacher()
    list(run.run())
    assert loss() < 0.96 * before
    assert torch.equal(teacher(), as_taught)


def test_training_resumes_to_the_bit_and_only_with_the_same_teacher(tmp_path):
    list(run_of(tmp_path / "whole", 4)[2].run())
    for steps in (2, 4):
        list(run_of(tmp_path / "parts", steps)[2].run())
    states = [load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    for changed, message in (({"grid": 10}, "grid was 5, is 10"), ({"guidance_scale": 2.0}, "scale was 3.0, is 2.0")):
        with pytest.raises(ValueError, match=message):
            run_of(tmp_path / "parts", 4, **changed)


def test_an_adapter_that_is_off_changes_nothing_and_is_on_again_after_an_error():
    layer, x = torch.nn.Linear(3, 5), numbers(2, 3).float()
    before = layer(x)
    adapter = LowRankAdapter({"unet.layer": layer}, rank=2, alpha=2)
    torch.nn.init.ones_(next(adapter.layers())[1].up.weight)

    def fail():
        with adapter.off():
            assert torch.equal(layer(x), before)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert not torch.equal(layer(x), before)


SHORT = ["--steps", "2", "--batch-size", "2", "--size", "64", "--drawn", "4", "--rank", "1", "--learning-rate", "1e-3"]


@pytest.mark.slow
def test_train_lcm_writes_a_lora_that_is_known_as_one_for_few_steps_by_any_name(tiny_ckpt, tmp_path, capsys):
    folder = tmp_path / "quick"
    train_lcm.main([str(tiny_ckpt), "shapes", str(folder), *SHORT, "--conv-rank", "1"])
    path = folder / "quick.safetensors"
    assert capsys.readouterr().out.strip() == str(path)
    with open_adapter(path) as file:
        adapter = read_adapter(file, TINY)
    assert (len(adapter.changes), adapter.problems) == (278, ())
    assert advice("renamed", adapter.metadata) == LCM
    assert "ss_caption_dropout_rate" not in adapter.metadata


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "0"], "--grid 0 is out of range: 1 to 1000"),
        (["--grid", "1001"], "--grid 1001 is out of range"),
        (["--rank", "0"], "--rank 0"),
    ],
)
def test_impossible_distillations_are_refused_in_a_sentence(tiny_ckpt, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_lcm.main([str(tiny_ckpt), "shapes", str(tmp_path / "out"), *SHORT, *options])
    assert not (tmp_path / "out").exists()


def test_only_models_that_make_pictures_from_text_alone_are_distilled():
    for family in ("sd-v1-inpainting", "sd-v2-depth", "sd-v1-edit"):
        with pytest.raises(ValueError, match=f"is {family}; only models that make pictures from text alone"):
            train_lcm.check("model.ckpt", FAMILIES[family])
    with pytest.raises(ValueError, match="is a latent consistency model already"):
        train_lcm.check("model.ckpt", replace(SD_V1, unet=replace(SD_V1.unet, guidance_width=256)))
    train_lcm.check("model.ckpt", SD_V1)
