"""Files of every family: named precisely, with the evidence, at full size and in narrow files with all their names."""

from dataclasses import replace
from math import prod

import families
import pytest
import torch
from conftest import TINY
from families import REFINER_UNET, UNET, UPSCALER_UNET, V2_UNET, XL_UNET, unet_shapes, v1_text_shapes, vae_shapes
from safetensors.torch import save_file

from convert.checkpoint import read_checkpoint
from convert.errors import UnsupportedFileError, WeightMismatchError
from convert.families.family import recognise
from convert.files.reader import open_checkpoint
from sd.config import SD_V1

V2_INPAINTING, V2_DEPTH, V2_EDIT = (replace(V2_UNET, in_channels=channels) for channels in (9, 5, 8))
VISION = {"embedder.model.ln_final.weight": (32,), "embedder.model.visual.conv1.weight": (32, 3, 14, 14)}
DEPTH = {
    "depth_model.model.pretrained.act_postprocess3.0.project.0.bias": (768,),
    "depth_model.model.scratch.output_conv.0.weight": (128, 256, 3, 3),
}
V1_TEXT = v1_text_shapes("cond_stage_model.transformer.text_model.", TINY)
ROBERTA = {"cond_stage_model.roberta.encoder.layer.0.attention.self.query.weight": (32, 32)}

FAMILIES = {  # what the file is -> (the tensors of one at any width, what is seen of it)
    "a Stable Diffusion 2 checkpoint (512-base or 768-v, 2.0 or 2.1)": (
        lambda width: families.v2(width=width),
        ["'cond_stage_model.model.'", "takes 4 channels"],
    ),
    "a Stable Diffusion 2 inpainting checkpoint": (
        lambda width: families.v2(unet=V2_INPAINTING, width=width),
        ["takes 9 channels"],
    ),
    "a Stable Diffusion 2 checkpoint for editing pictures": (
        lambda width: families.v2(unet=V2_EDIT, width=width),
        ["takes 8 channels"],
    ),
    "a Stable Diffusion 2 depth checkpoint": (
        lambda width: families.v2(unet=V2_DEPTH, width=width) | DEPTH,
        ["'depth_model.'", "takes 5 channels"],
    ),
    "a Stable Diffusion 2 depth checkpoint without its depth network": (
        lambda width: families.v2(unet=V2_DEPTH, width=width),
        ["takes 5 channels"],
    ),
    "a Stable Diffusion x4 upscaler": (
        lambda width: families.v2(unet=UPSCALER_UNET, width=width),
        ["takes 7 channels"],
    ),
    "a Stable Diffusion 2.1 unCLIP-L checkpoint": (
        lambda width: families.v2(width=width, label=1536) | VISION,
        ["'embedder.model.'", "1536 numbers of a picture"],
    ),
    "a Stable Diffusion 2.1 unCLIP-H checkpoint": (
        lambda width: families.v2(width=width, label=2048) | VISION,
        ["2048 numbers of a picture"],
    ),
    "a Stable Diffusion XL base checkpoint": (
        lambda width: families.xl(width=width),
        ["'conditioner.embedders.1.'", "takes 4 channels"],
    ),
    "a distilled Stable Diffusion XL checkpoint (SSD-1B or Vega)": (
        lambda width: {n: s for n, s in families.xl(width=width).items() if not n.startswith(UNET + "middle_block.1")},
        ["no middle attention"],
    ),
    "a Playground 2.5 checkpoint, of Stable Diffusion XL's build": (
        lambda width: families.xl(width=width) | {"edm_mean": (4,), "edm_std": (4,)},
        ["edm_mean"],
    ),
    "a Stable Diffusion XL refiner": (
        lambda width: families.refiner(width=width),
        ["'conditioner.embedders.0.model.'"],
    ),
    "an AltDiffusion checkpoint": (
        lambda width: unet_shapes(SD_V1.unet, width) | vae_shapes(width) | ROBERTA,
        ["'cond_stage_model.roberta.'"],
    ),
    "a Stable Diffusion 3 checkpoint": (
        lambda width: {UNET + "joint_blocks.0.x_block.attn.qkv.weight": (3 * width, width)} | vae_shapes(width),
        ["joint_blocks"],
    ),
    "the UNet of a Stable Diffusion 2 checkpoint": (
        lambda width: unet_shapes(V2_UNET, width),
        ["text vectors 1024 wide"],
    ),
    "the UNet of a Stable Diffusion 2.1 unCLIP-H checkpoint": (
        lambda width: unet_shapes(V2_UNET, width, label=2048),
        ["text vectors 1024 wide"],
    ),
    "the UNet of the Stable Diffusion x4 upscaler": (
        lambda width: unet_shapes(UPSCALER_UNET, width),
        ["text vectors 1024 wide", "7 channels"],
    ),
    "the UNet of a Stable Diffusion XL checkpoint": (
        lambda width: unet_shapes(XL_UNET, width, label=2816),
        ["text vectors 2048 wide"],
    ),
    "the UNet of a Stable Diffusion XL refiner": (
        lambda width: unet_shapes(REFINER_UNET, width, label=2560),
        ["text vectors 1280 wide"],
    ),
}


def refusal(shapes):
    with pytest.raises(UnsupportedFileError) as caught:
        recognise(shapes)
    return str(caught.value)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_named_with_the_evidence_at_full_size(kind):
    make, evidence = FAMILIES[kind]
    text = refusal(make(320))
    assert text.startswith(f"is {kind}: ")
    for part in (*evidence, "Only complete Stable Diffusion 1 checkpoints can be used so far"):
        assert part in text


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: families.v2(width=32, text_width=32), "a Stable Diffusion 2 checkpoint"),
        (lambda: families.v2(unet=V2_DEPTH, width=32, text_width=32) | DEPTH, "a Stable Diffusion 2 depth checkpoint"),
        (lambda: families.xl(width=32, text_widths=(32, 32)), "a Stable Diffusion XL base checkpoint"),
        (lambda: families.refiner(width=32, text_width=32), "a Stable Diffusion XL refiner"),
    ],
)
def test_narrow_files_with_all_names_of_a_family_are_named(tmp_path, make, kind):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(shape, dtype=torch.float16) for name, shape in make().items()}, path)
    with pytest.raises(UnsupportedFileError, match=rf"x\.safetensors is {kind}"), open_checkpoint(path) as file:
        read_checkpoint(file)


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


def test_a_part_of_a_v1_model_is_named_by_what_is_missing():
    parts = {"UNet": unet_shapes(SD_V1.unet, 32), "VAE": vae_shapes(32), "text encoder": V1_TEXT}
    for there, missing in (
        (["UNet"], "VAE and no text encoder"),
        (["VAE"], "UNet and no text encoder"),
        (["UNet", "VAE"], "text encoder"),
        (["VAE", "text encoder"], "UNet"),
    ):
        shapes = {name: shape for part in there for name, shape in parts[part].items()}
        with pytest.raises(WeightMismatchError, match=f"has no {missing}: among its {len(shapes)} tensors are only"):
            recognise(shapes)


def test_version_2_under_the_names_of_version_1_is_not_taken_for_it():
    """As a diffusers folder of version 2 is, once its names are the original ones."""
    text = replace(SD_V1.text_encoder, width=1024, hidden_width=4096, layers=23, heads=16)
    text_shapes = v1_text_shapes("cond_stage_model.transformer.text_model.", replace(SD_V1, text_encoder=text))
    message = refusal(unet_shapes(V2_UNET, 32) | vae_shapes(32) | text_shapes)
    assert message.startswith("is a Stable Diffusion 2 model in another layout: its text encoder is 1024 wide")


def test_an_added_lora_does_not_make_a_lora_of_a_checkpoint_without_a_vae():
    shapes = unet_shapes(SD_V1.unet, 32) | V1_TEXT | {"lora_unet_x.lora_up.weight": (4, 4)}
    with pytest.raises(WeightMismatchError, match="has no VAE"):
        recognise(shapes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight", "a LoRA"),
        ("base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "a LoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "a LoRA"),
        ("mid_block.hada_w1_a", "a LoHa"),
        ("mid_block.lokr_w1", "a LoKr"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("emb_params", "a textual inversion"),
        ("clip_g", "a textual inversion for Stable Diffusion XL"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight", "a motion module"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", "a CLIP text encoder alone"),
        ("encoder.layers.0.self_attn.q_proj.weight", "a CLIP text encoder alone"),
        ("transformer.resblocks.0.ln_1.weight", "an OpenCLIP model alone"),
        ("double_blocks.0.img_attn.qkv.weight", "a FLUX checkpoint"),
        ("cond_stage_model.transformer.layers.0.0.weight", "a latent diffusion checkpoint of before CLIP"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, name, kind):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(4, 4)}, path)
    with pytest.raises(UnsupportedFileError, match=rf"x\.safetensors is {kind}"), open_checkpoint(path) as file:
        read_checkpoint(file)


def test_the_refusal_of_a_hostile_name_is_escaped():
    text = refusal({"evil\x1b[2J\u202e": (1,)})
    assert text.isprintable()
    assert r"evil\x1b[2J\u202e" in text
