"""What the samplers see of the network."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from sd.config import SD_V1
from sd.sampling.denoiser import Denoiser, eps_from_v, rescale_guidance
from sd.sampling.schedule import add_noise, alphas_cumprod, x_0_from_eps, zero_terminal_snr

TABLE = alphas_cumprod(SD_V1.schedule)
BAR = TABLE[500].double()
PROMPT, NEGATIVE = torch.full((2, 77, 8), 3.0), torch.full((2, 77, 8), 2.0)


class Recorder:
    """A network whose prediction is x_t times the first number of the context."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, timestep, context):
        self.calls.append((x_t, timestep, context))
        return x_t * context[:, :1, :1, None]


def test_both_halves_of_guidance_go_through_the_network_at_once():
    network = Recorder()
    eps = Denoiser(network, "eps", TABLE, PROMPT, NEGATIVE, 7.5)(torch.ones(2, 4, 8, 8), BAR)
    ((x_t, timestep, context),) = network.calls
    assert x_t.shape == (4, 4, 8, 8)
    assert (timestep, timestep.dtype) == (500, torch.float32)
    assert context[:, 0, 0].tolist() == [2, 2, 3, 3]
    assert eps.unique().tolist() == [9.5]  # by hand: 2 + 7.5 * (3 - 2)


def test_scale_one_costs_half_and_scale_zero_is_the_negative_prediction():
    network = Recorder()
    eps = Denoiser(network, "eps", TABLE, PROMPT, NEGATIVE, 1.0)(torch.ones(2, 4, 8, 8), BAR)
    assert network.calls[0][0].shape == (2, 4, 8, 8)
    assert eps.unique().tolist() == [3]
    eps = Denoiser(network, "eps", TABLE, PROMPT, NEGATIVE, 0.0)(torch.ones(2, 4, 8, 8), BAR)
    assert eps.unique().tolist() == [2]


def test_velocity_gives_the_noise_that_was_added():
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
    for timestep in (0, 500, 999):
        bar = TABLE[timestep].double()
        v = bar.sqrt() * eps - (1 - bar).sqrt() * x_0
        assert torch.allclose(eps_from_v(v, add_noise(x_0, eps, bar), bar), eps, atol=1e-12)


def test_a_network_that_predicts_velocity_is_guided_and_converted():
    x_t = torch.ones(2, 4, 8, 8)
    eps = Denoiser(Recorder(), "v", TABLE, PROMPT, NEGATIVE, 7.5)(x_t, BAR)
    expected = (BAR.sqrt() * 9.5 + (1 - BAR).sqrt()).item()
    assert eps.unique().item() == pytest.approx(expected, rel=1e-6)


def test_the_network_runs_in_the_contexts_dtype_and_the_sampler_in_float32():
    network = Recorder()
    half = Denoiser(network, "eps", TABLE, PROMPT.bfloat16(), NEGATIVE.bfloat16(), 7.5)
    assert half(torch.ones(2, 4, 8, 8), BAR).dtype == torch.float32
    assert network.calls[0][0].dtype == torch.bfloat16


def test_prompts_may_change_between_two_steps():
    network = Recorder()
    for scale, expected in ((7.5, 9.5), (1.0, 3)):
        denoiser = Denoiser(network, "eps", TABLE, NEGATIVE, PROMPT, scale)
        denoiser(torch.ones(2, 4, 8, 8), BAR)
        denoiser.set_context(PROMPT, NEGATIVE)
        assert denoiser(torch.ones(2, 4, 8, 8), TABLE[499].double()).unique().tolist() == [expected]


def test_guidance_without_a_negative_context_and_unknown_predictions_are_refused():
    with pytest.raises(ValueError, match="guidance needs a negative context"):
        Denoiser(Recorder(), "eps", TABLE, PROMPT, None, 7.5)
    with pytest.raises(ValueError, match="one of eps, v, edm, x0, got 'x_0'"):
        Denoiser(Recorder(), "x_0", TABLE, PROMPT)


def test_between_timesteps_the_network_gets_a_fraction():
    network = Recorder()
    sigma = ((1 - TABLE[500:502].double()) / TABLE[500:502].double()).sqrt().prod().sqrt()
    Denoiser(network, "eps", TABLE, PROMPT)(torch.ones(2, 4, 8, 8), 1 / (1 + sigma**2))
    assert network.calls[0][1].item() == pytest.approx(500.5, abs=1e-3)


def test_outside_the_interval_there_is_no_guidance_and_half_the_work():
    network = Recorder()
    sigmas = {t: ((1 - TABLE[t].double()) / TABLE[t].double()).sqrt().item() for t in (100, 300, 500, 900)}
    ends = (sigmas[300], sigmas[500])  # both belong to it
    denoiser = Denoiser(network, "eps", TABLE, PROMPT, NEGATIVE, 7.5, guidance_interval=ends)
    found = [denoiser(torch.ones(2, 4, 8, 8), TABLE[t].double()).unique().tolist() for t in (900, 500, 300, 100)]
    assert found == [[3], [9.5], [9.5], [3]]  # the prompt's own, or by hand 2 + 7.5 * (3 - 2)
    assert [len(x_t) for x_t, _, _ in network.calls] == [2, 4, 4, 2]
    assert [context[0, 0, 0].item() for _, _, context in network.calls] == [3, 2, 2, 3]


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_guidance_rescale_equals_diffusers(share):
    guided, positive = 3 * torch.randn(2, 4, 8, 8) + 1, torch.randn(2, 4, 8, 8)
    expected = rescale_noise_cfg(guided, positive, guidance_rescale=share)
    assert torch.allclose(rescale_guidance(guided, positive, share), expected, rtol=1e-6)


def test_guidance_rescale_gives_each_picture_the_deviation_of_its_prompt():
    x_t = torch.randn(2, 4, 8, 8) * torch.tensor([1.0, 5.0]).reshape(2, 1, 1, 1)
    eps = Denoiser(Recorder(), "eps", TABLE, PROMPT, NEGATIVE, 7.5, guidance_rescale=1.0)(x_t, BAR)
    assert torch.allclose(eps, 3 * x_t, rtol=1e-5)  # 9.5 without rescaling


def test_velocity_at_pure_noise_still_gives_the_picture():
    """alpha_bar is 2**-24 there: dividing by its root costs some digits of x_0, but no more."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 2, 4, 8, 8, generator=generator)
    bar = zero_terminal_snr(TABLE)[-1].double()
    x_t = add_noise(x_0, eps, bar)
    found = x_0_from_eps(x_t, eps_from_v(bar.sqrt() * eps - (1 - bar).sqrt() * x_0, x_t, bar), bar)
    assert (found - x_0).abs().max() < 2e-3
