"""Settings as other programs store them: graphs of ComfyUI, and JSON of many names."""

import json
from pathlib import Path

import pytest

from sd.app.cli.like import read
from sd.pipeline.image.stored_settings.other_programs import NoSettings, settings_of_texts
from sd.pipeline.settings import Settings

SHARED = [parent / "shared" / "foreign-pictures" for parent in Path(__file__).parents]
THEIRS = next((folder for folder in SHARED if folder.is_dir()), None)  # samples of sd-parsers, where they exist
COMMON = {
    "prompt": "a cat",
    "negative_prompt": "dog",
    "steps": 20,
    "seed": 5,
    "guidance_scale": 6.5,
    "sampler": "euler",
}
MODEL_HASH = "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


GRAPH = {  # what a new ComfyUI begins with
    "3": node("KSampler", seed=5, steps=20, cfg=6.5, sampler_name="euler", scheduler="karras", denoise=1.0,
              model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]),
    "4": node("CheckpointLoaderSimple", ckpt_name="v1-5.ckpt"),
    "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
    "6": node("CLIPTextEncode", text="a cat", clip=["4", 1]),
    "7": node("CLIPTextEncode", text="dog", clip=["4", 1]),
    "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
    "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
}  # fmt: skip


def changed(**nodes):
    """The graph with other nodes, or with other inputs of a node."""
    graph = json.loads(json.dumps(GRAPH))
    for name, value in nodes.items():
        name = name.removeprefix("n")
        graph[name] = (
            value if "class_type" in value else node(graph[name]["class_type"], **{**graph[name]["inputs"], **value})
        )
    return graph


def of_graph(graph, pixels="512x768", **texts):
    return settings_of_texts({"prompt": json.dumps(graph), "pixels": pixels, **texts})


def test_the_graph_that_comfy_ui_begins_with():
    found = of_graph(GRAPH)
    assert found.settings == {**COMMON, "schedule": "karras", "width": 512, "height": 768}
    assert (found.program, found.unused, found.made_with) == ("ComfyUI", [], {"model": {"name": "v1-5.ckpt"}})


WORKFLOW = {
    "nodes": [
        {"id": 3, "type": "KSampler", "widgets_values": [5, "fixed", 20, 6.5, "euler", "karras", 1], "inputs": [
            {"name": name, "link": link} for name, link in (("model", 1), ("positive", 2), ("negative", 3),
                                                            ("latent_image", 4))]},
        {"id": 4, "type": "CheckpointLoaderSimple", "widgets_values": ["v1-5.ckpt"]},
        {"id": 5, "type": "EmptyLatentImage", "widgets_values": [512, 768, 1]},
        {"id": 6, "type": "CLIPTextEncode", "widgets_values": ["a cat"], "inputs": [{"name": "clip", "link": 5}]},
        {"id": 7, "type": "CLIPTextEncode", "widgets_values": ["dog"], "inputs": [{"name": "clip", "link": None}]},
        {"id": 8, "type": "VAEDecode", "inputs": [{"name": "samples", "link": 6}]},
        {"id": 9, "type": "SaveImage", "widgets_values": ["x"], "inputs": [{"name": "images", "link": 7}]},
    ],
    "links": [[1, 4, 0, 3, 0, "MODEL"], [2, 6, 0, 3, 1, "CONDITIONING"], [3, 7, 0, 3, 2, "CONDITIONING"],
              [4, 5, 0, 3, 3, "LATENT"], [5, 4, 1, 6, 0, "CLIP"], [6, 3, 0, 8, 0, "LATENT"], [7, 8, 0, 9, 0, "IMAGE"]],
}  # fmt: skip


def test_a_workflow_alone_says_the_same():
    found = settings_of_texts({"workflow": json.dumps(WORKFLOW), "pixels": "512x768"})
    assert found.settings == of_graph(GRAPH).settings
    assert found.made_with == {"model": {"name": "v1-5.ckpt"}}


@pytest.mark.parametrize(
    ("graph", "settings", "unused"),
    [
        (changed(n6={"text": ["20", 0]}, n20=node("PrimitiveString", value="a cat")), COMMON, []),
        (changed(n3={"seed": ["20", 0]}, n20=node("Seed (x)", seed=5)), COMMON, []),
        (
            changed(n3={"positive": ["20", 0]}, n20=node("FluxGuidance", guidance=3, conditioning=["6", 0])),
            COMMON,
            ["FluxGuidance (node 20)"],
        ),
        (
            changed(n6={"clip": ["20", 0]}, n20=node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["4", 1])),
            {"clip_skip": 2},
            [],
        ),
        (
            changed(n3={"model": ["20", 0]}, n20=node("LoraLoader", lora_name="oil.safetensors", model=["4", 0])),
            {**COMMON, "lora": ["oil:1:0"]},  # the text encoder does not go through it
            [],
        ),
        (
            changed(
                n3={"positive": ["20", 0], "negative": ["20", 1]},
                n20=node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], control_net=["4", 0]),
            ),
            COMMON,
            ["ControlNetApplyAdvanced (node 20)"],
        ),
        (
            changed(
                n3={"positive": ["20", 0]},
                n20=node("ConditioningCombine", conditioning_1=["21", 0], conditioning_2=["6", 0]),
                n21=node("ConditioningSetArea", width=8, height=8, conditioning=["22", 0]),
                n22=node("CLIPTextEncode", text="a sky"),
            ),
            COMMON,
            ["'a sky' (node 22), another positive prompt"],
        ),
        (
            changed(n3={"denoise": 0.5, "latent_image": ["20", 0]}, n20=node("VAEEncode", pixels=["21", 0]),
                    n21=node("LoadImage", image="in.png")),
            {"strength": 0.5, "exact_steps": True},
            [],
        ),
        (
            changed(n3={"model": ["20", 0]}, n20=node("FreeU", b1=1.1, model=["21", 0]),
                    n21=node("RescaleCFG", multiplier=0.7, model=["4", 0])),
            COMMON,
            ["FreeU (node 20)", "RescaleCFG (node 21)"],
        ),
        (changed(n9=node("Image Save (x)", images=["8", 0])), COMMON, []),
        (changed(n8={"vae": ["20", 0]}, n20=node("VAELoader", vae_name="x")), COMMON, ["VAELoader (node 20)"]),
        (changed(n6={"text": ["20", 0]}, n20=node("Join", a="a")), {"prompt": ""}, ["CLIPTextEncode (node 6)"]),
        (
            changed(n3={"seed": ["20", 0]}, n20=node("Dice", throw=7)),
            {"steps": 20},
            ["Seed, which comes from Dice (node 20)"],
        ),
        (changed(n3={"denoise": 0.5}), COMMON, ["denoise 0.5 of empty latents"]),
        (changed(n3={"sampler_name": "restart"}), {"steps": 20}, ["Sampler: 'restart'"]),
        (
            changed(n30=node("KSampler", seed=7, steps=9, sampler_name="ddim", latent_image=["5", 0])),
            COMMON,
            ["KSampler (node 30), from which this picture does not come"],
        ),
        (
            changed(
                n3=node("SamplerCustomAdvanced", noise=["20", 0], guider=["21", 0], sampler=["22", 0], sigmas=["23", 0],
                        latent_image=["5", 0]),
                n20=node("RandomNoise", noise_seed=5),
                n21=node("CFGGuider", cfg=6.5, model=["4", 0], positive=["6", 0], negative=["7", 0]),
                n22=node("KSamplerSelect", sampler_name="euler"),
                n23=node("BasicScheduler", scheduler="karras", steps=20, denoise=1.0, model=["4", 0]),
            ),
            {**COMMON, "schedule": "karras"},
            [],
        ),
    ],
)  # fmt: skip
def test_what_leads_to_a_sampler_is_followed(graph, settings, unused):
    found = of_graph(graph)
    assert {name: found.settings[name] for name in settings} == settings
    assert found.unused == unused
    assert found.made_with["model"] == {"name": "v1-5.ckpt"}


def second_pass(kind="LatentUpscale", **size):
    return changed(
        n10=node(kind, samples=["3", 0], upscale_method="nearest", **size),
        n11=node("KSampler", seed=5, steps=12, cfg=6.5, sampler_name="euler", scheduler="karras", denoise=0.5,
                 model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["10", 0]),
        n12=node("VAEDecode", samples=["11", 0]),
        n13=node("SaveImage", images=["12", 0]),
    )  # fmt: skip


XL_SETTINGS = ("prompt_2", "negative_prompt_2", "original_size", "crop", "switch_at", "switch_by", "aesthetic_score")


def of_both(**inputs):
    """The text of a node for the two encoders of XL, which tells the size of the picture unless `inputs` say else."""
    sizes = {"width": 512, "height": 768, "crop_w": 0, "crop_h": 0, "target_width": 512, "target_height": 768}
    return node("CLIPTextEncodeSDXL", **{**sizes, "clip": ["4", 1], **inputs})


@pytest.mark.parametrize(
    ("positive", "settings", "unused"),
    [
        ({"text_l": "a cat", "text_g": "a cat"}, {}, []),
        ({"text_l": "a cat", "text_g": "oil"}, {"prompt_2": "oil"}, []),
        ({"text_l": "a cat", "text_g": ""}, {}, ["that the second text encoder reads no prompt (node 6)"]),
        (
            {"text_l": "a cat", "text_g": "a cat", "width": 1024, "height": 1024, "crop_w": 8},
            {"original_size": "1024x1024", "crop": "8,0"},
            ["other sizes for the negative prompt"],
        ),
        (
            {"text_l": "a cat", "text_g": "a cat", "target_width": 64},
            {},
            ["target size 64x768", "other sizes for the negative prompt"],
        ),
    ],
)
def test_the_texts_and_sizes_of_xl_in_a_graph(positive, settings, unused):
    found = of_graph(changed(n6=of_both(**positive), n7=of_both(text_l="dog", text_g="dog")))
    assert (found.settings["prompt"], found.settings["negative_prompt"]) == ("a cat", "dog")
    assert {name: found.settings[name] for name in XL_SETTINGS if name in found.settings} == settings
    assert found.unused == unused


def test_of_a_batch_with_one_seed_only_the_first_can_be_made_again():
    assert of_graph(changed(n5={"batch_size": 4})).notes[0].startswith("one of 4 pictures with one seed")
    assert of_graph(changed()).notes == []


@pytest.mark.parametrize(
    ("graph", "hires"),
    [(second_pass(width=1024, height=1536), "1024x1536"), (second_pass("LatentUpscaleBy", scale_by=2.0), "2.0")],
)
def test_a_second_sampler_that_enlarges_is_the_second_pass(graph, hires):
    found = of_graph(graph, "1024x1536")
    second = {"hires": hires, "hires_upscale": "latent", "hires_strength": 0.5, "hires_steps": 12}
    assert found.settings == {**of_graph(GRAPH).settings, **second}
    assert found.unused == []
    if "x" in hires:  # the size of the picture says that it is the first pass's
        assert "hires" not in of_graph(graph, "512x768").settings


def test_a_graph_without_a_sampler_is_named():
    with pytest.raises(
        NoSettings, match=r"was made by ComfyUI, but .* no sampler that is read here \(it has 'TheSampler'\)"
    ):
        of_graph({"1": node("TheSampler", x=1), "2": node("SaveImage", images=["1", 0])})


@pytest.mark.parametrize(
    "graph",
    [
        {"3": node("KSampler", sampler_name="euler", latent_image=["3", 0], positive=["3", 0], seed=["3", 0])},
        changed(n5={"width": "x", "height": [1]}, n3={"steps": {}, "cfg": "a", "seed": -1, "denoise": "x"}),
        changed(n6=node("A", conditioning=["20", 0]), n20=node("B", conditioning=["6", 0])),
        {**GRAPH, "4": None, "5": {"class_type": 1, "inputs": 2}, "6": [], "7": node("CLIPTextEncode", text=["7", 0])},
        {str(i): node("KSampler", sampler_name="x", latent_image=[str(i + 1), 0]) for i in range(400)},
        {
            str(i): node("V", **{key: [str(i + 1), 0] for key in ("value", "text", "seed", "width", "height", "int")})
            for i in range(2000)
        }
        | {"s": node("KSampler", sampler_name="x", latent_image=["0", 0], positive=["0", 0])},
        {str(i): node("SaveImage", images=[str(i + 1), 0]) for i in range(400)} | {"400": GRAPH["3"]},
    ],
)
def test_graphs_that_make_no_sense_are_read_or_refused(graph):
    try:
        found = of_graph(graph)
    except NoSettings:
        return
    assert isinstance(found.settings, dict)


OF_JSON = {
    "InvokeAI": [
        {"invokeai_metadata": {
            "positive_prompt": "a cat", "negative_prompt": "dog", "steps": 20, "seed": 5, "cfg_scale": 6.5,
            "width": 512, "height": 768, "scheduler": "euler",
            "model": {"model_name": "v1-5", "hash": f"sha256:{MODEL_HASH}"}}},
        {"sd-metadata": {
            "model": "stable diffusion", "model_weights": "v1-5", "model_hash": MODEL_HASH, "app_version": "2.3.0",
            "image": {"prompt": [{"prompt": "a cat [dog]", "weight": 1.0}], "steps": 20, "cfg_scale": 6.5, "seed": 5,
                      "width": 512, "height": 768, "sampler": "k_euler", "seamless": False}}},
        {"Dream": '"a cat [dog]" -s 20 -S 5 -W 512 -H 768 -C 6.5 -A k_euler'},
    ],
    "NovelAI": [
        {"Software": "NovelAI", "Source": f"v1-5 {MODEL_HASH.upper()}", "Description": "a cat", "Comment": {
            "steps": 20, "sampler": "k_euler", "seed": 5, "scale": 6.5, "uc": "dog", "width": 512, "height": 768}},
        {"stealth": {"Software": "NovelAI", "Source": f"v1-5 {MODEL_HASH}", "Comment": json.dumps({
            "prompt": "a cat", "steps": 20, "sampler": "k_euler", "seed": 5, "scale": 6.5, "uc": "dog", "width": 512,
            "height": 768, "noise_schedule": "native", "sm": False})}},
    ],
    "Fooocus": [
        {"parameters": {
            "base_model": "v1-5", "base_model_hash": MODEL_HASH[:10], "guidance_scale": 6.5, "loras": [],
            "prompt": "a cat", "metadata_scheme": "fooocus", "negative_prompt": "dog", "resolution": "(512, 768)",
            "sampler": "euler", "seed": "5", "steps": 20, "version": "Fooocus v2.4.3"}},
        {"UserComment": "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler, Seed: 5, Size: 512x768, "
         f"CFG scale: 6.5, Model: v1-5, Model hash: {MODEL_HASH[:10]}, Version: Fooocus v2.4.3"},
    ],
    "Easy Diffusion": [
        {"prompt": "a cat", "negative_prompt": "dog", "num_inference_steps": "20", "guidance_scale": "6.5", "seed": "5",
         "width": "512", "height": "768", "sampler_name": "euler", "use_stable_diffusion_model": "v1-5",
         "use_vae_model": "None"},
        {"UserComment": {"Prompt": "a cat", "Negative Prompt": "dog", "Steps": 20, "Guidance Scale": 6.5, "Seed": 5,
                         "Width": 512, "Height": 768, "Sampler": "euler", "Stable Diffusion model": "v1-5"}},
    ],
    "Draw Things": [{"xmp": {"c": "a cat", "uc": "dog", "steps": 20, "sampler": "Euler", "seed": 5, "scale": 6.5,
                             "size": "512x768", "model": "v1-5", "strength": 1}}],
    "SwarmUI": [{"parameters": {"sui_image_params": {
        "prompt": "a cat", "negativeprompt": "dog", "model": "v1-5", "seed": 5, "steps": 20, "cfgscale": 6.5,
        "width": 512, "height": 768, "sampler": "euler", "swarm_version": "0.9"}}}],
    "": [{"comment": {"prompt": "a cat", "negative_prompt": "dog", "num_inference_steps": 20, "guidance_scale": 6.5,
                      "seed": 5, "width": 512, "height": 768, "scheduler": "EulerDiscreteScheduler", "model": "v1-5"}}],
}  # fmt: skip


@pytest.mark.parametrize(("program", "texts"), [(name, one) for name, several in OF_JSON.items() for one in several])
def test_the_names_of_each_program(program, texts):
    texts = {name: json.dumps(text) if isinstance(text, dict) else text for name, text in texts.items()}
    found = settings_of_texts({**texts, "pixels": "512x768"})
    assert found.program == program
    usual = {"InvokeAI": "linspace", "NovelAI": "normal"}.get(program)
    if "UserComment" in texts and program == "Fooocus":  # a line of settings
        usual = "normal"
    assert found.settings.pop("schedule", None) == usual
    assert found.settings == {**COMMON, "width": 512, "height": 768}
    assert found.unused == []
    model = found.made_with.get("model", {})
    assert model.get("name") == (None if "Dream" in texts else "v1-5")
    assert MODEL_HASH.startswith(model.get("sha256", ""))


INVOKE_XL = {
    "positive_prompt": "a cat", "positive_style_prompt": "oil", "negative_prompt": "dog",
    "negative_style_prompt": "dog", "steps": 20, "seed": 5, "refiner_start": 0.7,
    "refiner_positive_aesthetic_score": 7, "refiner_model": {"name": "xl-refiner", "base": "sdxl-refiner"},
}  # fmt: skip
FOOOCUS_XL = {
    "metadata_scheme": "fooocus",
    "prompt": "a",
    "steps": 20,
    "seed": "5",
    "refiner_model": "xl-refiner.safetensors",
}


@pytest.mark.parametrize(
    ("texts", "settings", "refiner", "unused"),
    [
        (
            {"invokeai_metadata": INVOKE_XL},
            {"prompt_2": "oil", "switch_at": 0.7, "aesthetic_score": 7},
            "xl-refiner",
            [],
        ),
        ({"invokeai_metadata": INVOKE_XL | {"refiner_model": None}}, {"prompt_2": "oil"}, None, []),
        (
            {"invokeai_metadata": INVOKE_XL | {"positive_style_prompt": ""}},
            {"switch_at": 0.7, "aesthetic_score": 7},
            "xl-refiner",
            [],
        ),
        (
            {"parameters": FOOOCUS_XL | {"refiner_switch": 0.6}},
            {"switch_at": 0.6, "switch_by": "steps"},
            "xl-refiner.safetensors",
            [],
        ),
        ({"parameters": FOOOCUS_XL | {"refiner_switch": 0.6, "refiner_model": "None"}}, {}, None, []),
        (
            {"parameters": FOOOCUS_XL},
            {},
            None,
            ["refiner xl-refiner.safetensors, of which nothing says when it takes over"],
        ),
        ({"comment": {"prompt": "a", "prompt_2": "b", "steps": 9, "seed": 1}}, {"prompt_2": "b"}, None, []),
    ],
)
def test_second_prompts_and_refiners_of_xl(texts, settings, refiner, unused):
    texts = {name: json.dumps(text) for name, text in texts.items()}
    found = settings_of_texts({**texts, "pixels": "512x768"})
    assert {name: found.settings[name] for name in XL_SETTINGS if name in found.settings} == settings
    assert found.made_with.get("refiner", {}).get("name") == refiner
    assert found.unused == unused


def test_a_size_of_thousands_of_digits_is_named():
    data = {"metadata_scheme": "fooocus", "prompt": "a", "width": "9" * 5000, "height": "64"}
    found = settings_of_texts({"parameters": json.dumps(data), "pixels": "8x8"})
    assert "width" not in found.settings
    assert found.unused[0].startswith("size '9999")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpmpp_2m", ("dpmpp_2m", "sgm_uniform", False)),
        ("dpmpp_2m_k", ("dpmpp_2m", "karras", False)),
        ("kdpm_2_a", ("dpm2_a", "linspace", False)),
        ("k_dpm_2", ("dpm2", "linspace", False)),
        ("unipc", ("unipc", "sgm_uniform", False)),
        ("ddim", ("ddim", "leading", False)),
    ],
)
def test_samplers_of_invoke_ai_mean_what_they_do_there(name, expected):
    values = {"positive_prompt": "a", "steps": 20, "seed": 5, "scheduler": name, "width": 64, "height": 64}
    found = settings_of_texts({"invokeai_metadata": json.dumps(values), "pixels": "64x64"})
    job = Settings(**found.settings)
    assert (job.sampler, job.schedule, job.discard_penultimate) == expected


def test_what_is_not_known_is_named_and_the_picture_says_its_size():
    comment = {"steps": 20, "sampler": "k_dancing", "seed": 5, "scale": 10, "uc": "", "sm_dyn": True, "strength": 0.4}
    texts = {
        "Software": "NovelAI",
        "Source": "Stable Diffusion 1D44365E",
        "Description": "a",
        "Comment": json.dumps(comment),
    }
    found = settings_of_texts({**texts, "pixels": "640x448"})
    assert found.unused == ["Sampler: 'k_dancing'", "sm_dyn: True"]
    assert [found.settings[name] for name in ("width", "height", "strength")] == [640, 448, 0.4]
    assert found.made_with == {"model": {"name": "Stable Diffusion", "hash": "1D44365E"}}


SAMPLES = {  # file -> program, steps, seed, sampler
    "automatic1111_cropped.jpg": ("", 15, 235284042, "unipc"),
    "automatic1111_cropped.png": ("", 15, 235284042, "unipc"),
    "automatic1111_stealth.png": ("AUTOMATIC1111's web UI", 20, 2015833630, "euler"),
    "fooocus1_cropped.png": ("Fooocus", 30, 6952411511246973023, "dpmpp_2m_sde"),
    "img2img_cropped.png": ("ComfyUI", 20, 280823642470253, "dpmpp_2m"),
    "invokeai_dream1.png": ("InvokeAI", 50, 2980747362, "lms"),
    "invokeai_imeta1.png": ("InvokeAI", 35, 3293022630, "euler"),
    "invokeai_sdmeta1.png": ("InvokeAI", 50, 2980747362, "lms"),
    "night_evening_day_morning_cropped.png": ("ComfyUI", 13, 335608130539327, "dpmpp_sde"),
    "novelai1_cropped.png": ("NovelAI", 50, 2253955223, "euler_a"),
    "unclip_2pass_cropped.png": ("ComfyUI", 26, 1106257833005336, "unipc"),
}


@pytest.mark.skipif(THEIRS is None, reason="the sample pictures of sd-parsers are not here")
@pytest.mark.parametrize("name", SAMPLES)
def test_pictures_that_other_programs_made(name):
    found, _ = read(THEIRS / name)
    settings = found.settings
    assert (found.program, settings["steps"], settings["seed"]) == SAMPLES[name][:3]
    assert settings["sampler"].startswith(SAMPLES[name][3])
    assert settings["prompt"]
