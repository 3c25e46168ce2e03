"""The noise schedule and the spacings of timesteps."""

from itertools import pairwise

import pytest
import reference
import torch
from diffusers import DDIMScheduler

from sd.config import SD_V1
from sd.schedule import SPACINGS, add_noise, alphas_cumprod, sampling_steps

TABLE = alphas_cumprod(SD_V1.schedule)


def timesteps(steps, **options):
    return [step.timestep.item() for step in sampling_steps(TABLE, steps, **options)]


def test_table_is_the_running_product():
    assert TABLE.dtype == torch.float32
    assert TABLE.tolist() == pytest.approx(reference.alphas_cumprod(), rel=1e-6)


def test_table_has_the_published_ends():
    assert TABLE[0].item() == pytest.approx(0.99915)
    assert TABLE[-1].item() == pytest.approx(0.0046600985, rel=1e-6)
    sigma = ((1 - TABLE) / TABLE).sqrt()
    assert sigma[-1].item() == pytest.approx(14.61464, rel=1e-5)
    assert sigma[0].item() == pytest.approx(0.0291672, rel=1e-4)


def test_leading_is_the_originals_spacing():
    # numpy.arange(0, 1000, 1000 // 50) + 1, reversed
    assert timesteps(50) == list(range(981, 0, -20))
    assert timesteps(30)[:2] == [958, 925]
    assert timesteps(30)[-1] == 1
    assert timesteps(1) == [1]


def test_leading_visits_every_timestep_without_leaving_the_table():
    assert timesteps(1000) == list(range(999, -1, -1))


def test_trailing_starts_at_the_noisiest_timestep():
    assert timesteps(4, spacing="trailing") == [999, 749, 499, 249]
    assert timesteps(1000, spacing="trailing") == list(range(999, -1, -1))


def test_linspace_has_both_ends():
    assert timesteps(4, spacing="linspace") == [999, 666, 333, 0]
    assert timesteps(1, spacing="linspace") == [999]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50, 999, 1000])
def test_every_spacing_falls_strictly_within_the_table(spacing, steps):
    visited = timesteps(steps, spacing=spacing)
    assert len(visited) == steps
    assert all(a > b for a, b in pairwise(visited))
    assert visited[0] <= 999
    assert visited[-1] >= 0


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [3, 10, 30, 50, 77])
def test_spacings_are_those_of_diffusers(spacing, steps):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing=spacing
    )
    scheduler.set_timesteps(steps)
    assert timesteps(steps, spacing=spacing) == scheduler.timesteps.tolist()


def test_steps_are_chained_and_end_at_the_first_entry_or_at_no_noise():
    for final_alpha, last in (("first", TABLE[0].item()), ("one", 1.0)):
        steps = sampling_steps(TABLE, 10, final_alpha=final_alpha)
        assert [step.alpha_bar for step in steps[1:]] == [step.alpha_bar_prev for step in steps[:-1]]
        assert steps[-1].alpha_bar_prev.item() == last
        assert steps[0].alpha_bar.item() == TABLE[901].item()


def test_noise_is_added_as_one_jump_of_the_forward_process():
    assert add_noise(torch.tensor(2.0), torch.tensor(-1.0), torch.tensor(0.64)).item() == pytest.approx(1.6 - 0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be 1 to 1000, got 0"),
        ({"steps": 1001}, "steps must be 1 to 1000, got 1001"),
        ({"steps": 5, "spacing": "karras"}, "spacing must be one of leading, trailing, linspace, got 'karras'"),
        ({"steps": 5, "final_alpha": "zero"}, "final_alpha must be one of first, one, got 'zero'"),
    ],
)
def test_other_values_are_refused_with_those_that_are_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        sampling_steps(TABLE, **options)
