"""Sound texts with settings, and changes to them, for the tests and for scripts/checks/fuzz_settings.py."""

import json
import random
import re
from collections.abc import Iterator

LINE = (
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x768, Model hash: 6ce0161689"
)
LINES = [
    f"a (red:1.2) horse, 35mm: sharp\nat dusk\nNegative prompt: blurry\n{LINE}, Model: v1-5, Version: v1.10.1",
    f"a\n{LINE}, Denoising strength: 0.5, Hires upscale: 1.5, Hires steps: 9, Hires upscaler: Latent",
    f'{LINE}, Hashes: {{"model": "6ce0161689", "vae": "1"}}, Civitai resources: [{{"type": "a", "x": [1, 2]}}]',
    f'a\n{LINE}, Prompt: "two\nlines, and: \\"more\\"", Clip skip: 2, Tiling: True\nTemplate: {{a|b}}',
    f'a <lora:x:1>\n{LINE}, Variation seed: 3, Variation seed strength: 0.2, Lora hashes: "a: b, c: d", RNG: CPU',
    f'a <lora:x:te=1:unet=1><lyco:y>\n{LINE}, Lora hashes: "x: 0123456789ab", Lora weights: "z: 1", Emphasis: None',
    f'a\n{LINE}, AddNet Enabled: True, AddNet Model 1: x(01234567), AddNet Weight A 1: 2, Hashes: {{"lora:x": "0123"}}',
    'a\nSteps: 2, Sampler: Euler, Sigmas: "14, 3", Guidance interval: "0.3, 5"',
    '"a horse [blurry] \\" x" -s 50 -S 2980747362 -W 512 -H 768 -C 5 -A k_lms -G 0.9 -U 4 0.95',
]
GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 5, "steps": 20, "cfg": 6.5, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0,
        "model": ["15", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.ckpt"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": ["14", 0], "clip": ["4", 1]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["13", 0]}},
    "11": {"class_type": "LatentUpscale", "inputs": {"samples": ["3", 0], "width": 1024, "height": 1536}},
    "12": {"class_type": "KSamplerAdvanced", "inputs": {
        "noise_seed": 7, "steps": 9, "cfg": 6, "sampler_name": "ddim", "scheduler": "normal", "denoise": 0.5,
        "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["11", 0], "end_at_step": 5}},
    "13": {"class_type": "VAEDecode", "inputs": {"samples": ["12", 0]}},
    "14": {"class_type": "Text", "inputs": {"value": "dog"}},
    "15": {"class_type": "LoraLoader", "inputs": {
        "lora_name": "x.pt", "strength_model": 1, "strength_clip": 0.5, "model": ["16", 0], "clip": ["16", 1]}},
    "16": {"class_type": "Loaders", "inputs": {
        "lora_1": {"on": True, "lora": "y.pt", "strength": 0.5}, "model": ["4", 0], "clip": ["4", 1]}},
}  # fmt: skip
WORKFLOW = {
    "nodes": [
        {"id": 3, "type": "KSampler", "widgets_values": [5, "fixed", 20, 6.5, "euler", "karras", 1],
         "inputs": [{"name": "positive", "link": 1}, {"name": "latent_image", "link": 2}]},
        {"id": 5, "type": "EmptyLatentImage", "widgets_values": [512, 768, 1]},
        {"id": 6, "type": "CLIPTextEncode", "widgets_values": ["a cat"]},
        {"id": 9, "type": "SaveImage", "inputs": [{"name": "images", "link": 3}]},
    ],
    "links": [[1, 6, 0, 3, 1, "CONDITIONING"], [2, 5, 0, 3, 3, "LATENT"], [3, 3, 0, 9, 0, "IMAGE"]],
}  # fmt: skip
OBJECTS = [
    GRAPH,
    WORKFLOW,
    {"positive_prompt": "a", "negative_prompt": "b", "steps": 9, "cfg_scale": 8.0, "scheduler": "euler", "seed": 1,
     "model": {"model_name": "x", "hash": "sha256:0123456789"}, "width": 512, "height": 512, "clip_skip": 0,
     "loras": [{"model": {"name": "x", "hash": "blake3:0123"}, "weight": 0.75}]},
    {"positive_prompt": "a", "positive_style_prompt": "b", "steps": 9, "seed": 1, "refiner_start": 0.8,
     "refiner_model": {"name": "x"}, "refiner_positive_aesthetic_score": 6},
    {**GRAPH, "6": {"class_type": "CLIPTextEncodeSDXL", "inputs": {
        "width": 1024, "height": 1024, "crop_w": 0, "crop_h": 8, "target_width": 512, "target_height": 768,
        "text_g": "a", "text_l": "b", "clip": ["4", 1]}}},
    {"model_weights": "x", "model_hash": "56d1442a0f", "image": {
        "prompt": [{"prompt": "a [b]", "weight": 1.0}], "steps": 50, "cfg_scale": 5, "sampler": "k_lms", "seed": 2}},
    {"steps": 50, "sampler": "k_euler_ancestral", "seed": 2, "strength": 0.4, "scale": 10.0, "uc": "b", "prompt": "a"},
    {"metadata_scheme": "fooocus", "prompt": "a", "resolution": "(768, 1280)", "sampler": "dpmpp_2m_sde_gpu",
     "steps": 30, "scheduler": "karras", "seed": "69", "guidance_scale": 4, "base_model": "x", "loras": [["a", 1]]},
    {"sui_image_params": {"prompt": "a", "model": "x", "seed": 5, "steps": 20, "cfgscale": 6, "width": 512,
                          "loras": ["x"], "loraweights": ["0.5"]}},
    {"c": "a", "uc": "b", "steps": 20, "sampler": "Euler", "seed": 5, "scale": 6.5, "size": "512x768"},
    {"prompt": "a", "num_inference_steps": 9, "use_stable_diffusion_model": "x", "seed": 4, "guidance_scale": 6},
]  # fmt: skip
OURS = {
    "prompt": "a [b:c:0.5] (d:1.2)", "negative_prompt": "", "width": 64, "height": 64, "steps": 2, "sampler": "euler",
    "schedule": "karras", "sigmas": [], "eta": None, "guidance_scale": 7.5, "guidance_interval": [0.3, 5], "seed": 7,
    "hires": [128, 128], "hires_strength": 0.5, "tile": "xy", "vary": 0.1, "vary_seed": 3, "strength": 1,
    "expand": "left=8", "mask_blur": 4.0, "resize_mode": "crop", "only_masked": False, "model": {"name": "x"},
    "lora": ["x:0.5", "y:1:0"], "adapters": [{"name": "x", "autov3": "0123456789ab"}],
}  # fmt: skip
HOSTILE = [2**64, -1, 0, 10**30, 1e308, 1e-300, float("inf"), float("nan"), True, None, "", "x", "\0", "nan", "1e999"]
HOSTILE += [
    "9" * 400,
    10**399,
    "a" * 5000,
    [],
    {},
    [[]],
    [1],
    ["3", 0],
    [None] * 9,
    "512x512",
    "\ud800",
    "Steps: 5, Seed: 6, Size: 8x8",
]
PIECES = re.compile(r"[\w.]+|\W", re.DOTALL)
MARKS = [
    '"',
    "\\",
    ",",
    ":",
    ": ",
    "[",
    "]",
    "{",
    "}",
    "\n",
    ", ",
    "\r\n",
    "\0",
    "\ufeff",
    "x" * 70,
    "9" * 400,
    "nan",
    "-1",
]
MARKS += ["Steps: 5, ", "Negative prompt: ", ', a: "', ", a: [", ', a: {"b":', "Seed: 5", "猫", "\u202e", "1e999"]


def json_lines() -> Iterator[str]:
    """JSON lines as --from-file takes them."""
    for name, value in OURS.items():
        if name not in ("model", "run", "expand", "mask_blur", "resize_mode", "only_masked"):
            yield json.dumps({"prompt": "a", "width": 64, "height": 64, "steps": 1, name: value})


def seeds() -> Iterator[str]:
    yield from LINES
    yield from map(json.dumps, [*OBJECTS, OURS])
    yield from json_lines()


def mutated(text: str, pick: random.Random) -> str:
    """The text with one to three changes: to its JSON, where it is JSON, or to its pieces."""
    for _ in range(pick.choice([1, 1, 2, 3])):
        try:
            data = json.loads(text)
            text = json.dumps(_changed(data, pick)) if pick.random() < 0.8 else _with_pieces(text, pick)
        except (ValueError, RecursionError):
            text = _with_pieces(text, pick)
    return text


def _changed(data: object, pick: random.Random) -> object:
    """JSON data with one value replaced, removed or doubled, at any depth."""
    if isinstance(data, dict) and data and pick.random() < 0.9:
        name = pick.choice([*data])
        action = pick.random()
        if action < 0.08:
            return {key: value for key, value in data.items() if key != name}
        if action < 0.16:
            return {**data, pick.choice([*data, "x", "Size", "image", "steps", "hires"]): data[name]}
        return {**data, name: _changed(data[name], pick)}
    if isinstance(data, list) and data and pick.random() < 0.8:
        i = pick.randrange(len(data))
        return [*data[:i], _changed(data[i], pick), *data[i + pick.choice([0, 1, 1, 1, 2]) :]]
    return pick.choice(HOSTILE)


def _with_pieces(text: str, pick: random.Random) -> str:
    pieces = PIECES.findall(text) or [""]
    i, action = pick.randrange(len(pieces)), pick.random()
    if action < 0.3:
        pieces[i] = pick.choice(MARKS)
    elif action < 0.6:
        pieces.insert(i, pick.choice(MARKS))
    elif action < 0.75:
        del pieces[i : i + pick.choice([1, 1, 3, 20])]
    elif action < 0.9:
        j = pick.randrange(len(pieces))
        pieces[i:i] = pieces[j : j + pick.choice([1, 5, 30])]
    else:
        pieces[i] *= pick.choice([2, 50, 3000 // max(1, len(pieces[i]))])
    return "".join(pieces)
