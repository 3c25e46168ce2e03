"""Files of every family: one row of the table tells each, with the evidence, for loading and for `sd inspect` alike."""

from dataclasses import replace
from math import prod

import families
import pytest
from conftest import TINY
from families import UNET, UPSCALER_UNET, unet_shapes, v1_text_shapes, vae_shapes

from convert.errors import UnsupportedFileError, WeightMismatchError
from convert.families.additions import ADDITIONS
from convert.families.family import recognise
from convert.families.recognition import describe
from convert.families.table import (
    ANY_TASK,
    FIRST,
    MODELS,
    TASKS,
    family_named,
    family_of_pipeline,
    task_refusal,
)
from sd.config import SD_V1, SD_V2, SDXL, SDXL_REFINER
from sd.pipeline.conditions import EXTRA, Extra

V2_INPAINTING, V2_DEPTH, V2_EDIT = (replace(SD_V2.unet, in_channels=channels) for channels in (9, 5, 8))
INPAINTING, EDIT, SEVEN = (replace(SD_V1.unet, in_channels=channels) for channels in (9, 8, 7))
XL_INPAINTING, XL_EDIT = (replace(SDXL.unet, in_channels=channels) for channels in (9, 8))
VISION = {"embedder.model.ln_final.weight": (32,), "embedder.model.visual.conv1.weight": (32, 3, 14, 14)}
DEPTH = {
    "depth_model.model.pretrained.act_postprocess3.0.project.0.bias": (768,),
    "depth_model.model.scratch.output_conv.0.weight": (128, 256, 3, 3),
}
V1_TEXT_START = "cond_stage_model.transformer.text_model."
V1_TEXT, FULL_V1_TEXT = v1_text_shapes(V1_TEXT_START, TINY), v1_text_shapes(V1_TEXT_START)
TEXT_OF_1024 = replace(SD_V1.text_encoder, width=1024, hidden_width=4096, layers=23, heads=16)
V2_TEXT_AS_CLIP = v1_text_shapes(V1_TEXT_START, replace(SD_V1, text_encoder=TEXT_OF_1024))
ROBERTA = {"cond_stage_model.roberta.encoder.layer.0.attention.self.query.weight": (32, 32)}
LORA = {"lora_unet_x.lora_up.weight": (4, 4)}


def xl_with(unet):
    return {**families.xl(width=320), **unet_shapes(unet, 320, label=2816)}


def without_middle(shapes):
    return {name: shape for name, shape in shapes.items() if not name.startswith(UNET + "middle_block.1")}


def of_generative_models(shapes):
    """The names that Stability-AI/generative-models gives to the text encoder."""
    return {name.replace("cond_stage_model.", "conditioner.embedders.0."): shape for name, shape in shapes.items()}


KINDS = [  # the tensors, the row, its words, what is seen of it
    (lambda: unet_shapes(SD_V1.unet) | vae_shapes() | FULL_V1_TEXT, "sd-v1", "Stable Diffusion 1", "768 wide"),
    (lambda: unet_shapes(INPAINTING) | vae_shapes() | FULL_V1_TEXT, "sd-v1-inpainting", "1 inpainting", "9 channels"),
    (lambda: unet_shapes(EDIT) | vae_shapes() | FULL_V1_TEXT, "sd-v1-edit", "1 edit", "8 channels"),
    (families.v2, "sd-v2", "Stable Diffusion 2", "cond_stage_model.model."),
    (lambda: families.v2(unet=V2_INPAINTING), "sd-v2-inpainting", "2 inpainting", "9 channels"),
    (lambda: families.v2(unet=V2_EDIT), "sd-v2-edit", "2 edit", "8 channels"),
    (lambda: families.v2(unet=V2_DEPTH) | DEPTH, "sd-v2-depth", "2 depth", "depth_model."),
    (lambda: families.v2(unet=V2_DEPTH), "sd-v2-depth", "without its depth network", "5 channels"),
    (lambda: families.v2(unet=UPSCALER_UNET), "sd-x4-upscaler", "x4 upscaler", "7 channels"),
    (lambda: families.v2(label=1536) | VISION, "sd-v2-unclip-l", "unCLIP-L", "gets 1536 numbers"),
    (lambda: families.v2(label=2048) | VISION, "sd-v2-unclip-h", "unCLIP-H", "gets 2048 numbers"),
    (lambda: families.v2(label=512) | VISION, "sd-v2-unclip", "2.1 unCLIP", "gets 512 numbers"),
    (lambda: of_generative_models(families.v2()), "sd-v2", "Stable Diffusion 2", "conditioner.embedders.0.model."),
    (lambda: of_generative_models(families.v2(unet=V2_INPAINTING)), "sd-v2-inpainting", "2 inpainting", "9 channels"),
    (lambda: of_generative_models(families.v2(width=32, text_width=32)), "sd-v2", "Stable Diffusion 2", "conditioner."),
    (families.xl, "sdxl", "XL base", "conditioner.embedders."),
    (lambda: xl_with(XL_INPAINTING), "sdxl-inpainting", "XL inpainting", "9 channels"),
    (lambda: xl_with(XL_EDIT), "sdxl-edit", "XL edit", "8 channels"),
    (lambda: without_middle(families.xl()), "sdxl-distilled", "distilled", "no attention in the middle"),
    (lambda: families.xl() | {"edm_vpred.sigma_max": ()}, "cosxl", "CosXL", "edm_vpred"),
    (lambda: families.xl() | {"edm_mean": (4,), "edm_std": (4,)}, "playground-v2.5", "Playground", "edm_mean"),
    (families.refiner, "sdxl-refiner", "XL refiner", "conditioner.embedders.0.model."),
    (lambda: unet_shapes(SD_V1.unet) | vae_shapes() | ROBERTA, "alt-diffusion", "AltDiffusion", ".roberta."),
    (lambda: {UNET + "joint_blocks.0.x": (4, 4)} | vae_shapes(), "sd3", "Stable Diffusion 3", "joint_blocks"),
    (lambda: {V1_TEXT_START.replace("text_model", "layers") + "0.weight": (4, 4)}, "ldm", "before CLIP", "layers.0"),
    # the UNet alone
    (lambda: unet_shapes(SD_V1.unet), "sd-v1", "UNet alone, of Stable Diffusion 1", "768 wide"),
    (lambda: unet_shapes(SD_V2.unet), "sd-v2", "UNet alone, of Stable Diffusion 2", "1024 wide"),
    (lambda: unet_shapes(SD_V2.unet, label=2048), "sd-v2-unclip-h", "UNet alone, of", "1024 wide"),
    (lambda: unet_shapes(UPSCALER_UNET), "sd-x4-upscaler", "UNet alone, of", "7 channels"),
    (lambda: unet_shapes(SDXL.unet, label=2816), "sdxl", "UNet alone, of", "2048 wide"),
    (lambda: unet_shapes(SDXL_REFINER.unet, label=2560), "sdxl-refiner", "UNet alone, of", "1280 wide"),
    # narrow files: the names alone tell
    (lambda: families.v2(width=32, text_width=32), "sd-v2", "Stable Diffusion 2", "cond_stage_model.model."),
    (lambda: families.v2(unet=V2_DEPTH, width=32, text_width=32) | DEPTH, "sd-v2-depth", "depth", "depth_model."),
    (lambda: families.xl(width=32, text_widths=(32, 32)), "sdxl", "XL base", "conditioner."),
    (lambda: families.refiner(width=32, text_width=32), "sdxl-refiner", "XL refiner", "embedders.0.model."),
    # version 2 under the names of version 1, as a diffusers folder has it
    (
        lambda: unet_shapes(SD_V2.unet, 32) | vae_shapes(32) | V2_TEXT_AS_CLIP,
        "sd-v2",
        "Stable Diffusion 2",
        "1024 wide",
    ),
    (lambda: {"conditioner.embedders.1.model.ln_final.weight": (1280,)}, "sdxl", "text encoder alone", "no UNet"),
    (lambda: {"cond_stage_model.model.ln_final.weight": (1024,)}, "sd-v2", "text encoder alone", "no UNet"),
    (lambda: unet_shapes(SD_V1.unet, 32) | V1_TEXT | LORA, "sd-v1", "Stable Diffusion 1", "no VAE"),
    (lambda: unet_shapes(SD_V1.unet) | {"control_model.x": (1,)}, "sd-v1", "with a ControlNet", "control_model.x"),
]
NAMES = {  # one name of a file -> the row that it tells
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "lora",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": "lora",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight": "lora",
    "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": "lora",
    "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": "loha",
    "mid_block.hada_w1_a": "loha",
    "mid_block.lokr_w1": "lokr",
    "control_model.input_blocks.0.0.weight": "controlnet",
    "input_hint_block.0.weight": "controlnet",
    "controlnet_cond_embedding.conv_in.weight": "controlnet",
    "body.0.block1.weight": "t2i-adapter",
    "emb_params": "embedding",
    "string_to_param.*": "embedding",
    "clip_g": "sdxl-embedding",
    "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight": "motion-module",
    "ip_adapter.1.to_k_ip.weight": "ip-adapter",
    "text_model.encoder.layers.0.self_attn.q_proj.weight": "text-encoder",
    "encoder.layers.0.self_attn.q_proj.weight": "text-encoder",
    "transformer.resblocks.0.ln_1.weight": "open-clip",
    "1.conv.0.weight": "taesd",
    "3.conv.0.weight": "taesd",
    "decoder.layers.0.weight": "taesd",
    "double_blocks.0.img_attn.qkv.weight": "flux",
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "row", "words", "seen"), KINDS, ids=[f"{kind[1]}-{kind[2][:20]}" for kind in KINDS])
def test_each_family_is_told_by_one_row_and_refused_with_what_is_seen(make, row, words, seen):
    shapes = make()
    found = describe(shapes)
    assert found.family.name == row
    assert words in found.name
    assert seen in "; ".join((*found.evidence, *found.details))
    if found.family.config is None:
        with pytest.raises(UnsupportedFileError) as caught:
            recognise(shapes)
        assert str(caught.value) == found.refusal
        assert found.family.title in found.refusal
        assert found.refusal.endswith(f"{found.family.why_not}.")
        assert found.refusal.startswith("is the UNet of a") == found.name.startswith("UNet alone")
    elif set(found.parts) == {"UNet", "VAE", "text encoder"} and found.family.name.startswith("sd-v1"):
        config = recognise(shapes)
        assert (config.family, config) == (row, replace(found.family.config, vae=config.vae))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_checkpoint_is_named_by_one_name(name):
    found = describe({name: (4, 4)})
    assert found.family.name == NAMES[name]
    assert name in found.evidence[0]
    with pytest.raises(UnsupportedFileError) as caught:
        recognise({name: (4, 4)})
    assert str(caught.value) == found.refusal
    assert found.family.title in found.refusal


@pytest.mark.parametrize(
    ("shapes", "kind", "detail"),
    [
        ({"emb_params": (3, 768)}, "textual inversion", "3 vectors 768 wide at emb_params: Stable Diffusion 1"),
        ({"string_to_param.*": (1, 1024)}, "textual inversion", "1 vector 1024 wide at string_to_param.*: Stable D"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "textual inversion for Stable Diffusion XL", "1280 wide"),
        ({"a word": (2, 768)}, "textual inversion", "2 vectors 768 wide"),
        ({"a.lora_A.weight": (4, 8), "b.lora_A.weight": (8, 8)}, "LoRA", "rank 4 to 8"),
        ({"unet.down_blocks.0.resnets.0.conv1.weight": (1, 1, 3, 3)}, "UNet alone", "such as unet.down_blocks"),
        ({"decoder.conv_in.weight": (1,), "encoder.conv_in.weight": (1,)}, "VAE alone", "no UNet"),
        ({"hello": (2, 2, 2)}, "unknown", "hello"),
        ({}, "no tensors", ""),
    ],
)
def test_other_files_are_described(shapes, kind, detail):
    found = describe(shapes)
    assert found.name == kind
    assert detail in "; ".join((*found.evidence, *found.details))


def test_a_part_of_a_v1_model_is_named_by_what_is_missing():
    parts = {"UNet": unet_shapes(SD_V1.unet, 32), "VAE": vae_shapes(32), "text encoder": V1_TEXT}
    for there, missing in (
        (["UNet"], "VAE and no text encoder"),
        (["VAE"], "UNet and no text encoder"),
        (["UNet", "VAE"], "text encoder"),
        (["VAE", "text encoder"], "UNet"),
    ):
        shapes = {name: shape for part in there for name, shape in parts[part].items()}
        with pytest.raises(
            WeightMismatchError, match=f"has no {missing}: its {len(shapes)} tensors are only those of a"
        ):
            recognise(shapes)


@pytest.mark.parametrize(
    ("unet", "text", "version"),
    [(SEVEN, FULL_V1_TEXT, 1), (replace(SD_V2.unet, in_channels=6), V2_TEXT_AS_CLIP, 2)],
)
def test_channels_that_no_model_of_the_family_takes_are_refused(unet, text, version):
    allowed = f"takes {unet.in_channels} channels; a Stable Diffusion {version} model takes 4, 5, 8, 9"
    with pytest.raises(UnsupportedFileError, match=allowed):
        recognise(unet_shapes(unet, 64) | vae_shapes(32) | text)


def test_the_refusal_of_a_hostile_name_is_escaped():
    with pytest.raises(UnsupportedFileError) as caught:
        recognise({"evil\x1b[2J\u202e": (1,)})
    assert str(caught.value).isprintable()
    assert r"evil\x1b[2J\u202e" in str(caught.value)
    assert describe({"\x1b[2J.lora_up": (1, 1)}).refusal.isprintable()


@pytest.mark.parametrize(
    ("shapes", "tensors", "parameters"),
    [
        # as counted in the published files: UNet, VAE and text encoders, without tables and ids
        (families.v2(), 686 + 248 + 294, 865_910_724 + 83_653_863 + 354_032_641),
        (families.v2(unet=V2_INPAINTING), 686 + 248 + 294, 865_925_124 + 83_653_863 + 354_032_641),
        (families.v2(unet=V2_DEPTH), 686 + 248 + 294, 865_913_604 + 83_653_863 + 354_032_641),
        (families.xl(), 1680 + 248 + 196 + 390, 2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_841),
    ],
)
def test_the_made_up_families_have_the_numbers_of_the_published_files(shapes, tensors, parameters):
    assert len(shapes) == tensors
    assert sum(map(prod, shapes.values())) == parameters


def test_the_rows_agree_with_the_configs_and_each_can_be_told():
    for row in MODELS:
        assert row.starts or row.inside or row.pipeline or row.latents, row.name
        if row.config and not row.context:  # told by a tensor that says more than its name
            assert family_named(row.config.family).config is row.config
        elif row.config:
            told, config = (row.name, row.channels, row.context), row.config
            assert told == (config.family, config.unet.in_channels, config.unet.context_width)
            assert row.prediction in ("", config.prediction)  # "": nothing that all of them have
            assert family_named(row.name).config is config
            assert family_of_pipeline(row.pipeline).channels == row.channels
    for row in (*FIRST, *ADDITIONS):
        assert (row.config, bool(row.starts or row.inside)) == (None, True), row.name
    assert family_of_pipeline("StableDiffusionXLInpaintPipeline").name == "sdxl-inpainting"
    assert family_of_pipeline("StableDiffusionXLControlNetPipeline").name == "sdxl"
    assert family_of_pipeline("SomethingPipeline") is None


def test_tasks_are_those_that_the_channels_allow():
    configs = {row.channels: row.config for row in MODELS if row.config and row.name.startswith("sd-v1")}
    allowed = {channels: [t for t in TASKS if task_refusal(c, t) is None] for channels, c in configs.items()}
    assert allowed == {4: list(ANY_TASK), 9: ["inpainting"], 8: ["editing"], 5: ["depth to image"]}
    assert "Use it with sd depth2img. Inpainting needs" in task_refusal(configs[5], "inpainting")
    text = task_refusal(configs[9], "image to image")
    assert "sd-v1-inpainting" in text
    assert "takes 9 channels (latents, a mask and masked latents). Use it with sd inpaint. Image to image" in text


def test_a_familys_tasks_are_those_that_its_channels_allow():
    """Two rooms say it, since neither may import the other."""
    for row in MODELS:
        if row.config is not None:
            extra = EXTRA.get(row.config.unet.in_channels - row.config.vae.latent_channels, Extra(()))
            assert extra.tasks == row.tasks, row.name
