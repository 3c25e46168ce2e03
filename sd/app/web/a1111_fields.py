"""From a request of the web UI's API to the fields of a job: names, defaults and meanings as its clients know them.

    {"prompt": "a horse", "cfg_scale": 7, "sampler_name": "Euler a", "enable_hr": true, "hr_scale": 2}
    -> {"task": "txt2img", "prompt": "a horse", "guidance_scale": 7, "sampler": "Euler a", "hires": 2.0, ...}

What a client leaves out has the web UI's default, but for size, steps, sampler and guidance, which are the model's:
512x512 and 50 steps fit few models.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sd.app.errors import UsageError
from sd.app.web.a1111_values import OFF, choice, chosen, dictionary, is_off, like_type, lora_flags, number, refuse
from sd.pipeline.errors import SettingError, nearest
from sd.pipeline.image.input_settings import InputSettings
from sd.pipeline.image.stored_settings.web_ui import settings_in
from sd.pipeline.settings import DEFAULT_SWITCH, FIELDS, IMAGE_GUIDANCE
from sd.sampling.names import SAMPLER_INFO, meaning

Fields = dict[str, Any]

SETTINGS = {  # theirs -> ours; None leaves the default
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "steps": "steps",
    "sampler_index": "sampler",  # the older name; sampler_name takes precedence
    "sampler_name": "sampler",
    "scheduler": "schedule",
    "cfg_scale": "guidance_scale",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "subseed": "vary_seed",
    "subseed_strength": "vary",
    "clip_skip": "clip_skip",  # SD.Next's and stable-diffusion.cpp's
    "eta": "eta",
    "model": "model",  # stable-diffusion.cpp's
}
OPTIONS = {  # the same for options, of the server or of one request
    "CLIP_stop_at_last_layers": "clip_skip",
    "eta_noise_seed_delta": "seed_delta",
    "randn_source": "rng",
    "token_merging_ratio": "merge_tokens",
    "sd_model_checkpoint": "model",
    "sd_vae": "vae",
}
INPUTS = {  # how a mask is used
    "mask_blur_x": "mask_blur",
    "mask_blur_y": "mask_blur",
    "mask_blur": "mask_blur",
    "inpaint_full_res": "only_masked",
    "inpaint_full_res_padding": "mask_padding",
    "inpainting_mask_invert": "invert_mask",
}
NAMES = ("sampler", "schedule", "model", "vae")  # of ours that are chosen from a list
RESIZE_MODES = ("stretch", "crop", "pad", "latents enlarged")  # by their number
FILLS = ("fill", "original", "latent noise", "latent nothing")  # likewise
UPSCALERS = {"latent": "latent", "lanczos": "image", "none": "image"}  # theirs, in small letters -> ours
CANNOT = {  # a field that has no counterpart -> its values that ask for nothing, and why
    "restore_faces": (OFF, "networks that repair faces are not supported"),
    "styles": (OFF, "there are no saved styles. Write their text into the prompt"),
    "seed_resize_from_w": (OFF, "noise is not resized"),
    "seed_resize_from_h": (OFF, "noise is not resized"),
    "s_churn": (OFF, "samplers have no churn here; eta adds noise where a sampler takes it"),
    "s_min_uncond": (OFF, "guidance is given at every step"),
    "s_noise": ((*OFF, 1), "the noise that samplers add is not scaled"),
    "initial_noise_multiplier": ((*OFF, 1), "the first noise is not scaled"),
    "script_name": ((*OFF, "None"), "scripts are not supported"),
    "firstpass_image": (OFF, "the first pass makes its own picture"),
    "extra_images": (OFF, "no model here reads reference pictures"),
    "hr_additional_modules": ((*OFF, ["Use same choices"]), "the second pass has the model of the first"),
}
SECOND_PASS = {  # a field of the second pass -> the one of the first that it may repeat, what says so, and why
    "hr_checkpoint_name": ("model", "Use same checkpoint", "the second pass has the model of the first"),
    "hr_sampler_name": ("sampler_name", "Use same sampler", "the second pass has the sampler of the first"),
    "hr_scheduler": ("scheduler", "Use same scheduler", "the second pass has the schedule of the first"),
    "hr_prompt": ("prompt", "", "the second pass has the prompt of the first"),
    "hr_negative_prompt": ("negative_prompt", "", "the second pass has the negative prompt of the first"),
    "hr_cfg": ("cfg_scale", 1, "the second pass has the cfg_scale of the first"),
}
OTHERS = (
    *("init_images", "mask", "resize_mode", "inpainting_fill", "denoising_strength", "image_cfg_scale", "batch_size"),
    *("n_iter", "tiling", "override_settings", "alwayson_scripts", "script_args", "lora", "infotext"),
    *("refiner_checkpoint", "refiner_switch_at", "disable_extra_networks", "enable_hr", "hr_scale", "hr_upscaler"),
    *("hr_second_pass_steps", "hr_steps", "hr_resize_x", "hr_resize_y", "firstphase_width", "firstphase_height"),
    # without effect on pictures
    *("send_images", "save_images", "do_not_save_samples", "do_not_save_grid", "include_init_images", "mask_round"),
    *("override_settings_restore_afterwards", "seed_enable_extras", "s_tmin", "s_tmax", "force_task_id"),
)
KNOWN = {*SETTINGS, *INPUTS, *CANNOT, *SECOND_PASS, *OTHERS}
ENDS_SECOND_PASS = ("hires", "hires_upscale", "hires_strength", "hires_steps")


@dataclass
class Wanted:
    """The fields of a job; the names of what is not used; and what is used otherwise than it was given."""

    fields: Fields
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def job_fields(given: Mapping[str, object], *, picture: bool, tasks: Iterable[str], options: Fields) -> Wanted:
    """What a request asks for.

    given    the request's body
    picture  whether it begins with a picture: img2img
    tasks    what the model can do, by the names of our commands
    options  those of the server; the request's own take precedence

    Raises UsageError for what is known and cannot be done.
    """
    body = {name: value for name, value in given.items() if value is not None}
    overrides = {**options, **dictionary(body, "override_settings")}
    for name, (nothing, why) in CANNOT.items():
        refuse(name, body.get(name), nothing, why)
    for name, script in dictionary(body, "alwayson_scripts").items():
        if not is_off(script):
            raise UsageError(f"alwayson_scripts: {name[:60]} is not supported. Leave it out.")
    wanted = Wanted(from_infotext(body))
    wanted.ignored += [name for name in given if name not in KNOWN]
    wanted.ignored += [f"override_settings.{name}" for name in overrides if name not in OPTIONS]
    fields = wanted.fields
    fields |= renamed(overrides, OPTIONS) | renamed(body, SETTINGS)
    if "<sd_cpp_extra_args>" in fields.setdefault("prompt", ""):
        raise UsageError("sd_cpp_extra_args in a prompt is not read. Give steps, sampler_name and so on as fields.")
    if body.get("disable_extra_networks") and "<lora:" in fields["prompt"]:
        raise UsageError("disable_extra_networks cannot be used. Leave <lora:...> out of the prompt instead.")
    if like_type("tiling", body.get("tiling", False), bool):
        fields["tile"] = "xy"
    if "lora" in body:
        fields["lora"] = lora_flags(body["lora"])
    if name := chosen(body, "refiner_checkpoint"):
        at = number(body, "refiner_switch_at", DEFAULT_SWITCH, float)
        fields |= {"refiner": name, "switch_at": at, "switch_by": "steps"}
    fields["batch_size"] = number(body, "batch_size", 1)
    fields["count"] = number(body, "n_iter", 1) * fields["batch_size"]
    drop_without_effect(wanted)
    if picture:
        read_picture(body, wanted, list(tasks))
    else:
        fields["task"] = "txt2img"
        fields.pop("strength", None)
        if body.get("enable_hr"):
            fields |= second_pass(body, fields)
    return wanted


def in_their_words(error: SettingError) -> str:
    """The sentence about a setting, with the name that these clients have for it."""
    names = {ours: theirs for table in (OPTIONS, INPUTS, SETTINGS) for theirs, ours in table.items()}
    names |= dict.fromkeys(("strength", "hires_strength"), "denoising_strength")
    names |= {"image_guidance": "image_cfg_scale", "hires": "hr_scale", "hires_steps": "hr_second_pass_steps"}
    names |= {"switch_at": "refiner_switch_at", "count": "n_iter"}
    return f"{names.get(error.name, error.name)} {error.problem}"


def model_named(body: Mapping[str, object], options: Fields) -> str:
    """The model that a request names, else the one that the server's options name; "" for the default."""
    overrides = {**options, **dictionary(body, "override_settings")}
    return chosen(body, "model") or chosen(overrides, "sd_model_checkpoint")


def from_infotext(body: Fields) -> Fields:
    """The settings of a picture's text, which the request's own fields replace."""
    if not body.get("infotext"):
        return {}
    found = settings_in(like_type("infotext", body["infotext"], str))
    if found is None:
        raise UsageError("infotext has no line of settings, such as Steps: 20, Sampler: Euler a, Seed: 7.")
    return found.settings


def renamed(body: Mapping[str, object], names: Mapping[str, str]) -> Fields:
    """The fields of a table by our names. A choice that is none is left out."""
    kinds = FIELDS | {"seed": int, "vary_seed": int, **dict.fromkeys(NAMES, str)} | InputSettings.__annotations__
    given = {theirs: ours for theirs, ours in names.items() if body.get(theirs) is not None}
    found = {}
    for theirs, ours in given.items():
        if ours not in NAMES or chosen(body, theirs):
            found[ours] = like_type(theirs, body[theirs], kinds[ours])
    return found


def drop_without_effect(wanted: Wanted) -> None:
    """Leave out what clients send as a matter of course and the web UI ignores; round sides as it does."""
    fields = wanted.fields
    sampler = meaning(fields.get("sampler", ""))
    if "eta" in fields and (sampler is None or SAMPLER_INFO[sampler.sampler].eta is None):
        del fields["eta"]
    if not fields.get("vary"):
        fields.pop("vary", None)
        fields.pop("vary_seed", None)
    for name in {"seed", "vary_seed"} & fields.keys():
        if fields[name] < 0:  # any such number draws one
            del fields[name]
    if fields.get("clip_skip", 1) < 1:  # stable-diffusion.cpp's -1 is the default
        del fields["clip_skip"]
    for name in ("width", "height"):
        if over := fields.get(name, 0) % 8:
            wanted.notes.append(f"{name} {fields[name]} is not a multiple of 8: {fields[name] - over} is used")
            fields[name] -= over


def read_picture(body: Fields, wanted: Wanted, tasks: list[str]) -> None:
    """The fields of a request that begins with a picture."""
    fields, pictures = wanted.fields, body.get("init_images")
    if not isinstance(pictures, list) or len(pictures) != 1:
        given = f"{len(pictures)} of them" if isinstance(pictures, list) else "no list"
        raise UsageError(f"init_images must be a list of one picture, got {given}.")
    for name in ENDS_SECOND_PASS:  # of an infotext
        fields.pop(name, None)
    refuse("enable_hr", body.get("enable_hr"), OFF, "a second pass works only without an input picture")
    mode = choice(body, "resize_mode", RESIZE_MODES, "stretch")
    if mode not in RESIZE_MODES[:3]:
        raise UsageError("resize_mode 3 (latents enlarged) cannot be used for a picture. Use 0, 1 or 2.")
    strength = number(body, "denoising_strength", fields.pop("strength", 0.75), float)
    fields |= {"init": pictures[0], "resize_mode": mode, "strength": strength}
    if body.get("mask"):
        fill = choice(body, "inpainting_fill", FILLS, "fill")
        if fill not in FILLS[:2] and strength < 1:
            raise UsageError(
                f"inpainting_fill {FILLS.index(fill)} ({fill}) cannot be used. Use 0 (fill) or 1 (original), or "
                "denoising_strength 1, which replaces what is there."
            )
        content = fill if fill in FILLS[:2] else "original"
        fields |= {"task": "inpaint", "mask": body["mask"], "masked_content": content}
        fields |= {"only_masked": True, "mask_padding": 0} | renamed(body, INPUTS)
        return
    fields["task"] = next((task for task in ("img2img", "edit", "depth2img") if task in tasks), "img2img")
    if fields["task"] == "edit":
        fields["image_guidance"] = number(body, "image_cfg_scale", IMAGE_GUIDANCE, float)
        del fields["strength"]  # editing begins at pure noise
        wanted.ignored += ["denoising_strength"] if "denoising_strength" in body else []
    elif body.get("image_cfg_scale"):
        wanted.ignored.append("image_cfg_scale")


def second_pass(body: Fields, fields: Fields) -> Fields:
    """The fields of a second pass at a larger size."""
    for name, (first, same, why) in SECOND_PASS.items():
        refuse(name, body.get(name), (*OFF, same, body.get(first)), why)
    upscaler = chosen(body, "hr_upscaler") or str(body.get("hr_upscaler", "Latent"))
    if upscaler.lower() not in UPSCALERS:
        raise UsageError(f"hr_upscaler {upscaler[:60]} {nearest(upscaler, ('Latent', 'Lanczos', 'None'))}")
    found = {"hires_upscale": UPSCALERS[upscaler.lower()], "hires": number(body, "hr_scale", 2.0, float)}
    wanted = [number(body, name, 0) for name in ("hr_resize_x", "hr_resize_y")]
    first = [number(body, name, 0) for name in ("firstphase_width", "firstphase_height")]
    sides = [fields.get(name) for name in ("width", "height")]
    if all(first) and all(sides):  # the oldest way: width and height are those of the result
        found |= {"hires": sides, "width": first[0], "height": first[1]}
    elif all(wanted):
        found["hires"] = wanted
    elif any(wanted):
        if not all(sides):
            raise UsageError("hr_resize_x and hr_resize_y go together, unless width and height are given.")
        found["hires"] = wanted[0] / sides[0] or wanted[1] / sides[1]
    if "denoising_strength" in body:
        found["hires_strength"] = number(body, "denoising_strength", 0.7, float)
    steps = number(body, "hr_second_pass_steps", 0) or number(body, "hr_steps", 0) or fields.get("steps")
    return found | ({"hires_steps": steps} if steps else {})
