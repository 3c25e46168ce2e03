"""Copies, pickles and forked children of a loaded model."""

import copy
import os
import pickle
import subprocess
import sys

import pytest

from sd.runtime.execution import Execution
from sd.runtime.loading import load

FORKED = """
import multiprocessing, os
import torch
from sd import load

model = load()
make = lambda: model.txt2img("a red circle", steps=1, seed=1, width=64, height=64)[0].tobytes()

def child(where):
    where.send((torch.get_num_threads(), make()))

def forked():
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(there,), daemon=True)
    process.start()
    if not here.poll(60):
        process.kill()
        return 0, b""
    return here.recv()

first = forked()
torch.ones(1 << 20, dtype=torch.float64).exp()  # in parallel, so that OpenMP has its threads
picture = make()
children = [first, forked(), forked()]
near = [len(found) == len(picture) and max(map(abs, map(int.__sub__, found, picture))) <= 1 for _, found in children]
print([threads for threads, _ in children], near, torch.get_num_threads())
"""


@pytest.fixture(scope="module")
def used():
    """A model that has made a picture."""
    model = load()
    return model, picture_of(model)


def picture_of(model):
    options = {"steps": 1, "seed": 1, "width": 64, "height": 64}
    (picture,) = model.txt2img("a red circle", **options)
    return picture.tobytes(), picture.info


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("model", ["new", "used"])
def test_a_copy_makes_the_same_picture_and_carries_the_same_settings(used, copied, model):
    source = load() if model == "new" else used[0]
    assert picture_of(copied(source)) == used[1]


def test_a_deep_copy_is_independent(used):
    model, expected = used
    other = copy.deepcopy(model)
    for parameter in other.unet.out.parameters():
        parameter.detach().mul_(2)
    assert picture_of(other) != expected
    assert picture_of(model) == expected
    assert other.runner is not model.runner


def test_a_pickle_is_no_larger_than_the_model(used):
    model, _ = used
    parts = (model.text_encoder, model.unet, model.vae)
    size = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    assert len(pickle.dumps(model)) < 1.1 * size


@pytest.mark.slow
def test_a_copy_is_run_with_the_same_options():
    model = load(low_memory=True, tiled_vae=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.runner) is Execution
        assert other.runner.options == model.runner.options
        assert picture_of(other) == picture_of(model)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_makes_pictures_before_and_after_the_first_of_its_parent():
    """With one thread: OpenMP's others exist in the parent only."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert result.stdout == "[1, 1, 1] [True, True, True] 2\n", result.stderr
