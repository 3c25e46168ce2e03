"""Muon: singular values by hand, the size of its steps, and that training with it resumes."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import training_example
from torch import multiprocessing, nn

from sd.training.loop import TrainingRun
from sd.training.muon import Muon, orthogonalise, orthogonalise_together

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _gradients():
    with torch.enable_grad():
        yield


@pytest.mark.parametrize("shape", [(6, 6), (4, 30), (30, 4)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    matrix = torch.randn(shape, generator=GENERATOR)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalise(matrix) @ v.T
    assert torch.allclose(found, torch.diag(found.diag()), atol=1e-4)
    assert (found.diag()[s > 0.1 * s.max()] - 0.95).abs().max() < 0.3


def test_it_is_the_iteration_of_the_paper():
    """Step by step on the whole matrix, in float64, also for directions that hardly occur in it."""
    matrix = torch.randn(12, 40, generator=GENERATOR) @ torch.diag(torch.logspace(0, -5, 40))
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    for turned, expected in ((matrix, x), (matrix.T, x.T)):
        assert torch.allclose(orthogonalise(turned).double(), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 8), (8, 32), (8, 4, 3, 3)])
def test_a_step_is_as_long_as_one_of_adam_whatever_the_gradient(shape):
    for scale in (1e-4, 1e4):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = scale * torch.randn(shape, generator=GENERATOR)
        Muon([weight], lr=0.1, weight_decay=0.0).step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.25)
        assert (weight * weight.grad).sum() < 0


STACKS = [torch.randn(shape, generator=GENERATOR) for shape in ((5, 3, 4), (1, 6, 2), (2, 4, 4), (1, 2, 9))]


def orthogonalise_as(rank, world, meeting, stacks):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    found = orthogonalise_together(stacks)
    dist.destroy_process_group()
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(found, map(orthogonalise, stacks), strict=True))


@pytest.mark.slow
def test_processes_that_divide_the_matrices_all_get_what_one_would(tmp_path):
    """Some have none of a stack, and none has all; a wrong result in any of them raises here."""
    multiprocessing.spawn(orthogonalise_as, (3, tmp_path / "meeting", STACKS), nprocs=3)


def test_weights_decay_by_their_share():
    weight = nn.Parameter(torch.full((4, 4), 2.0))
    weight.grad = torch.zeros(4, 4)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(weight, torch.full((4, 4), 2 * (1 - 0.1 * 0.5)))


def test_momentum_looks_ahead():
    """After gradients g and 0 the buffer is 0.95 * 0.05 g, and the update has the direction of g still."""
    weight, g = nn.Parameter(torch.zeros(3, 3)), torch.randn(3, 3, generator=GENERATOR)
    optimiser = Muon([weight], lr=0.1, weight_decay=0.0)
    weight.grad = g
    optimiser.step()
    assert torch.allclose(optimiser.state[weight]["momentum"], 0.05 * g)
    first, weight.grad = weight.detach().clone(), torch.zeros(3, 3)
    optimiser.step()
    assert torch.allclose(optimiser.state[weight]["momentum"], 0.95 * 0.05 * g)
    assert torch.allclose(weight - first, first, rtol=0.05, atol=1e-4)


class Small(nn.Module):
    """A table of words, a matrix, and vectors."""

    def __init__(self):
        super().__init__()
        self.word_embedding, self.linear, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, words):
        return self.norm(self.linear(self.word_embedding(words))).square().mean() + self.norm.bias.sum()


def small_run(folder, steps, *, muon):
    torch.manual_seed(0)
    options = replace(training_example.options(steps), muon=muon, save_every=2)
    return TrainingRun(Small(), lambda step: (torch.arange(step, step + 3) % 5,), options, folder)


def test_matrices_are_for_muon_and_tables_and_vectors_for_adam(tmp_path):
    run = small_run(tmp_path, 2, muon=True)
    list(run.run())
    kept = {name for name in run.tensors() if not name.startswith(("weights.", "ema."))}
    assert {name for name in kept if name.startswith("muon")} == {"muon.momentum.linear.weight"}
    assert {name.split(".", 2)[2] for name in kept if name.startswith("adam")} == {
        "word_embedding.weight", "linear.bias", "norm.weight", "norm.bias",
    }  # fmt: skip
    assert not any(name.startswith("muon") for name in small_run(tmp_path / "adam", 2, muon=False).tensors())


def test_training_with_it_in_two_parts_is_training_in_one(tmp_path):
    whole = small_run(tmp_path / "whole", 6, muon=True)
    list(whole.run())
    list(small_run(tmp_path / "parts", 3, muon=True).run())
    parts = small_run(tmp_path / "parts", 6, muon=True)
    assert parts.step == 3
    list(parts.run())
    assert whole.tensors().keys() == parts.tensors().keys()
    assert all(torch.equal(value, parts.tensors()[name]) for name, value in whole.tensors().items())


def test_it_halves_a_loss_that_adam_also_halves(tmp_path):
    """A matrix from pairs of vectors; both optimisers with one learning rate."""
    inputs, target = torch.randn(64, 8, generator=GENERATOR), torch.randn(8, 8, generator=GENERATOR)
    for muon in (True, False):
        linear = nn.Linear(8, 8, bias=False)
        linear.forward = lambda x, w=linear: nn.functional.mse_loss(x @ w.weight.T, x @ target.T)
        options = replace(training_example.options(60), muon=muon, learning_rate=0.1, final_learning_rate=0.1)
        losses = [row["loss"] for row in TrainingRun(linear, lambda _: (inputs,), options, tmp_path / str(muon)).run()]
        assert losses[-1] < 0.5 * losses[0]
        assert math.isfinite(losses[-1])
