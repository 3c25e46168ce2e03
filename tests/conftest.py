"""What several test files need: narrow models with made-up weights, and files of them."""

import gc
import json
import os
from contextlib import contextmanager
from pathlib import Path

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # processes side by side share the cores; before torch counts them
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import make_checkpoint
import numpy as np
import pytest
import torch
from browser import Browser, BrowserGone, find_browser
from PIL import Image

from sd.app.cli import main
from sd.config import SD_V1
from sd.networks.build import build_networks
from sd.pipeline.settings import Settings
from sd.pipeline.stable_diffusion import Source, StableDiffusion
from sd.runtime.execution import Execution
from sd.text.tokenizer import Tokenizer

TINY = make_checkpoint.tiny(SD_V1)
PROMPT = "a photograph of an astronaut riding a horse"


def settings_of(path) -> dict:
    """The exact settings in a picture of ours."""
    with Image.open(path) as picture:
        return json.loads(picture.text["sd"])


def fill(config, seed=0, dtype=torch.float32):
    """The three networks of a config with made-up weights."""
    networks = build_networks(config)
    weights = make_checkpoint.made_up_weights(config, seed, dtype)
    for component, network in networks.items():
        prefix = f"{component}."
        mine = {name.removeprefix(prefix): values for name, values in weights.items() if name.startswith(prefix)}
        network.load_state_dict(mine, assign=True)
    return networks


def assemble(config, networks):
    source = Source(name="tiny", weights="model", sha256=lambda: "0123456789abcdef" * 4)
    return StableDiffusion(config=config, tokenizer=Tokenizer(), source=source, runner=Execution(), **networks)


def settings(**options):
    common = {"prompt": PROMPT, "width": 64, "height": 64, "steps": 4, "sampler": "ddim", "seed": 1}
    return Settings(**{**common, **options})


def final(model, batch):
    *_, latents = model.sample(batch)
    return latents


def pixels(picture):
    return np.asarray(picture).astype(int)


def rest_slow(rows, quick=1):
    """Parameters of a test of which the quick tests run the first only."""
    marks = [()] * quick + [pytest.mark.slow] * (len(rows) - quick)
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [pytest.param(*row, marks=each) for row, each in zip(rows, marks, strict=True)]


def refused(result, *parts):
    """A command that was refused: exit code 2, nothing on stdout, and a sentence with these parts."""
    code, out, err = result
    assert (code, out) == (2, []), err
    assert err.startswith("sd: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3
    for part in parts:
        assert part in err
    return err


@contextmanager
def compiled_into(kernel, folder):
    """Inside this context, a kernel is compiled anew, into that folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(kernel, "_found", [])
        kernel.library()
        yield


def pytest_collection_finish():
    """All tests and what they import stay until the end: without this, each search for garbage goes through them."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_gradients_and_own_folders(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp() / "data"))
    monkeypatch.delenv("SD_MODELS", raising=False)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tiny_networks():
    return fill(TINY)


@pytest.fixture(scope="session")
def tiny_state():
    """The tensors of a narrow checkpoint, under their original names, averaged ones included."""
    return make_checkpoint.made_up_state_dict(TINY, ema=True)


@pytest.fixture(scope="session")
def tiny_ckpt(tmp_path_factory, tiny_state) -> Path:
    """A narrow checkpoint in the original layout: a pickle in a zip."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny.ckpt"
    make_checkpoint.save_original(path, tiny_state)
    return path


@pytest.fixture(scope="session")
def model(tiny_networks):
    """The narrow networks as one model."""
    return assemble(TINY, tiny_networks)


@pytest.fixture(scope="session")
def theirs(tiny_networks, tmp_path_factory):
    """The same networks in diffusers' pipeline, with its DDIM."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from oracles import diffusers_unet, diffusers_vae, transformers_text_encoder
    from tokenizer_oracles import load_transformers

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    tokenizer = load_transformers(tmp_path_factory.mktemp("vocabulary"))
    tokenizer.model_max_length = 77
    pipeline = StableDiffusionPipeline(
        vae=diffusers_vae(TINY, tiny_networks),
        text_encoder=transformers_text_encoder(TINY, tiny_networks),
        tokenizer=tokenizer,
        unet=diffusers_unet(TINY, tiny_networks),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    """Call a command in an empty folder: exit code, text on stdout, text on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return call


@pytest.fixture
def run(call):
    """The same, with stdout as a list of lines."""

    def run(*arguments):
        code, out, err = call(*arguments)
        return code, out.splitlines(), err

    return run


@pytest.fixture
def plain(tiny_state):
    """The tensors of a narrow checkpoint without the averaged ones."""
    counters = ("model_ema.decay", "model_ema.num_updates")
    return {name: value for name, value in tiny_state.items() if name in counters or "model_ema" not in name}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium here")
    try:
        browser = Browser(executable, tmp_path_factory.mktemp("profile"))
    except BrowserGone as problem:
        pytest.skip(f"{executable} cannot be used here: {problem}")
    yield browser
    browser.close()
