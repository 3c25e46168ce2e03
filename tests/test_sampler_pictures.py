"""Every sampler with every schedule that makes sense for it draws what the prompt says, with the embedded model."""

import pytest

import sd
from sd.sampler_names import SAMPLERS, SCHEDULES
from sd.settings import Settings
from sd.training.scoring import request_for, verdicts

REQUESTS = [
    request_for("circle", "red", "blue", 1),
    request_for("square", "green", "white", 2),
    request_for("heart", "yellow", "purple", 3),
]
STEPS = 20
SENSELESS: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module")
def model():
    return sd.load()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_are_right(model, sampler, schedule):
    if (sampler, schedule) in SENSELESS:
        pytest.skip(SENSELESS[sampler, schedule])
    settings = {"sampler": sampler, "schedule": schedule, "steps": STEPS, "width": 128, "height": 128}
    pictures = model.make([Settings(prompt=each.prompt, seed=each.seed, **settings) for each in REQUESTS])
    assert [verdict.all for verdict in verdicts(pictures, REQUESTS)] == [True] * len(REQUESTS)
