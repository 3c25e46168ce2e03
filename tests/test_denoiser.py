"""What the samplers see of the network."""

import pytest
import torch

from sd.config import SD_V1
from sd.denoiser import Denoiser, eps_from_v, guide
from sd.schedule import add_noise, alphas_cumprod

TABLE = alphas_cumprod(SD_V1.schedule)
PROMPT, NEGATIVE = torch.full((2, 77, 8), 3.0), torch.full((2, 77, 8), 2.0)


class Recorder:
    """A network whose prediction is x_t times the first number of the context."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, timestep, context):
        self.calls.append((x_t, timestep, context))
        return x_t * context[:, :1, :1, None]


def test_guidance_goes_on_beyond_the_prompts_prediction():
    # by hand: 2 + 7.5 * (3 - 2)
    assert guide(torch.tensor(3.0), torch.tensor(2.0), 7.5).item() == 9.5


def test_both_halves_of_guidance_go_through_the_network_at_once():
    network = Recorder()
    eps = Denoiser(network, "eps", TABLE, PROMPT, NEGATIVE, 7.5)(torch.ones(2, 4, 8, 8), torch.tensor(500))
    ((x_t, timestep, context),) = network.calls
    assert x_t.shape == (4, 4, 8, 8)
    assert timestep.item() == 500
    assert context[:, 0, 0].tolist() == [2, 2, 3, 3]
    assert eps.unique().tolist() == [9.5]


def test_scale_one_costs_half():
    network = Recorder()
    eps = Denoiser(network, "eps", TABLE, PROMPT, NEGATIVE, 1.0)(torch.ones(2, 4, 8, 8), torch.tensor(500))
    assert network.calls[0][0].shape == (2, 4, 8, 8)
    assert eps.unique().tolist() == [3]


def test_scale_zero_is_the_negative_prediction():
    eps = Denoiser(Recorder(), "eps", TABLE, PROMPT, NEGATIVE, 0.0)(torch.ones(2, 4, 8, 8), torch.tensor(500))
    assert eps.unique().tolist() == [2]


def test_velocity_gives_the_noise_that_was_added():
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
    for timestep in (0, 500, 999):
        bar = TABLE[timestep].double()
        v = bar.sqrt() * eps - (1 - bar).sqrt() * x_0
        assert torch.allclose(eps_from_v(v, add_noise(x_0, eps, bar), bar), eps, atol=1e-12)


def test_a_network_that_predicts_velocity_is_converted_before_guidance():
    x_t = torch.ones(2, 4, 8, 8)
    eps = Denoiser(Recorder(), "v", TABLE, PROMPT, NEGATIVE, 7.5)(x_t, torch.tensor(500))
    bar = TABLE[500].double()
    expected = (bar.sqrt() * 9.5 + (1 - bar).sqrt()).item()  # guidance is affine, so the order of the two is seen in it
    assert eps.unique().item() == pytest.approx(expected, rel=1e-6)


def test_the_network_runs_in_the_contexts_dtype_and_the_sampler_in_float32():
    network = Recorder()
    half = Denoiser(network, "eps", TABLE, PROMPT.bfloat16(), NEGATIVE.bfloat16(), 7.5)
    assert half(torch.ones(2, 4, 8, 8), torch.tensor(1)).dtype == torch.float32
    assert network.calls[0][0].dtype == torch.bfloat16


def test_prompts_may_change_between_two_steps():
    network = Recorder()
    for scale, expected in ((7.5, 9.5), (1.0, 3)):
        denoiser = Denoiser(network, "eps", TABLE, NEGATIVE, PROMPT, scale)
        denoiser(torch.ones(2, 4, 8, 8), torch.tensor(500))
        denoiser.set_context(PROMPT, NEGATIVE)
        assert denoiser(torch.ones(2, 4, 8, 8), torch.tensor(499)).unique().tolist() == [expected]


def test_guidance_without_a_negative_context_is_refused():
    with pytest.raises(ValueError, match="guidance needs a negative context"):
        Denoiser(Recorder(), "eps", TABLE, PROMPT, None, 7.5)


def test_unknown_predictions_are_refused():
    with pytest.raises(ValueError, match='"eps" or "v", got \'x_0\''):
        Denoiser(Recorder(), "x_0", TABLE, PROMPT)
