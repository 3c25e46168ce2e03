"""What the web UI says of the pictures that it made: the text `info` of a reply, which is JSON inside JSON."""

import json
from collections.abc import Mapping, Sequence

from sd import __version__
from sd.app.web.a1111_fields import Wanted
from sd.pipeline.image.stored_settings.settings_line import Parts, parts_of

OWN_FIELDS = (  # labels of a settings line whose values have a field of their own
    *("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "Clip skip", "Version"),
    *("Denoising strength", "Variation seed", "Variation seed strength", "VAE", "VAE hash"),
)


def info_text(infotexts: Sequence[str], wanted: Wanted, messages: Sequence[Mapping[str, str]], time: str) -> str:
    """The `info` of a reply.

    infotexts  of its pictures; there are none if the job was interrupted before the first was finished
    wanted     what the request asked for
    messages   of the job: {"level", "text"}
    time       when it began, as digits
    """
    parts = [parts_of(text) for text in infotexts]
    fields = wanted.fields
    first = parts[0] if parts else Parts(fields["prompt"], fields.get("negative_prompt", ""), {}, [])
    values = first.values
    seeds, subseeds = whole_numbers(parts, "Seed"), whole_numbers(parts, "Variation seed")
    width, _, height = values.get("Size", "0x0").partition("x")
    strength = values.get("Denoising strength")
    notes = [*wanted.notes, *(message["text"] for message in messages)]
    return json.dumps(
        {
            "prompt": first.prompt,
            "all_prompts": [each.prompt for each in parts],
            "negative_prompt": first.negative_prompt,
            "all_negative_prompts": [each.negative_prompt for each in parts],
            "seed": seeds[0] if seeds else -1,
            "all_seeds": seeds,
            "subseed": subseeds[0] if subseeds else -1,
            "all_subseeds": subseeds,
            "subseed_strength": float(values.get("Variation seed strength", 0)),
            "width": int(width),
            "height": int(height),
            "sampler_name": values.get("Sampler", ""),
            "cfg_scale": float(values.get("CFG scale", 1)),
            "steps": int(values.get("Steps", 0)),
            "batch_size": fields["batch_size"],
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": values.get("Model", ""),
            "sd_model_hash": values.get("Model hash", ""),
            "sd_vae_name": values.get("VAE"),
            "sd_vae_hash": values.get("VAE hash"),
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "denoising_strength": None if strength is None else float(strength),
            "extra_generation_params": {name: values[name] for name in values if name not in OWN_FIELDS},
            "index_of_first_image": 0,
            "infotexts": list(infotexts),
            "styles": [],
            "job_timestamp": time,
            "clip_skip": int(values.get("Clip skip", 1)),
            "is_using_inpainting_conditioning": False,
            "version": f"sd-zoo {__version__}",
            "ignored": wanted.ignored,
            "messages": notes,
        },
        ensure_ascii=False,
    )


def whole_numbers(parts: Sequence[Parts], label: str) -> list[int]:
    """The value of a label in each text; -1 where it is missing."""
    return [int(each.values.get(label, -1)) for each in parts]
