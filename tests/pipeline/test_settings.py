"""Settings: what is refused, and how they are written for other tools."""

import json

import pytest

from sd.config import LARGEST_SIDE
from sd.pipeline.image.parameters import parameters_of
from sd.pipeline.settings import SettingError, Settings
from sd.sampling.names import SAMPLER_INFO

GOOD = {"prompt": "a horse", "width": 512, "height": 512, "seed": 42}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 500}, "width 500 is not a multiple of 8. Nearest: 496 or 504."),
        ({"height": 60}, "height 60 is out of range: 64 to 4096."),
        ({"height": 0}, "height 0 is out of range: 64 to 4096."),
        ({"height": -8}, "height -8 is out of range: 64 to 4096."),
        ({"width": LARGEST_SIDE + 8}, "width 4104 is out of range: 64 to 4096."),
        ({"steps": 0}, "steps 0 is out of range: 1 to 1000."),
        ({"steps": 1001}, "steps 1001 is out of range: 1 to 1000."),
        (
            {"steps": 501, "schedule": "leading"},
            "steps 501 would begin at timestep 501 of 999 with the leading schedule",
        ),
        ({"steps": 2.5}, "steps cannot be 2.5; it is of type int | None."),
        ({"prompt": ["a"]}, "prompt cannot be ['a']; it is of type str."),
        ({"prompt": "a\udcff"}, "prompt holds bytes that are not UTF-8 text."),
        ({"negative_prompt": "a\0"}, "negative_prompt holds a NUL character."),
        ({"prompt": "a (horse:12)"}, "prompt gives 'horse' the weight 12; weights are -10 to 10."),
        ({"prompt": "[a:(b:12):0.9]"}, "prompt gives 'b' the weight 12"),
        ({"negative_prompt": "(a:inf)"}, "negative_prompt gives 'a' the weight inf"),
        ({"steps": True}, "steps cannot be True; it is of type int | None."),
        ({"plain_prompts": 1}, "plain_prompts cannot be 1; it is of type bool."),
        ({"rng": "tpu"}, "rng tpu does not exist. Did you mean cpu? There are: cpu, philox."),
        ({"clip_skip": 0}, "clip_skip 0 is out of range: 1 is the last layer, 2 the one before it."),
        ({"sampler": "dimm"}, "sampler dimm does not exist. Did you mean ddim? There are: ddim, ddpm, dpm2, "),
        ({"sampler": "x"}, "sampler x does not exist. There are: ddim, ddpm, dpm2, "),
        ({"sampler": "DPM++ 3M"}, "sampler DPM++ 3M does not exist. Did you mean dpmpp_2m?"),
        ({"schedule": "trailling"}, "schedule trailling does not exist. Did you mean trailing?"),
        (
            {"sampler": "DPM++ 2M Karras", "schedule": "simple"},
            "schedule simple does not go with the sampler 'DPM++ 2M Karras', which names another one. Say dpmpp_2m",
        ),
        ({"schedule": "custom"}, "schedule custom needs noise levels: give them as sigmas."),
        ({"sigmas": [3.0, 1.0], "schedule": "karras"}, "sigmas 3, 1 leave nothing to the karras schedule."),
        ({"sigmas": [3.0, 1.0], "steps": 3}, "steps 3 is not the number of sigmas, 2. Leave it out."),
        ({"sigmas": [1.0, 3.0]}, "sigmas 1, 3 do not fall from step to step."),
        ({"sigmas": [3.0, 0.0, 0.0]}, "sigmas 3, 0, 0 are out of range: each 0.001 to 10000"),
        ({"sigmas": [float("nan")]}, "sigmas nan are out of range"),
        ({"sigmas": [0]}, "sigmas 0 are out of range"),
        ({"sigmas": ["a"]}, "sigmas cannot be ['a']; it is of type tuple[float, ...]."),
        ({"guidance_rescale": 1.5}, "guidance_rescale 1.5 is out of range: 0 to 1."),
        ({"guidance_rescale": 0.5, "guidance_scale": 1}, "guidance_rescale 0.5 does nothing: guidance scale 1"),
        ({"guidance_interval": (5, 0.3)}, "guidance_interval 5, 0.3 is not an interval: give LOW,HIGH, such as"),
        ({"guidance_interval": (5,)}, "guidance_interval 5 is not an interval"),
        ({"guidance_interval": (1, float("nan"))}, "guidance_interval 1, nan is not an interval"),
        ({"guidance_interval": (0.3, 5), "guidance_scale": 1}, "guidance_interval 0.3, 5 does nothing: guidance scale"),
        (
            {"reuse_features": 0},
            "reuse_features 0 is out of range: 1 (off: all is computed at every prediction) to 1000.",
        ),
        ({"reuse_features": 1001}, "reuse_features 1001 is out of range"),
        ({"reuse_features": 2.5}, "reuse_features cannot be 2.5; it is of type int."),
        (
            {"merge_tokens": 0.8},
            "merge_tokens 0.8 is out of range: 0 (off: attention sees all tokens) to 0.75 (one in four is left).",
        ),
        ({"merge_tokens": -0.1}, "merge_tokens -0.1 is out of range"),
        ({"merge_tokens": float("nan")}, "merge_tokens nan is out of range"),
        ({"merge_tokens": True}, "merge_tokens cannot be True; it is of type float."),
        ({"zero_terminal_snr": 1}, "zero_terminal_snr cannot be 1; it is of type bool."),
        ({"seed": True}, "seed cannot be True; it is of type int."),
        ({"eta": 1.5}, "eta 1.5 is out of range: 0 (no fresh noise) to 1 (as much as DDPM)."),
        ({"eta": float("nan")}, "eta nan is out of range"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta 0.5 does nothing: ddpm has no such setting."),
        ({"guidance_scale": float("inf")}, "guidance_scale inf is out of range: -1000 to 1000."),
        ({"seed": -1}, "seed -1 is out of range: 0 to 18446744073709551615."),
    ],
)
def test_what_cannot_be_is_refused_with_what_is_allowed(change, message):
    with pytest.raises(SettingError) as caught:
        Settings(**{**GOOD, **change})
    assert message in str(caught.value)


def test_without_a_schedule_it_is_the_samplers_own():
    for name, row in SAMPLER_INFO.items():
        settings = Settings(**GOOD, sampler=name)
        assert (settings.steps, settings.schedule, settings.eta) == (30, row.schedule, row.eta)
    assert (Settings(**GOOD).sampler, Settings(**GOOD).schedule) == ("dpmpp_2m", "karras")


def test_other_spellings_become_our_names():
    settings = Settings(**GOOD, sampler="Euler a", schedule="SGM Uniform")
    assert (settings.sampler, settings.schedule) == ("euler_a", "sgm_uniform")
    assert Settings(**GOOD, sampler="DPM++ 2M SDE Karras").schedule == "karras"
    assert Settings(**GOOD, sampler="DPM++ 2M SDE", schedule="Automatic").schedule == "exponential"
    assert Settings(**GOOD, sampler="dpmpp_2m").goes_with(Settings(**GOOD, sampler="DPM++ 2M Karras", steps=30))
    assert [Settings(**GOOD, rng=name).rng for name in ("CPU", "NV", "gpu", "cuda")] == ["cpu", *["philox"] * 3]


def test_sigmas_replace_steps_and_schedule():
    settings = Settings(**GOOD, sigmas=[14.6, 7, 3, 0])
    assert (settings.sigmas, settings.steps, settings.schedule) == ((14.6, 7.0, 3.0), 3, "custom")


@pytest.mark.parametrize(
    "options", [{}, {"sigmas": [3.0, 1.0]}, {"sampler": "Euler a", "eta": 0.5}, {"sampler": "heun", "schedule": "beta"}]
)
def test_settings_made_again_from_their_exact_form_are_the_same(options):
    settings = Settings(**GOOD, **options)
    assert Settings(**json.loads(json.dumps(settings.to_dict()))) == settings


def test_pure_noise_at_the_start_is_for_models_that_predict_v():
    settings = Settings(**GOOD, zero_terminal_snr=True)
    settings.require_prediction("v")
    Settings(**GOOD).require_prediction("eps")
    with pytest.raises(SettingError, match="zero_terminal_snr needs a model that predicts v; this one predicts eps"):
        settings.require_prediction("eps")


@pytest.mark.parametrize("steps", [1, 2, 10, 11, 30, 77, 91, 100, 200, 250, 500, 1000])
def test_usual_numbers_of_steps_are_allowed(steps):
    assert Settings(**GOOD, steps=steps, sampler="ddim").steps == steps
    assert Settings(**GOOD, steps=501).steps == 501


def test_parameters_are_the_text_of_other_tools():
    settings = Settings(**GOOD, negative_prompt="blurry", sampler="ddim", schedule="trailing", eta=0.5)
    assert parameters_of(settings, "v1-5-pruned-emaonly", "6ce0161689") == (
        "a horse\n"
        "Negative prompt: blurry\n"
        "Steps: 30, Sampler: DDIM, Schedule type: Trailing, CFG scale: 7.5, Seed: 42, Size: 512x512, "
        "Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Eta: 0.5, Version: sd-zoo 0.1.0"
    )


def test_the_layer_and_plain_prompts_are_named_as_other_tools_do():
    line = parameters_of(Settings(**GOOD, clip_skip=2, plain_prompts=True), "model", None).split("\n")[1]
    assert line.endswith("Model: model, Clip skip: 2, Emphasis: None, Version: sd-zoo 0.1.0")


def test_the_prompt_is_kept_as_it_was_typed():
    prompt = r" a (red:1.3) [cat:dog:0.5] \(x\)  BREAK  b "
    settings = Settings(**{**GOOD, "prompt": prompt})
    assert settings.to_dict()["prompt"] == prompt
    assert parameters_of(settings, "model", None).startswith(prompt + "\n")


def test_brackets_of_plain_prompts_have_no_weights():
    settings = Settings(**{**GOOD, "prompt": "(a:99) [b|c]"}, plain_prompts=True)
    assert settings.texts_by_step() == (("(a:99) [b|c]",) * 30, ("",) * 30)


def test_texts_by_step_are_those_that_the_network_sees():
    prompts = {"prompt": "a [b:c:2]", "negative_prompt": "[d|e]", "steps": 4}
    both = Settings(**{**GOOD, **prompts}).texts_by_step()
    assert both == (("a b", "a b", "a c", "a c"), ("d", "e", "d", "e"))
    assert Settings(**{**GOOD, **prompts}, guidance_scale=1).texts_by_step() == both[:1]


def test_absent_values_are_left_out_of_the_parameters():
    lines = parameters_of(Settings(**GOOD, sampler="ddim"), "model", None).split("\n")
    assert lines[0] == "a horse"
    assert lines[1].startswith(
        "Steps: 30, Sampler: DDIM, CFG scale: 7.5, Seed: 42, Size: 512x512, Model: model, Version"
    )
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5"),
        ({"sampler": "euler_a"}, "Sampler: Euler a, Schedule type: Uniform, CFG scale: 7.5"),
        ({"sampler": "heun", "schedule": "sgm_uniform"}, "Sampler: Heun, Schedule type: SGM Uniform,"),
        ({"schedule": "leading"}, "Sampler: DPM++ 2M, Schedule type: DDIM,"),
        ({"sigmas": [14.6, 3]}, 'Steps: 2, Sampler: DPM++ 2M, Schedule type: Custom, Sigmas: "14.6, 3", CFG'),
        ({"guidance_rescale": 0.7}, ", Guidance rescale: 0.7, "),
        ({"guidance_interval": [0.3, 5]}, ', Guidance interval: "0.3, 5", '),
        ({"reuse_features": 3}, ", Reuse features: 3, "),
        ({"merge_tokens": 0.5}, ", Token merging ratio: 0.5, "),
        ({"zero_terminal_snr": True}, ", Noise Schedule: Zero Terminal SNR, "),
        ({"sampler": "euler_a", "eta": 0}, ", Eta: 0, "),
    ],
)
def test_sampler_and_schedule_are_written_as_other_tools_do(options, text):
    line = parameters_of(Settings(**GOOD, **options), "model", None).split("\n")[1]
    assert text in line
    assert ("Eta" in line) == ("eta" in options)


def test_values_with_separators_are_json_strings():
    line = parameters_of(Settings(**GOOD), 'my, "best": model', None).split("\n")[1]
    assert r'Model: "my, \"best\": model", Version' in line
