"""What one prediction says of a file of Stable Diffusion 2 that does not state whether it predicts eps or v."""

import make_checkpoint
import pytest
import torch
from conftest import assemble, fill
from safetensors.torch import save_file

import sd
from convert.layouts.noise_schedule import PREDICTS_V, SPREAD_BIAS, SPREAD_OF_V
from sd.app.jobs.model import opened
from sd.app.jobs.request import ModelRequest
from sd.config import SD_V2, SD_V2_EDIT
from sd.runtime import trial

OUT = "model.diffusion_model.out.2."
EPS, V, NEITHER = 0.5, -2.0, 3e38  # what the UNet returns everywhere; the last overflows in a sum
SMALL, LARGE = 0.05, 0.12  # the spread of the biases of models for eps, and for v
QUICK = ("-W", 64, "-H", 64, "--steps", 1, "-s", 1, "-q")


@pytest.fixture(scope="module")
def state():
    state = make_checkpoint.made_up_state_dict(make_checkpoint.tiny(SD_V2))
    del state[PREDICTS_V]
    return state


@pytest.fixture
def save(tmp_path, state):
    """A narrow file; spread None: biases that are not read for it."""

    def save(returned, spread, *markers):
        bias = torch.zeros_like(state[SPREAD_BIAS])
        bias[::2] = 2 * (spread or 0)
        changed = {OUT + "weight": torch.zeros_like(state[OUT + "weight"]), OUT + "bias": torch.full((4,), returned)}
        changed |= {SPREAD_BIAS: bias if spread else bias.to(torch.float8_e4m3fn)}
        save_file(state | changed | dict.fromkeys(markers, torch.zeros(0)), tmp_path / "m.safetensors")
        return tmp_path / "m.safetensors"

    return save


def slow(*row):
    return pytest.param(*row, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("returned", "spread", "expected", "why"),
    [
        (EPS, SMALL, "eps", "eps is a guess, by the spread of the biases in one of its norms and by a trial"),
        slow(V, LARGE, "v", "v is a guess, by the spread of the biases in one of its norms and by a trial prediction."),
        (V, SMALL, "eps", "in one of its norms, and a trial prediction contradicts it. If pictures are noise, give "
         "--prediction v."),
        slow(EPS, LARGE, "v", "and a trial prediction contradicts it. If pictures are noise, give --prediction eps."),
        slow(NEITHER, LARGE, "v", "v is a guess, by the spread of the biases in one of its norms. If"),
        (EPS, None, "eps", "eps is a guess, by a trial prediction. If pictures are noise, give --prediction v."),
        (V, None, "v", "v is a guess, by a trial prediction."),
        slow(NEITHER, None, "v", "nothing tells whether it predicts eps or v."),
    ],
)  # fmt: skip
def test_the_trial_confirms_or_contradicts_the_rule_of_thumb_and_decides_without_it(
    save, returned, spread, expected, why
):
    path = save(returned, spread)
    with opened(ModelRequest(file=path), None) as (checkpoint, _):
        assert "trial" not in " ".join(checkpoint.said.warnings)  # nothing is read yet
        model = sd.load(path)
        (warning,) = trial.warnings_after_trial(model, checkpoint.said)
    assert why in warning
    assert model.config.prediction == expected


@pytest.mark.slow
def test_a_file_that_states_it_is_not_tried(save, monkeypatch):
    def never(model):
        raise AssertionError("tried")

    monkeypatch.setattr(trial, "tried", never)
    assert sd.load(save(EPS, LARGE, PREDICTS_V)).config.prediction == "v"
    assert sd.load(save(EPS, LARGE), prediction="eps").config.prediction == "eps"
    with pytest.raises(AssertionError, match="tried"):
        sd.load(save(EPS, LARGE))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"precision": "bf16"}], ids=str)
def test_the_trial_is_the_same_each_time_and_changes_nothing(save, options):
    model = sd.load(save(V, LARGE), **options)
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    assert trial.tried(model) == trial.tried(model) == "v"
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())


@pytest.mark.parametrize("family", [SD_V2, SD_V2_EDIT], ids=lambda config: config.family)
def test_a_picture_to_edit_is_left_out_of_the_trial(family):
    config = make_checkpoint.tiny(family)
    model, seen = assemble(config, fill(config)), []
    model.unet.input_blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert trial.tried(model) in ("eps", "v")
    (x,) = seen
    assert x.shape == (1, config.unet.in_channels, 8, 8)
    assert (x[:, :4] == 0.5).all()
    assert not x[:, 4:].any()


def test_whoever_makes_a_picture_is_told_and_whoever_inspects_is_not(save, run):
    path = save(V, SMALL)
    _, out, _ = run("inspect", path)
    assert "trial" not in "\n".join(out)
    code, _, err = run("txt2img", "x", "-m", path, *QUICK)
    assert code == 0
    assert err.count("a trial prediction contradicts it") == 1


@pytest.mark.slow
def test_both_tests_are_right_about_the_small_embedded_model():
    """They are for networks trained at full size, and docs/checkpoints.md says that they were wrong about others."""
    model = sd.load(precision="fp32")
    bias = model.unet.get_parameter("output_blocks.11.attention.blocks.0.norm1.bias")
    assert (model.config.prediction, trial.tried(model), bias.std(unbiased=False) < SPREAD_OF_V) == ("v", "v", False)
