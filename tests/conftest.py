"""What several test files need: narrow models with made-up weights, and files of them."""

import json
from pathlib import Path

import make_checkpoint
import pytest
import torch
from PIL import Image

from sd.config import SD_V1
from sd.networks import build_networks

TINY = make_checkpoint.tiny(SD_V1)


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


@pytest.fixture(autouse=True)
def _no_gradients_and_own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
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
