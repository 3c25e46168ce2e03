"""What a program does to PyTorch as a whole changes no picture, and a picture changes nothing of it."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import rest_slow, settings
from PIL import Image

from sd.runtime.loading import load
from sd.sampling.names import SAMPLER_INFO, SCHEDULES

ROOT = Path(__file__).parents[2]
MADE = "arange as_tensor empty eye full linspace logspace ones rand randint randn randperm scalar_tensor tensor zeros"


def test_every_tensor_that_is_made_names_its_dtype_and_device():
    unnamed = []
    for path in sorted((ROOT / "sd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called, names = ast.unparse(node.func), {word.arg for word in node.keywords}
            if called in {f"torch.{name}" for name in MADE.split()}:
                if not (names >= {"dtype", "device"} or None in names):  # None: **options
                    unnamed.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called}")
            elif called == "torch.Generator" and not node.args:
                unnamed.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called}")
    assert unnamed == []


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        yield


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "seed": seeded,
}
RUNS = {
    "euler_a": {"sampler": "euler_a", "vary": 0.3, "vary_seed": 4},
    "philox": {"sampler": "ddim", "eta": 0.5, "rng": "philox", "vary": 0.3, "vary_seed": 4},
    "two passes": {"sampler": "dpmpp_sde", "hires": "96x96", "hires_upscale": "image", "guidance_rescale": 0.5},
    "latent passes": {"sampler": "unipc", "hires": 1.5, "tile": "xy", "steps": 3},
    "shortcuts": {"sampler": "lms", "reuse_features": 2, "merge_tokens": 0.3, "guidance_interval": (0.5, 5)},
    "words": {"prompt": "a (red:1.3) [circle|square] BREAK b", "sampler": "heun", "schedule": "beta", "clip_skip": 2},
}


@pytest.fixture(scope="module")
def embedded():
    return load()


def made(model, name):
    if name == "inpaint":
        colour, hole = Image.new("RGB", (64, 64), (200, 30, 30)), Image.new("L", (64, 64), 255)
        return model.inpaint("a circle", colour, hole, seed=1, steps=2, strength=0.7)[0].tobytes()
    options = {"prompt": "a red circle", "steps": 2, **RUNS[name]}
    return model.make([settings(**options)])[0].tobytes()


@pytest.fixture(scope="module")
def expected(embedded):
    return {name: made(embedded, name) for name in (*RUNS, "inpaint")}


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_a_picture_is_the_same_whatever_the_program_around_has_set(embedded, expected, state):
    numbers = state in ("float64", "bfloat16", "meta", "autocast")  # these change what a forgotten dtype or device does
    for name in expected if numbers else ("philox", "two passes"):
        with STATES[state]():
            found = made(embedded, name)
        assert found == expected[name], name


@pytest.mark.slow
@pytest.mark.parametrize("state", rest_slow(["float64", "meta", "inference"]))
def test_a_model_that_is_loaded_there_makes_the_same_picture(expected, state):
    with STATES[state]():
        model = load()
        found = made(model, "euler_a")
    assert found == expected["euler_a"]
    assert made(model, "euler_a") == expected["euler_a"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_levels_are_the_same_with_another_default(schedule):
    from sd.config import SD_V1
    from sd.pipeline.latent_diffusion import table_and_steps

    jobs = [settings(sampler=name, schedule=schedule, steps=5) for name in ("ddim", "unipc_bh1")]
    plain = [table_and_steps(SD_V1.schedule, job)[1] for job in jobs]
    for state in ("bfloat16", "float64", "meta"):
        with STATES[state]():
            assert [table_and_steps(SD_V1.schedule, job)[1] for job in jobs] == plain


@pytest.mark.slow
def test_a_picture_leaves_the_programs_own_random_numbers_and_settings_alone(embedded):
    def state():
        return (
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
        )

    before = state()
    for name in RUNS:
        made(embedded, name)
    assert state() == before


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLER_INFO)
def test_every_sampler_makes_the_same_latents_with_another_default(model, sampler):
    job = settings(sampler=sampler, steps=3, guidance_scale=1)
    *_, plain = model.sample([job])
    for state in ("bfloat16", "float64", "meta"):
        with STATES[state]():
            *_, found = model.sample([job])
        assert torch.equal(found, plain)
