"""What a request of the web UI's API means: its fields by our names, and what cannot be done."""

import contextlib
import json
import math

import pytest

from sd.app.errors import UsageError
from sd.app.web.a1111_fields import CANNOT, KNOWN, SECOND_PASS, Wanted, in_their_words, job_fields
from sd.app.web.a1111_info import info_text
from sd.pipeline.settings import SettingError, Settings

TASKS = ("txt2img", "img2img", "inpaint")
PICTURE = {"init_images": ["AAAA"], "width": 64, "height": 64}
WEBUIAPI = {  # what the client of that name sends at every call, beside the prompt
    **{"enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0, "hr_resize_x": 0},
    **{"hr_resize_y": 0, "hr_checkpoint_name": None, "hr_sampler_name": None, "hr_scheduler": None, "hr_prompt": ""},
    **{"hr_negative_prompt": "", "denoising_strength": 0.7, "firstphase_width": 0, "firstphase_height": 0},
    **{"styles": [], "seed": -1, "subseed": -1, "subseed_strength": 0.0, "seed_resize_from_h": 0},
    **{"seed_resize_from_w": 0, "batch_size": 1, "n_iter": 1, "steps": 20, "cfg_scale": 7.0, "width": 512},
    **{"height": 512, "restore_faces": False, "tiling": False, "do_not_save_samples": False, "negative_prompt": ""},
    **{"do_not_save_grid": False, "eta": 1.0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1},
    **{"override_settings": {}, "override_settings_restore_afterwards": True, "sampler_name": "Euler a"},
    **{"scheduler": "automatic", "sampler_index": "Euler a", "script_name": None, "script_args": []},
    **{"send_images": True, "save_images": False, "alwayson_scripts": {}},
}
SILLY_TAVERN = {  # its front end's request, through its server
    **{"url": "http://127.0.0.1:7860", "auth": "", "prompt": "a horse", "negative_prompt": "blurry"},
    **{"sampler_name": "DPM++ 2M", "scheduler": "Karras", "steps": 20, "cfg_scale": 7, "width": 512, "height": 768},
    **{"restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1, "hr_additional_modules": []},
    **{"denoising_strength": 0.7, "hr_second_pass_steps": 0, "override_settings": {"CLIP_stop_at_last_layers": 2}},
    **{"override_settings_restore_afterwards": True, "clip_skip": 2, "save_images": True, "send_images": True},
    **{"do_not_save_grid": False, "do_not_save_samples": False},
}


def fields_of(body, picture=False, tasks=TASKS, **options):
    return job_fields(body, picture=picture, tasks=tasks, options=options).fields


def test_what_clients_send_by_default_asks_for_a_plain_picture():
    assert fields_of({"prompt": "a horse", **WEBUIAPI}) == {
        **{"task": "txt2img", "prompt": "a horse", "negative_prompt": "", "sampler": "Euler a", "steps": 20},
        **{"guidance_scale": 7.0, "width": 512, "height": 512, "eta": 1.0, "batch_size": 1, "count": 1},
    }
    wanted = job_fields(SILLY_TAVERN, picture=False, tasks=TASKS, options={})
    assert wanted.ignored == ["url", "auth"]
    assert wanted.fields == {
        **{"task": "txt2img", "prompt": "a horse", "negative_prompt": "blurry", "sampler": "DPM++ 2M"},
        **{"schedule": "Karras", "steps": 20, "guidance_scale": 7, "width": 512, "height": 768, "clip_skip": 2},
        **{"batch_size": 1, "count": 1},
    }


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"sampler_index": "Euler", "sampler_name": "DDIM"}, {"sampler": "DDIM"}),
        ({"sampler_index": "Euler"}, {"sampler": "Euler"}),
        ({"sampler_name": "default", "scheduler": "Automatic"}, {}),
        ({"steps": 20.0, "cfg_scale": "6.5", "seed": "7"}, {"steps": 20, "guidance_scale": 6.5, "seed": 7}),
        ({"seed": -1, "clip_skip": -1, "cfg_scale": None}, {}),
        ({"subseed": 5, "subseed_strength": 0.2}, {"vary_seed": 5, "vary": 0.2}),
        ({"subseed": 5}, {}),
        ({"sampler_name": "DDIM", "eta": 0.5}, {"sampler": "DDIM", "eta": 0.5}),
        ({"sampler_name": "Euler", "eta": 0.5}, {"sampler": "Euler"}),
        ({"eta": 0.5}, {}),
        ({"batch_size": 2, "n_iter": 3}, {"batch_size": 2, "count": 6}),
        ({"tiling": True}, {"tile": "xy"}),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2, "randn_source": "GPU"}}, {"clip_skip": 2, "rng": "GPU"}),
        ({"override_settings": {"sd_model_checkpoint": "a.ckpt [0123456789]"}}, {"model": "a.ckpt [0123456789]"}),
        ({"override_settings": {"sd_vae": "Automatic", "eta_noise_seed_delta": 31337}}, {"seed_delta": 31337}),
        ({"model": "b.ckpt"}, {"model": "b.ckpt"}),
        (
            {"refiner_checkpoint": "r", "refiner_switch_at": 0.7},
            {"refiner": "r", "switch_at": 0.7, "switch_by": "steps"},
        ),
        ({"refiner_checkpoint": "None", "refiner_switch_at": 0.8}, {}),
        ({"lora": [{"path": "style.safetensors", "multiplier": 0.8}]}, {"lora": ["style.safetensors:0.8"]}),
        ({"alwayson_scripts": {"controlnet": {"args": []}, "ADetailer": {"args": [False]}}}, {}),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": False}]}}}, {}),
        ({"infotext": "a cat\nSteps: 9, Sampler: Euler, Seed: 3, CFG scale: 5", "steps": 4}, {"steps": 4, "seed": 3}),
        ({"width": 500}, {"width": 496}),
    ],
)
def test_fields_mean_what_they_mean_in_the_web_ui(given, ours):
    found = fields_of({"prompt": "a horse", **given})
    assert found.items() >= ours.items()
    usual = {"task", "prompt", "batch_size", "count"}
    assert "infotext" in given or found.keys() == usual | ours.keys()
    assert found["prompt"] == "a horse"


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({}, {"hires": 2.0, "hires_upscale": "latent"}),
        ({"hr_scale": 1.5, "hr_upscaler": "Lanczos"}, {"hires": 1.5, "hires_upscale": "image"}),
        ({"hr_upscaler": "None"}, {"hires": 2.0, "hires_upscale": "image"}),
        ({"hr_resize_x": 768, "hr_resize_y": 768}, {"hires": [768, 768]}),
        ({"hr_resize_x": 1024}, {"hires": 2.0}),
        ({"hr_resize_y": 768}, {"hires": 1.5}),
        ({"steps": 20}, {"hires_steps": 20}),
        ({"steps": 20, "hr_second_pass_steps": 8}, {"hires_steps": 8}),
        ({"hr_steps": 8}, {"hires_steps": 8}),
        ({"denoising_strength": 0.4}, {"hires_strength": 0.4}),
        ({"firstphase_width": 256, "firstphase_height": 256}, {"hires": [512, 512], "width": 256, "height": 256}),
        ({"hr_prompt": "a horse", "hr_sampler_name": "Use same sampler", "hr_cfg": 1.0}, {"hires": 2.0}),
    ],
)
def test_the_second_pass_of_enable_hr(given, ours):
    body = {"prompt": "a horse", "width": 512, "height": 512, "enable_hr": True, **given}
    found = fields_of(body)
    assert found.items() >= ours.items()
    Settings(seed=0, **{name: value for name, value in found.items() if name not in ("task", "count", "batch_size")})


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({}, {"task": "img2img", "strength": 0.75, "resize_mode": "stretch"}),
        ({"denoising_strength": 0.3, "resize_mode": 1}, {"strength": 0.3, "resize_mode": "crop"}),
        ({"resize_mode": 2}, {"resize_mode": "pad"}),
        ({"mask": "BBBB"}, {"task": "inpaint", "masked_content": "fill", "only_masked": True, "mask_padding": 0}),
        ({"mask": "BBBB", "inpainting_fill": 1}, {"masked_content": "original"}),
        ({"mask": "BBBB", "inpainting_fill": 2, "denoising_strength": 1}, {"masked_content": "original"}),
        (
            {"mask": "B", "mask_blur": 8, "inpaint_full_res": 0, "inpaint_full_res_padding": 32},
            {"mask_blur": 8, "only_masked": False, "mask_padding": 32},
        ),
        ({"mask": "BBBB", "inpainting_mask_invert": 1}, {"invert_mask": True}),
        ({"mask": "BBBB", "mask_blur_x": 3, "mask_blur_y": 3}, {"mask_blur": 3}),
    ],
)
def test_the_fields_of_img2img_and_inpainting(given, ours):
    assert fields_of({"prompt": "a horse", **PICTURE, **given}, picture=True).items() >= ours.items()


@pytest.mark.parametrize(
    ("tasks", "ours", "ignored"),
    [
        (("edit",), {"task": "edit", "image_guidance": 1.2}, ["denoising_strength"]),
        (("depth2img",), {"task": "depth2img", "strength": 0.5}, ["image_cfg_scale"]),
    ],
)
def test_img2img_does_what_the_model_can(tasks, ours, ignored):
    body = {"prompt": "make it blue", **PICTURE, "denoising_strength": 0.5, "image_cfg_scale": 1.2}
    wanted = job_fields(body, picture=True, tasks=tasks, options={})
    assert wanted.fields.items() >= ours.items()
    assert wanted.ignored == ignored


def test_unknown_fields_are_named_and_sides_are_rounded_as_it_does():
    body = {"prompt": "", "distilled_cfg_scale": 3.5, "override_settings": {"eta_ddim": 1}, "width": 100, "height": 70}
    wanted = job_fields(body, picture=False, tasks=TASKS, options={"CLIP_stop_at_last_layers": 2})
    assert wanted.ignored == ["distilled_cfg_scale", "override_settings.eta_ddim"]
    assert wanted.notes == [
        "width 100 is not a multiple of 8: 96 is used",
        "height 70 is not a multiple of 8: 64 is used",
    ]
    assert wanted.fields["clip_skip"] == 2


WRONG = {  # a value for each field that cannot be honoured
    **{"restore_faces": True, "styles": ["anime"], "seed_resize_from_w": 512, "seed_resize_from_h": 512},
    **{"s_churn": 10, "s_min_uncond": 1.5, "s_noise": 1.1, "initial_noise_multiplier": 0.5, "script_name": "X/Y plot"},
    **{"firstpass_image": "AAAA", "extra_images": ["AAAA"], "hr_additional_modules": ["t5xxl"]},
    **{"hr_checkpoint_name": "other", "hr_sampler_name": "DDIM", "hr_scheduler": "Karras", "hr_prompt": "a cow"},
    **{"hr_negative_prompt": "a cow", "hr_cfg": 3.0},
}


@pytest.mark.parametrize("name", [*CANNOT, *SECOND_PASS])
def test_a_known_field_that_cannot_be_honoured_is_refused_with_the_reason(name):
    with pytest.raises(UsageError, match=f"^{name} .* cannot be used: .*[a-z]\\.$"):
        fields_of({"prompt": "", "enable_hr": True, name: WRONG[name]})
    if name in SECOND_PASS:
        fields_of({"prompt": "", name: WRONG[name]})  # without a second pass, it asks for nothing


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": "many"}, "steps cannot be 'many'; it is of type int | None."),
        ({"steps": 20.5}, "steps cannot be 20.5"),
        ({"steps": [20]}, "steps cannot be [20]"),
        ({"cfg_scale": True}, "cfg_scale cannot be True"),
        ({"width": math.inf}, "width cannot be inf"),
        ({"prompt": 7}, "prompt cannot be 7"),
        ({"override_settings": []}, None),
        ({"override_settings": [1]}, "override_settings must be an object in braces, got [1]."),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, "alwayson_scripts: ADetailer is not supported."),
        ({"enable_hr": True, "hr_upscaler": "4x-UltraSharp"}, "hr_upscaler 4x-UltraSharp does not exist."),
        ({"lora": [{"multiplier": 1}]}, "lora must be a list of objects"),
        ({"infotext": "a cat"}, "infotext has no line of settings"),
        ({"prompt": "<lora:x:1>", "disable_extra_networks": True}, "disable_extra_networks cannot be used."),
        ({"prompt": "a <sd_cpp_extra_args>{}</sd_cpp_extra_args>"}, "sd_cpp_extra_args in a prompt is not read."),
    ],
)
def test_wrong_values_are_refused_by_their_own_names(given, message):
    body = {"prompt": "", **given}
    if message is None:
        assert fields_of(body)["task"] == "txt2img"
        return
    with pytest.raises(UsageError) as caught:
        fields_of(body)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"init_images": []}, "init_images must be a list of one picture, got 0 of them."),
        ({"init_images": "AAAA"}, "init_images must be a list of one picture, got no list."),
        ({"resize_mode": 3}, "resize_mode 3 (latents enlarged) cannot be used"),
        ({"resize_mode": 4}, "resize_mode 4 does not exist. There are: 0 (stretch), 1 (crop)"),
        ({"mask": "B", "inpainting_fill": 3}, "inpainting_fill 3 (latent nothing) cannot be used."),
        ({"enable_hr": True}, "enable_hr True cannot be used: a second pass works only without an input picture."),
    ],
)
def test_wrong_pictures_are_refused(given, message):
    with pytest.raises(UsageError) as caught:
        fields_of({"prompt": "", **PICTURE, **given}, picture=True)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("setting", "value", "theirs"),
    [
        ("guidance_scale", 5000.0, "cfg_scale"),
        ("sampler", "Eulr", "sampler_name"),
        ("strength", 2.0, "denoising_strength"),
    ],
)
def test_what_is_out_of_range_is_said_by_the_name_that_the_client_gave(setting, value, theirs):
    with pytest.raises(SettingError) as caught:
        Settings(prompt="", seed=0, width=64, height=64, **{setting: value})
    assert in_their_words(caught.value).startswith(f"{theirs} {value:g}" if isinstance(value, float) else theirs)


def test_tables_do_not_overlap():
    from sd.app.web.a1111_fields import INPUTS, OTHERS, SETTINGS

    assert len(KNOWN) == sum(map(len, (SETTINGS, INPUTS, CANNOT, SECOND_PASS, OTHERS)))


def test_info_says_what_each_picture_carries():
    texts = [
        f"a horse, running\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: {seed}, "
        "Size: 512x768, Model hash: 6ce0161689, Model: v1-5, Clip skip: 2, Tiling: True, Version: sd-zoo 0.1"
        for seed in (7, 8)
    ]
    wanted = Wanted({"prompt": "?", "batch_size": 2}, ignored=["url"], notes=["rounded"])
    info = json.loads(info_text(texts, wanted, [{"level": "note", "text": "loading"}], "20260101120000"))
    expected = {
        **{
            "prompt": "a horse, running",
            "all_prompts": ["a horse, running"] * 2,
            "all_negative_prompts": ["blurry"] * 2,
        },
        **{"seed": 7, "all_seeds": [7, 8], "width": 512, "height": 768, "sampler_name": "Euler a", "cfg_scale": 7.0},
        **{"steps": 20, "batch_size": 2, "sd_model_name": "v1-5", "sd_model_hash": "6ce0161689", "clip_skip": 2},
        **{"infotexts": texts, "index_of_first_image": 0, "denoising_strength": None, "ignored": ["url"]},
        **{"extra_generation_params": {"Tiling": "True"}, "messages": ["rounded", "loading"]},
    }
    assert info.items() >= expected.items()
    assert json.loads(info_text([], wanted, [], "0"))["all_seeds"] == []


@pytest.mark.parametrize("picture", [False, True])
def test_no_value_of_any_field_is_an_internal_error(picture):
    odd = ["", "x", "9" * 50, -1, 0, 10**50, 1.5, math.inf, True, [], [1], [{}], {}, {"args": [1]}, "1e400", [None]]
    for name in sorted(KNOWN):
        for value in odd:
            body = {"prompt": "", "enable_hr": not picture, "init_images": ["AAAA"], "mask": "AAAA", name: value}
            with contextlib.suppress(UsageError):
                fields_of(body, picture=picture)
            with contextlib.suppress(UsageError):
                fields_of({"prompt": "", "override_settings": {name: value, "sd_vae": value}})
