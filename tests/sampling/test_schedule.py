"""The noise schedule and the spacings of timesteps."""

from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from sd.config import SD_V1
from sd.sampling.names import SCHEDULES
from sd.sampling.schedule import (
    add_noise,
    alpha_bar_at,
    alpha_bar_of,
    alphas_cumprod,
    custom_steps,
    sampling_steps,
    sigma_of,
    timestep_at,
    x_0_from_eps,
    zero_terminal_snr,
)
from sd.sampling.spacing import beta_quantile

TABLE = alphas_cumprod(SD_V1.schedule)
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def timesteps(steps, **options):
    return [step.timestep.item() for step in sampling_steps(TABLE, steps, **options)]


def test_table_is_the_running_product_and_has_the_published_ends():
    assert TABLE.dtype == torch.float32
    assert TABLE.tolist() == pytest.approx(reference.alphas_cumprod(), rel=1e-6)
    assert [TABLE[0].item(), TABLE[-1].item()] == pytest.approx([0.99915, 0.0046600985], rel=1e-5)
    sigma = ((1 - TABLE) / TABLE).sqrt()
    assert [sigma[0].item(), sigma[-1].item()] == pytest.approx([0.0291672, 14.61464], rel=1e-4)


def test_spacings_by_hand():
    # numpy.arange(0, 1000, 1000 // 50) + 1, reversed
    assert timesteps(50) == list(range(981, 0, -20))
    assert timesteps(30)[:2] == [958, 925]
    assert (timesteps(30)[-1], timesteps(1)) == (1, [1])
    for schedule in ("leading", "trailing"):  # every timestep, and none outside the table
        assert timesteps(1000, schedule=schedule) == list(range(999, -1, -1))
    assert timesteps(4, schedule="trailing") == [999, 749, 499, 249]
    assert timesteps(4, schedule="linspace") == [999, 666, 333, 0]
    assert timesteps(1, schedule="linspace") == [999]
    assert timesteps(5, schedule="normal") == pytest.approx([999, 749.25, 499.5, 249.75, 0], abs=1e-3)
    # even timesteps without the last
    assert timesteps(4, schedule="sgm_uniform") == pytest.approx([999, 749.25, 499.5, 249.75], abs=1e-3)
    # 999 - floor(i * 1000 / 7)
    assert timesteps(7, schedule="simple") == [999, 857, 714, 571, 428, 285, 142]
    # 999 - 20 * floor(i * 50 / 4)
    assert timesteps(4, schedule="distilled") == [999, 759, 499, 259]
    assert timesteps(51, schedule="distilled")[:3] == [999, 980, 960]  # more than 50: 999 - floor(i * 1000 / 51)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_falls_strictly_within_the_table(schedule):
    for steps in (1, 2, 7, 30, 999, 1000):
        found = sampling_steps(TABLE, steps, schedule=schedule, final_alpha="one")
        assert len(found) == steps
        assert all(step.alpha_bar < step.alpha_bar_prev for step in found)
        assert all(0 <= step.timestep <= 999 for step in found)
        assert all(a.timestep >= b.timestep for a, b in pairwise(found))
        assert found[0].alpha_bar >= TABLE[-1].double() * (1 - 1e-12)
    rescaled = sampling_steps(zero_terminal_snr(TABLE), 20, schedule=schedule, final_alpha="one")
    assert all(step.alpha_bar < step.alpha_bar_prev for step in rescaled)
    assert rescaled[0].timestep == {"leading": 951}.get(schedule, 999)


@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler])
def test_timesteps_of_distillation_equal_diffusers(scheduler):
    for steps in range(1, 51):
        theirs = scheduler(**SCHEDULER)
        theirs.set_timesteps(steps)
        assert timesteps(steps, schedule="distilled") == theirs.timesteps.tolist(), steps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_equal_diffusers(spacing):
    scheduler = DDIMScheduler(**SCHEDULER, steps_offset=1, timestep_spacing=spacing)
    for steps in (3, 30, 50, 77):
        scheduler.set_timesteps(steps)
        assert timesteps(steps, schedule=spacing) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_discarded_level_is_the_last_but_one_of_one_more(schedule):
    for steps in (1, 2, 7, 999):
        more = sampling_steps(TABLE, steps + 1, schedule=schedule, final_alpha="one")
        found = sampling_steps(TABLE, steps, schedule=schedule, final_alpha="one", discard_penultimate=True)
        assert [step.alpha_bar for step in found] == [step.alpha_bar for step in more[:-1]]
        assert found[-1].alpha_bar_prev == 1
    with pytest.raises(ValueError, match="steps must be 1 to 999, got 1000"):
        sampling_steps(TABLE, 1000, schedule=schedule, discard_penultimate=True)


def sigmas(steps, **options):
    return [sigma_of(step.alpha_bar).item() for step in sampling_steps(TABLE, steps, **options)]


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_sigmas_equal_diffusers(schedule):
    scheduler = DPMSolverMultistepScheduler(**SCHEDULER, **{f"use_{schedule}_sigmas": True})
    for steps in (2, 10, 30):
        scheduler.set_timesteps(steps)
        assert sigmas(steps, schedule=schedule) == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5)


def test_karras_and_exponential_by_hand():
    # eq. 5 with rho 7: the ends' seventh roots are 1.46689 and 0.60354, their mean 1.03522, its seventh power 1.2742
    assert sigmas(3, schedule="karras") == pytest.approx([14.61464, 1.2742, 0.0291672], rel=1e-3)
    # the middle of the two ends by one factor: sqrt(14.61464 * 0.0291672)
    assert sigmas(3, schedule="exponential") == pytest.approx([14.61464, 0.652889, 0.0291672], rel=1e-4)


def test_fractional_timesteps_equal_diffusers():
    scheduler = EulerDiscreteScheduler(**SCHEDULER, timestep_spacing="linspace", interpolation_type="log_linear")
    steps = [0.0, 0.5, 249.75, 498.2, 999.0]
    ours = sigma_of(alpha_bar_at(TABLE, torch.tensor(steps, dtype=torch.float64))).tolist()
    logs = np.log(np.sqrt((1 - TABLE.numpy()) / TABLE.numpy()).astype(np.float64))
    for step, sigma in zip(steps, ours, strict=True):
        assert sigma == pytest.approx(np.exp(np.interp(step, np.arange(1000), logs)), rel=1e-6)
        assert scheduler._sigma_to_t(np.array(sigma), logs).item() == pytest.approx(step, abs=0.01)


def test_beta_is_denser_at_both_ends_and_symmetric():
    steps = timesteps(40, schedule="beta")
    gaps = [a - b for a, b in pairwise(steps)]
    assert gaps[0] < gaps[20]
    assert gaps[-1] < gaps[20]
    assert steps[20] == pytest.approx(999 / 2, abs=1e-3)
    assert [a + b for a, b in zip(steps[1:], reversed(steps[1:]), strict=True)] == pytest.approx([999] * 39, abs=0.01)


def test_beta_quantile_has_its_share_below_it():
    shares = torch.tensor([0.0, 0.001, 0.2, 0.5, 0.9, 0.999, 1.0], dtype=torch.float64)
    angles = (np.arange(400_000) + 0.5) / 400_000 * np.pi / 2
    for shape in (0.6, 0.5, 1.0, 2.0):
        # sin(angle)**2 takes the density's poles away; the rest is summed up in small pieces
        density = (np.sin(angles) * np.cos(angles)) ** (2 * shape - 1)
        for share, x in zip(shares.tolist(), beta_quantile(shares, shape).tolist(), strict=True):
            below = density[np.sin(angles) ** 2 < x].sum() / density.sum()
            assert below == pytest.approx(share, abs=1e-5), shape
    # Beta(1, 1) is uniform, Beta(1/2, 1/2) the arcsine distribution
    assert torch.allclose(beta_quantile(shares, 1.0), shares, atol=1e-14)
    assert torch.allclose(beta_quantile(shares, 0.5), torch.sin(shares * torch.pi / 2) ** 2, atol=1e-14)


def test_timesteps_are_whole_in_the_table_and_between_entries_linear_in_the_logarithm_of_sigma():
    assert timestep_at(TABLE, TABLE.double()).tolist() == list(range(1000))
    assert torch.equal(alpha_bar_at(TABLE, torch.arange(1000)), TABLE.double())
    middle = (sigma_of(TABLE[500].double()) * sigma_of(TABLE[501].double())).sqrt()
    assert timestep_at(TABLE, alpha_bar_of(middle)).item() == pytest.approx(500.5, abs=1e-4)
    steps = torch.tensor([0.25, 17.5, 998.75], dtype=torch.float64)
    assert timestep_at(TABLE, alpha_bar_at(TABLE, steps)).tolist() == pytest.approx(steps.tolist(), abs=1e-4)
    beyond = torch.tensor([0.0, 1e-6, 0.9999, 1.0], dtype=torch.float64)  # its end
    assert timestep_at(TABLE, beyond).tolist() == [999, 999, 0, 0]


def test_custom_sigmas_are_visited_and_end_without_noise():
    for given in ([14.6, 7, 3], [14.6, 7, 3, 0]):
        steps = custom_steps(TABLE, given)
        assert [sigma_of(step.alpha_bar).item() for step in steps] == pytest.approx([14.6, 7, 3])
        assert steps[-1].alpha_bar_prev == 1
    for given in ([], [0], [3, 3], [3, 7], [3, -1], [3, 0, 0], [float("nan")]):
        with pytest.raises(ValueError, match="sigmas must fall from step to step and be above 0"):
            custom_steps(TABLE, given)


def test_zero_terminal_snr_equals_diffusers_except_for_the_last_entry():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    ours = zero_terminal_snr(TABLE).double()
    assert torch.allclose(ours[:-1], expected[:-1], rtol=1e-4, atol=1e-9)
    assert ours[0].item() == pytest.approx(TABLE[0].item(), rel=1e-6)
    assert expected[-1] == 0
    assert 0 < ours[-1] < 1e-7


def test_noise_is_added_by_the_forward_process_and_x_0_found_again():
    assert add_noise(torch.tensor(2.0), torch.tensor(-1.0), torch.tensor(0.64)).item() == pytest.approx(1.6 - 0.6)
    x_0, eps, bar = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.5]), torch.tensor(0.3)
    assert torch.allclose(x_0_from_eps(add_noise(x_0, eps, bar), eps, bar), x_0)


def test_a_part_of_the_steps_keeps_their_table():
    steps = sampling_steps(TABLE, 4)
    assert steps[1:].table is TABLE
    assert [step.timestep for step in steps[1:]] == [steps[i].timestep for i in (1, 2, 3)]


def test_steps_are_chained_and_end_at_the_first_entry_or_at_no_noise():
    for final_alpha, last in (("first", TABLE[0].item()), ("one", 1.0)):
        steps = sampling_steps(TABLE, 10, final_alpha=final_alpha)
        assert [step.alpha_bar for step in steps[1:]] == [step.alpha_bar_prev for step in steps[:-1]]
        assert steps[-1].alpha_bar_prev.item() == last
        assert steps[0].alpha_bar.item() == TABLE[901].item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be 1 to 1000, got 0"),
        ({"steps": 1001}, "steps must be 1 to 1000, got 1001"),
        ({"steps": 5, "schedule": "karas"}, "schedule must be one of leading, trailing, linspace, .*, got 'karas'"),
        ({"steps": 5, "final_alpha": "zero"}, "final_alpha must be one of first, one, got 'zero'"),
    ],
)
def test_invalid_values_are_refused_and_the_allowed_ones_named(options, message):
    with pytest.raises(ValueError, match=message):
        sampling_steps(TABLE, **options)
