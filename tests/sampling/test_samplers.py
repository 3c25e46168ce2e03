"""The samplers against closed forms and against each other; see test_samplers_parity.py for other implementations."""

import math

import pytest
import torch
from oracles import relative_error
from reference import Gaussian
from sampling import DATA, TABLE, best_eps, even_steps, last, moment_error, moments, noise, orders, some_network

from sd.sampling.denoiser import Denoiser
from sd.sampling.names import SAMPLER_INFO
from sd.sampling.noise import PictureNoise
from sd.sampling.samplers import SAMPLERS, find_sampler
from sd.sampling.samplers.ddim import ddim, ddim_noise_scale, ddim_step
from sd.sampling.samplers.ddpm import ddpm, ddpm_posterior
from sd.sampling.samplers.dpmpp_2s import dpmpp_sde, whole_step_noise
from sd.sampling.samplers.euler import euler
from sd.sampling.samplers.lcm import lcm
from sd.sampling.samplers.lms import adams_bashforth, lms
from sd.sampling.samplers.unipc import unipc
from sd.sampling.schedule import alpha_bar_at, alpha_bar_of, sampling_steps, zero_terminal_snr

POINT = Gaussian(mean=0.7, deviation=0.0)
DETERMINISTIC = ["ddim", "plms", "euler", "heun", "lms", "dpm2", "dpmpp_2m", "unipc", "unipc_bh1", "unipc_bh2"]
STOCHASTIC = ["ddpm", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "lcm", "tcd"]


def flow_errors(sampler, counts, steps_of=even_steps, **options):
    """Largest distance from where the probability flow leads."""
    x, errors = noise()().double(), []
    for count in counts:
        steps = steps_of(count)
        exact = DATA.flow(x, steps[0].alpha_bar, steps[-1].alpha_bar_prev)
        errors.append((last(sampler(best_eps(DATA), x, steps, **options)) - exact).abs().max().item())
    return errors


def test_the_two_lists_are_all_samplers():
    assert sorted(DETERMINISTIC + STOCHASTIC) == sorted(SAMPLERS) == sorted(SAMPLER_INFO)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_the_flow_is_followed_exactly_where_the_data_is_a_single_point(sampler):
    x = noise()().double()
    steps = sampling_steps(TABLE, 7)
    for step, x_t in zip(steps, find_sampler(sampler)(best_eps(POINT), x, steps), strict=True):
        assert torch.allclose(x_t, POINT.flow(x, steps[0].alpha_bar, step.alpha_bar_prev), atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm2", 2), ("plms", 2), ("dpmpp_2m", 2)],
)
def test_the_error_shrinks_at_the_methods_order(sampler, order):
    measured = orders(flow_errors(find_sampler(sampler), (32, 64, 128)))
    assert measured == pytest.approx([order, order], abs=0.15)


def test_lms_is_of_order_four_until_its_first_steps_show():
    # Its first step is Euler's, whose error of order 2 is small here and would win with many more steps.
    measured = orders(flow_errors(lms, (16, 32, 64)))
    assert all(3.2 < order < 4.2 for order in measured)
    for order in (1, 2):
        assert orders(flow_errors(lms, (64, 128), order=order)) == pytest.approx([order], abs=0.15)


@pytest.mark.parametrize(("order", "expected"), [(1, 2), (2, 3), (3, 3)])
def test_unipc_is_one_order_better_than_its_predictor_on_the_way(order, expected):
    """The last steps are of lower order, so the error is taken before them; the first one limits the order to 3."""
    x, errors = noise()().double(), []
    for count in (32, 64, 128):
        steps = even_steps(count)
        reached = list(unipc(best_eps(DATA), x, steps, order=order))[count // 2 - 1]
        exact = DATA.flow(x, steps[0].alpha_bar, steps[count // 2 - 1].alpha_bar_prev)
        errors.append((reached - exact).abs().max().item())
    assert orders(errors)[-1] == pytest.approx(expected, abs=0.35)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "order"),
    [("ddpm", 1), ("euler_a", 1), ("dpm2_a", 2), ("dpmpp_2s_a", 2), ("dpmpp_2m_sde", 2)],
)
def test_mean_and_deviation_approach_those_of_the_data_at_the_methods_order(sampler, order):
    measured = orders([moment_error(find_sampler(sampler), even_steps(count)) for count in (32, 64)])
    assert measured == pytest.approx([order], abs=0.25)


@pytest.mark.slow
def test_dpmpp_sde_is_of_order_two_only_if_the_two_noises_of_a_step_belong_together(monkeypatch):
    errors = [moment_error(dpmpp_sde, even_steps(count)) for count in (16, 32)]
    monkeypatch.setattr("sd.sampling.samplers.dpmpp_2s.whole_step_noise", lambda first, second, *_: second)
    independent = [moment_error(dpmpp_sde, even_steps(count)) for count in (16, 32)]
    assert orders(errors) == pytest.approx([2], abs=0.25)
    assert orders(independent)[0] < 1
    assert independent[1] > 10 * errors[1]


def test_noise_of_a_whole_step_is_standard_and_contains_that_of_its_first_half():
    start, middle, end = alpha_bar_of(torch.tensor([9.0, 5.0, 2.0], dtype=torch.float64))
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    first = whole_step_noise(one, zero, start, middle, end).item()
    second = whole_step_noise(zero, one, start, middle, end).item()
    assert first**2 == pytest.approx(4 / 7, rel=1e-6)  # by hand: (9 - 5) of (9 - 2)
    assert first**2 + second**2 == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("sampler", ["euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "tcd"])
def test_without_fresh_noise_the_flow_is_followed(sampler):
    without = {"euler_a": "euler", "dpm2_a": "dpm2", "dpmpp_2m_sde": "dpmpp_2m", "tcd": "ddim"}.get(
        sampler, "dpmpp_2s_a"
    )
    options = {"draw_noise": None, "eta": 0.0} if without == "dpmpp_2s_a" else {}
    steps = sampling_steps(TABLE, 9, schedule="karras", final_alpha="one")
    ours = list(find_sampler(sampler)(some_network, noise()(), steps, draw_noise=None, eta=0.0))
    theirs = list(find_sampler(without)(some_network, noise()(), steps, **options))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_some_fresh_noise_keeps_the_moments():
    for sampler in ("euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde"):
        assert moment_error(find_sampler(sampler), even_steps(32), eta=0.5) < 0.02, sampler


@pytest.mark.parametrize("schedule", ["leading", "karras"])
def test_euler_and_ddim_without_noise_are_the_same(schedule):
    steps = sampling_steps(TABLE, 20, schedule=schedule, final_alpha="one")
    pairs = zip(euler(some_network, noise()(), steps), ddim(some_network, noise()(), steps), strict=True)
    assert max(relative_error(a, b) for a, b in pairs) < 2e-6


def test_linear_multistep_weights_are_adams_and_bashforths_and_integrate_cubics_over_uneven_steps():
    # even steps of length 1 downwards: the textbook's weights, newest last
    assert adams_bashforth([5, 4], 4, 3) == pytest.approx([-1 / 2, 3 / 2])
    assert adams_bashforth([6, 5, 4], 4, 3) == pytest.approx([5 / 12, -16 / 12, 23 / 12])
    assert adams_bashforth([7, 6, 5, 4], 4, 3) == pytest.approx([-9 / 24, 37 / 24, -59 / 24, 55 / 24])
    sigmas, start, end = [14.0, 9.0, 7.5, 3.0], 3.0, 0.4
    weights = adams_bashforth(sigmas, start, end)
    for power in range(4):
        exact = (end ** (power + 1) - start ** (power + 1)) / (power + 1) / (end - start)
        assert sum(w * s**power for w, s in zip(weights, sigmas, strict=True)) == pytest.approx(exact, rel=1e-12)


def gaussian_ddpm_moments(steps, data):
    """Mean and variance for DDPM, written down from q(x_(t-1) | x_t, x_0) with the expected x_0 put in."""
    mean, variance = 0.0, 1.0
    for _, bar, previous in steps:
        bar, previous = bar.item(), previous.item()
        alpha = bar / previous
        slope, shift = expected_x_0(bar, data)
        on_x_0 = previous**0.5 * (1 - alpha) / (1 - bar)
        on_x_t = alpha**0.5 * (1 - previous) / (1 - bar)
        mean = (on_x_0 * slope + on_x_t) * mean + on_x_0 * shift
        variance = (on_x_0 * slope + on_x_t) ** 2 * variance + (1 - alpha) * (1 - previous) / (1 - bar)
    return mean, variance


def expected_x_0(bar, data):
    """E[x_0 | x_t] = slope * x_t + shift"""
    spread = bar * data.deviation**2 + 1 - bar
    return bar**0.5 * data.deviation**2 / spread, data.mean * (1 - bar) / spread


@pytest.mark.parametrize(("count", "schedule"), [(5, "leading"), (20, "trailing"), (50, "linspace")])
def test_ddpm_gives_exactly_the_moments_of_its_posterior(count, schedule):
    steps = sampling_steps(TABLE, count, schedule=schedule, final_alpha="one")
    assert moments(ddpm, steps, DATA) == pytest.approx(gaussian_ddpm_moments(steps, DATA), rel=1e-6)
    mean, variance = gaussian_ddpm_moments(sampling_steps(TABLE, 1000, final_alpha="one"), DATA)
    assert (mean, variance**0.5) == pytest.approx((DATA.mean, DATA.deviation), abs=0.02)


def test_lcm_jumps_to_the_expected_picture_and_back_into_noise():
    # with ordinary predictions it cannot approach the data; its moments are those of the jumps, written down by hand
    steps = sampling_steps(TABLE, 4, schedule="trailing", final_alpha="one")
    mean, variance = 0.0, 1.0
    for timestep, bar, previous in steps:
        slope, shift = expected_x_0(bar.item(), DATA)
        scaled = 10 * timestep.item() / 0.5
        c_skip, c_out = 1 / (scaled**2 + 1), scaled / math.sqrt(scaled**2 + 1)
        mean, variance = (c_skip + c_out * slope) * mean + c_out * shift, (c_skip + c_out * slope) ** 2 * variance
        mean, variance = previous.item() ** 0.5 * mean, previous.item() * variance + 1 - previous.item()
    assert moments(lcm, steps, DATA) == pytest.approx((mean, variance), rel=1e-6)


def test_ddim_with_eta_one_is_the_ddpm_posterior():
    x, eps = noise(1)().double(), noise(3)().double()
    for _, bar, previous in sampling_steps(TABLE, 25):
        sigma = ddim_noise_scale(bar, previous, 1.0)
        mean, variance = ddpm_posterior(x, eps, bar, previous)
        assert torch.allclose(ddim_step(x, eps, bar, previous, sigma), mean, atol=1e-12)
        assert sigma.item() ** 2 == pytest.approx(variance.item(), rel=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_predictions_cost_what_the_table_of_samplers_says(sampler):
    calls = []

    def network(x, alpha_bar):
        calls.append(alpha_bar)
        return some_network(x, alpha_bar)

    steps = sampling_steps(TABLE, 6, schedule="karras", final_alpha="one")
    assert len(list(find_sampler(sampler)(network, noise()(), steps, draw_noise=noise(1)))) == 6
    # two-stage methods save one prediction at the end, PLMS needs one more at its start
    assert len(calls) == {1: 6, 2: 11}[SAMPLER_INFO[sampler].predictions] + (sampler == "plms")
    assert all(0 < alpha_bar < 1 for alpha_bar in calls)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_a_picture_gets_the_same_noise_in_any_batch(sampler):
    steps = sampling_steps(TABLE, 6, schedule="karras", final_alpha="one")

    def final(seeds):
        draw = PictureNoise(seeds, (4, 8, 8))
        return last(find_sampler(sampler)(some_network, draw(), steps, draw_noise=draw))

    together = final([10, 11, 12])
    for i, seed in enumerate([10, 11, 12]):
        assert torch.equal(together[i : i + 1], final([seed]))
    assert relative_error(together[:1], together[1:2]) > 0.1


def test_invalid_eta_and_order_are_refused():
    steps = sampling_steps(TABLE, 3)
    for sampler in ("ddim", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "tcd"):
        for eta in (-0.1, 1.1):
            with pytest.raises(ValueError, match="eta must be 0 to 1"):
                last(find_sampler(sampler)(some_network, noise()(), steps, eta=eta, draw_noise=noise()))
    with pytest.raises(ValueError, match="give draw_noise"):
        last(ddim(some_network, noise()(), steps, eta=0.5))
    with pytest.raises(ValueError, match="order must be 1 to 4, got 5"):
        last(lms(some_network, noise()(), steps, order=5))
    with pytest.raises(ValueError, match="order must be 1 to 3, got 4"):
        last(unipc(some_network, noise()(), steps, order=4))


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"lcm"}))
def test_from_pure_noise_the_data_is_reached(sampler):
    steps = sampling_steps(zero_terminal_snr(TABLE), 30, schedule="trailing", final_alpha="one")
    out = last(find_sampler(sampler)(best_eps(DATA), noise()(), steps, draw_noise=noise(5)))
    assert steps[0].alpha_bar < 1e-7
    # 30 steps of order 1, with the last one from sigma 0.17 on, leave a tenth
    assert out.mean().item() == pytest.approx(DATA.mean, abs=0.1)
    assert out.std().item() == pytest.approx(DATA.deviation, abs=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_network_that_predicts_v_leads_where_one_that_predicts_eps_does(sampler):
    """Both in closed form; v through the denoiser that pictures are made with, which knows timesteps only."""

    def best_v(x, timestep, context):
        return DATA.v(x, alpha_bar_at(TABLE, timestep.reshape(1))[0])

    steps = sampling_steps(TABLE, 12, schedule="karras", final_alpha="one")
    x, denoiser = noise()().double(), Denoiser(best_v, "v", TABLE, torch.zeros(2, 1, 1, dtype=torch.float64))
    by_v, by_eps = (
        last(find_sampler(sampler)(predict, x, steps, draw_noise=noise(5))) for predict in (denoiser, best_eps(DATA))
    )
    assert relative_error(by_v, by_eps) < 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_few_steps_stay_finite_and_leave_their_input_unchanged(sampler):
    x = noise()()
    kept = x.clone()
    for count in (1, 2, 3):
        for final_alpha in ("first", "one"):
            steps = sampling_steps(TABLE, count, schedule="trailing", final_alpha=final_alpha)
            out = list(find_sampler(sampler)(some_network, x, steps, draw_noise=noise(1)))
            assert len(out) == count
            assert all(x_t.isfinite().all() and x_t.dtype == torch.float32 for x_t in out)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_never_read_from_the_device(sampler):
    """On the meta device there are no numbers: reading one, or mixing in a tensor from the CPU, is an error."""
    steps = sampling_steps(TABLE, 4, schedule="karras", final_alpha="one")
    x = torch.empty(1, 4, 8, 8, device="meta")
    out = last(find_sampler(sampler)(some_network, x, steps, draw_noise=lambda: torch.empty_like(x)))
    assert (out.device.type, out.dtype) == ("meta", torch.float32)
