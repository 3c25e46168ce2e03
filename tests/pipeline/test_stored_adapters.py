"""Adapters that other programs note in pictures: as settings of ours, with the hashes to find them again."""

import json

import pytest

from sd.pipeline.image.stored_settings.other_programs import settings_of_texts
from sd.pipeline.settings import Settings

A, B = "0123456789ab", "ba9876543210"
LINE = "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x768"
COMFY = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 5, "steps": 20, "cfg": 6.5, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0,
        "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.ckpt"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["10", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["13", 0]}},
    "13": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
}  # fmt: skip


def comfy(**nodes):
    """The graph with nodes between the checkpoint and the sampler; `n10` is the last of them."""
    added = {name[1:]: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    return {"prompt": {**COMFY, **added}}


def loader(name, model, clip, before="4"):
    links = {"model": [before, 0], "clip": [before, 1]}
    return "LoraLoader", {"lora_name": name, "strength_model": model, "strength_clip": clip, **links}


def fooocus(**values):
    return {"parameters": {"metadata_scheme": "fooocus", "prompt": "a cat", "seed": "5", "steps": 20, **values}}


def invoke(*loras):
    return {"invokeai_metadata": {"positive_prompt": "a cat", "steps": 20, "seed": 5, "loras": [*loras]}}


def swarm(**values):
    return {"parameters": {"sui_image_params": {"prompt": "a cat", "seed": 5, "steps": 20, **values}}}


@pytest.mark.parametrize(
    ("texts", "uses", "hashes", "unused"),
    [
        (f'a <lora:x:0.5:1>\n{LINE}, Lora hashes: "x: {A}"', [("x", 1, 0.5)], {"x": A}, []),
        (f'a <lora:x, y:1>\n{LINE}, Lora hashes: "x y: {A}"', [("x, y", 1, 1)], {"x y": A}, []),
        (f'a <lora:x:1>\n{LINE}, Lora hashes: "x: {A}, y: {B}"', [("x", 1, 1)], {"x": A, "y": B},
         [f"LoRA y ({B}), whose strength is not noted"]),
        (f"a <lora:x:1>\n{LINE}, Emphasis: None, Version: v1.10.1", [("x", 1, 1)], {}, []),
        (f'a\n{LINE}, Lora hashes: "x: {A}", Lora weights: "x: 0.5", Version: Fooocus v2.5.0', [("x", 0.5, 0.5)],
         {"x": A}, []),
        (f"a\n{LINE}, AddNet Enabled: True, AddNet Module 1: LoRA, AddNet Model 1: x({A}), AddNet Weight A 1: 0.5, "
         "AddNet Weight B 1: 1, AddNet Model 2: None", [("x", 0.5, 1)], {"x": A}, []),
        (comfy(n10=loader("x.safetensors", 0.8, 0.5)), [("x", 0.8, 0.5)], {"x": None}, []),
        (comfy(n10=loader("b\\x.pt", 1, 1, "11"), n11=loader("y.safetensors", -0.5, 0)),
         [("y", -0.5, 0), ("b/x", 1, 1)], {"b/x": None, "y": None}, []),
        (comfy(n10=loader("x.safetensors", 0.8, 0.5), n6=("CLIPTextEncode", {
            "text": "a cat", "clip": ["4", 1]})), [("x", 0.8, 0)], {"x": None}, []),
        (comfy(n10=("Power Lora Loader (rgthree)", {
            "lora_1": {"on": True, "lora": "x.safetensors", "strength": 0.8, "strengthTwo": None},
            "lora_2": {"on": False, "lora": "y.safetensors", "strength": 1}, "model": ["4", 0], "clip": ["4", 1]})),
         [("x", 0.8, 0.8)], {"x": None}, []),
        (comfy(n10=("LoraLoader", {"lora_name": "x.pt", "strength_model": "nan", "model": ["4", 0]})), [], {},
         ["LoRA x.pt (LoraLoader (node 10))"]),
        (fooocus(loras=[["x.safetensors", 0.5], ["None", 1]]), [("x", 0.5, 0.5)], {"x": None}, []),
        (fooocus(lora_combined_1="x.safetensors : 0.5", lora_combined_2="y : -1"), [("x", 0.5, 0.5), ("y", -1, -1)],
         {"x": None, "y": None}, []),
        (invoke({"model": {"key": "1", "name": "x", "hash": f"blake3:{A}", "base": "sd-1"}, "weight": 0.75}),
         [("x", 0.75, 0.75)], {"x": None}, []),
        (invoke({"lora": {"model_name": "x", "base_model": "sd-1"}, "weight": 0.5}, {"model_name": "y", "weight": 1}),
         [("x", 0.5, 0.5), ("y", 1, 1)], {"x": None, "y": None}, []),
        (swarm(loras=["x", "sub/y"], loraweights=["0.5", 1]), [("x", 0.5, 0.5), ("sub/y", 1, 1)],
         {"x": None, "sub/y": None}, []),
        (swarm(loras="x,y", loraweights="0.5,0.25"), [("x", 0.5, 0.5), ("y", 0.25, 0.25)], {"x": None, "y": None}, []),
        ({"comment": {"prompt": "a", "num_inference_steps": 9, "seed": 4, "use_stable_diffusion_model": "v",
                      "use_lora_model": "x", "lora_alpha": 0.5}}, [("x", 0.5, 0.5)], {"x": None}, []),
        ({"xmp": {"c": "a", "steps": 9, "sampler": "Euler", "seed": 5, "lora": [{"file": "x.ckpt", "weight": 0.5}]}},
         [("x", 0.5, 0.5)], {"x": None}, []),
        (fooocus(loras=[["x", "much"], [["x"], 1], {"y": 2}, 7]), [], {},
         ["LoRA x", "LoRA [['x'], 1]", "LoRA {'y': 2}", "LoRA 7"]),
    ],
)  # fmt: skip
def test_each_program_says_which_adapters_it_applied(texts, uses, hashes, unused):
    texts = {"parameters": texts} if isinstance(texts, str) else texts
    texts = {name: text if isinstance(text, str) else json.dumps(text) for name, text in texts.items()}
    found = settings_of_texts({**texts, "pixels": "512x768"})
    job = Settings(**{"width": 64, "height": 64, **found.settings})
    assert list(job.adapters) == uses
    assert "<" not in job.prompt_text
    assert {row["name"]: row["autov3"] for row in found.made_with.get("adapters", [])} == hashes
    assert [part for part in found.unused if "LoRA" in part] == unused
