"""Files that people take for a checkpoint: each is called what it is, when it is opened, described or refused."""

import io
import zipfile

import numpy as np
import pytest
import torch
from families import UNET, refiner, unet_shapes, v1_text_shapes, v2, vae_shapes, xl
from hostile import refused

from convert.actions.inspect import inspect
from convert.errors import CheckpointError, UnsupportedFileError
from convert.families.additions import ADDITIONS
from convert.families.family import recognise
from convert.families.recognition import describe
from convert.families.table import FIRST, MODELS
from convert.files.reader import open_checkpoint
from convert.single_part import read_part
from sd.config import SD_V1

Q = "self_attn.q_proj.weight"
LORA_ENDS = ("lora_up.weight", "lora_down.weight", "alpha", "dora_scale", "hada_w1_a", "lokr_w2", "diff_b", "diff")
NAMES = {  # the row -> files of its kind, with some of their names
    "clip-vision": (
        ("vision_model.embeddings.class_embedding", f"vision_model.encoder.layers.0.{Q}", "visual_projection.weight"),
        ("visual.class_embedding", "visual.transformer.resblocks.0.ln_1.weight"),
        ("embeddings.class_embedding", f"encoder.layers.0.{Q}", "post_layernorm.weight"),
    ),
    "clip": ((f"vision_model.encoder.layers.0.{Q}", f"text_model.encoder.layers.0.{Q}", "logit_scale"),),
    "safety-checker": (
        ("concept_embeds", f"vision_model.vision_model.encoder.layers.0.{Q}"),
        (f"vision_model.vision_model.encoder.layers.3.{Q}",),
    ),
    "language-model": (
        ("model.embed_tokens.weight", f"model.layers.0.{Q}", "lm_head.weight"),
        (f"model.layers.31.{Q}",),
        ("blk.0.attn_q.weight", "token_embd.weight", "output_norm.weight"),
        ("tok_embeddings.weight", "layers.0.attention.wq.weight", "norm.weight"),
        ("transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"),
        (f"model.layers.0.{Q}", "visual.blocks.0.attn.qkv.weight"),
        (f"language_model.model.layers.0.{Q}", f"vision_tower.vision_model.encoder.layers.0.{Q}"),
    ),
    "t5": (
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"),
        ("enc.blk.0.attn_q.weight", "token_embd.weight"),
    ),
    "sequence-model": (("bert.encoder.layer.0.attention.self.query.weight",), (f"model.decoder.layers.0.{Q}",)),
    "text-encoder": (
        (f"text_model.encoder.layers.0.{Q}", "text_model.embeddings.token_embedding.weight", "text_projection.weight"),
        (f"encoder.layers.0.{Q}", "embeddings.token_embedding.weight"),
        (f"clip_g.transformer.text_model.encoder.layers.0.{Q}",),
        (f"text_encoders.clip_l.transformer.text_model.encoder.layers.0.{Q}",),
    ),
    "open-clip": (("transformer.resblocks.0.ln_1.weight", "ln_final.weight", "token_embedding.weight"),),
    "controlnet": (
        ("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"),
        ("controlnet_down_blocks.0.weight", "mid_block.resnets.0.conv1.weight"),
        ("control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"),
        ("module.control_model.input_blocks.0.0.weight",),
        ("input_hint_block.0.weight", "input_blocks.0.0.weight", "zero_convs.0.0.weight"),
        ("controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"),
        ("lora_controlnet", "input_blocks.0.0.up"),
    ),
    "controlnet-lllite": (("lllite_unet_input_blocks_1_1.conditioning1.0.weight", "lllite_unet_x.up.0.weight"),),
    "t2i-adapter": (
        ("body.0.block1.weight", "conv_in.weight"),
        ("adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight"),
        ("body.0.body.0.block1.weight",),
    ),
    "ip-adapter": (
        ("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
        ("image_proj_model.proj.weight", "ip_adapter.1.to_v_ip.weight"),
    ),
    "ip-adapter-faceid": (
        ("image_proj.proj.0.weight", "ip_adapter.0.to_q_lora.down.weight", "ip_adapter.1.to_k_ip.weight"),
    ),
    "photomaker": (("id_encoder.visual_projection.weight", "lora_weights.unet.x.lora.up.weight"),),
    "motion-module": (
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "mid_block.motion_modules.0.x.weight"),
        ("module.up_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight",),
        ("up_blocks.1.motion_modules.0.transformer_blocks.0.attn1.to_q.weight",),
    ),
    "taesd": (
        ("0.weight", "1.conv.0.weight", "3.conv.0.weight"),
        ("encoder.layers.0.weight", "decoder.layers.0.weight", "encoder.layers.1.conv.0.weight"),
        ("taesd_decoder.1.weight", "vae_scale"),
    ),
    "upscaler": (
        ("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"),
        ("conv_first.weight", "body.0.rdb1.conv1.weight"),
        ("RRDB_trunk.0.RDB1.conv1.weight",),
        ("body.0.weight", "body.1.weight"),
        ("layers.0.residual_group.blocks.0.norm1.weight", "patch_embed.norm.weight"),
    ),
    "face-restorer": (
        ("stylegan_decoder.style_mlp.1.weight",),
        ("idx_pred_layer.weight", "position_emb"),
        ("params_ema.idx_pred_layer.1.weight", "params_ema.position_emb"),
    ),
    "hypernetwork": (('[768][0]["linear.0.weight"]', '[320][1]["linear.0.weight"]'),),
    "sdxl-embedding": (("clip_g", "clip_l"),),
    "lora": (
        *((f"lora_unet_down_blocks_0_attentions_0_proj_in.{end}",) for end in LORA_ENDS[:4]),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",),
        ("lycoris_mid_block_attentions_0_proj_in.lora_up.weight",),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight",),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.up.weight",),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",),
        ("base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.default.weight",),
        ("diffusion_model.input_blocks.1.1.proj_in.lora_up.weight", "diffusion_model.input_blocks.1.1.proj_in.alpha"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight",),
        ("diffusion_model.input_blocks.1.1.proj_in.diff_b",),
        ("unet:0:up", "unet:0:down"),
        ("lora_unet_x.lora_up.weight", "bundle_emb.x.string_to_param.*"),
    ),
    "loha": (("lora_unet_mid_block.hada_w1_a",), ("lycoris_mid_block.hada_w2_b",)),
    "lokr": (("lora_unet_mid_block.lokr_w1",),),
    "oft": (("lora_unet_mid_block.oft_blocks",), ("unet.mid_block.attentions.0.proj_in.oft_R.weight",)),
    "ia3": (("lora_unet_mid_block.on_input", "lora_unet_mid_block.weight"),),
    "flux": (
        ("double_blocks.0.img_attn.qkv.weight", "img_in.weight"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight",),
        ("single_transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    ),
    "sd3": (("joint_blocks.0.x_block.attn.qkv.weight",), ("transformer_blocks.0.attn.add_q_proj.weight",)),
    "wan": (("blocks.0.cross_attn.q.weight",), ("model.diffusion_model.blocks.0.cross_attn.q.weight",)),
    "transformer": (("transformer_blocks.0.attn1.to_q.weight", "time_embed.linear.weight"), ("blocks.0.x.weight",)),
    "video-vae": (("encoder.downsamples.0.residual.2.weight", "conv1.weight"), ("encoder.conv_in.conv.weight",)),
}
FILES = [(row, names) for row, files in NAMES.items() for names in files]


@pytest.mark.parametrize(("row", "names"), FILES, ids=[f"{row}-{names[0][:30]}" for row, names in FILES])
def test_every_kind_is_told_by_a_few_names_in_any_spelling(row, names):
    shapes = dict.fromkeys(names, (4, 4))
    found = describe(shapes)
    assert found.family.name == row
    assert found.refusal.count(found.family.title) == 1
    assert ("is an " in found.refusal) == (found.family.title.strip("(")[0] in "AEIOaeio")
    assert any(name in found.evidence[0] for name in names) or "unet." in found.evidence[0]
    with pytest.raises(CheckpointError):
        recognise(shapes)


def test_a_network_of_another_family_is_recognised_whole_without_prefixes():
    names = {name.removeprefix(UNET): shape for name, shape in xl().items() if name.startswith(UNET)}
    assert "label_emb.0.0.weight" in names
    assert describe(names).name == "UNet alone, of Stable Diffusion XL base"


def test_pairs_in_a_list_are_no_hypernetwork():
    assert describe({f"[{index}][1]": (4,) for index in range(1000)}).family is None


@pytest.mark.parametrize(
    ("shapes", "row"),
    [
        ({"<cat>": (768,)}, "embedding"),
        ({"<cat>": (2, 768), "<dog>": (768,)}, "embedding"),
        ({"fc.weight": (10, 768), "fc.bias": (768,)}, None),
        ({"<cat>": (2, 700)}, None),
    ],
)
def test_words_of_their_own_are_textual_inversions_where_their_width_is_that_of_a_text_encoder(shapes, row):
    found = describe(shapes).family
    assert (found and found.name) == row


def test_every_row_that_is_told_by_names_has_a_file_here():
    rows = {row.name for row in (*FIRST, *ADDITIONS)} - {"embedding", "style-adapter", "segmenter", "captioner"}
    assert rows - {"image-encoder"} <= set(NAMES)
    assert len({row.title for row in (*FIRST, *ADDITIONS)}) >= len(rows) - 1
    assert all(row.title[0].isalnum() or row.title.startswith("(IA)") for row in MODELS)


TOWERS = {
    "text_model.embeddings.token_embedding.weight": "text_model.encoder.layers.0.mlp.fc1.weight",
    "token_embedding.weight": "transformer.resblocks.0.ln_1.weight",
    "text_encoder.text_model.embeddings.token_embedding.weight": "text_encoder.text_model.encoder.layers.0.x.weight",
}


@pytest.mark.parametrize("table", TOWERS)
@pytest.mark.parametrize(("width", "owner"), [(1024, "Stable Diffusion 2"), (1280, "Stable Diffusion XL")])
def test_the_text_encoder_of_another_family_is_told_by_its_width(table, width, owner):
    found = describe({table: (49408, width), TOWERS[table]: (width, width)})
    assert "text encoder alone" in found.name
    assert f"{width} wide" in "; ".join(found.evidence)
    assert owner in "; ".join((found.name, *found.evidence))


def test_the_second_text_encoder_of_xl_is_not_taken_for_version_1(tmp_path):
    number = torch.zeros((), dtype=torch.float16)
    state = {
        name: number.expand(tuple(1280 if axis == 768 else axis for axis in shape))
        for name, shape in v1_text_shapes("text_model.").items()
        if ".layers." not in name or ".layers.0." in name
    }
    torch.save(state, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as file, pytest.raises(UnsupportedFileError) as caught:
        read_part(file, "text_encoder")
    assert "1280 wide, the second one of Stable Diffusion XL. Give --only text_encoder_2" in str(caught.value)
    assert "1280 wide: of Stable Diffusion XL base" in "; ".join(inspect(tmp_path / "x.pt").evidence)


def test_a_vae_says_what_tells_its_family_and_what_does_not(tmp_path):
    found = describe({name.removeprefix("first_stage_model."): shape for name, shape in vae_shapes().items()})
    assert found.name == "VAE alone"
    assert "Stable Diffusion 1, 2 and XL have the same shapes" in "; ".join(found.details)
    of_flux = {
        name.removeprefix("first_stage_model."): shape if "decoder.conv_in.w" not in name else (128, 16, 3, 3)
        for name, shape in vae_shapes(32).items()
        if "quant_conv" not in name
    }
    assert "VAE alone, of Stable Diffusion 3, FLUX" in describe(of_flux).name
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in of_flux.items()}, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as file, pytest.raises(UnsupportedFileError, match="have 16 channels"):
        read_part(file, "vae")


@pytest.mark.parametrize("make", [v2, xl, refiner])
def test_a_lora_in_a_whole_checkpoint_does_not_hide_the_model(make):
    shapes = make(width=32, **({"text_widths": (32, 32)} if make is xl else {"text_width": 32}))
    extra = {f"lora_unet_x.{end}": (4, 4) for end in LORA_ENDS}
    assert describe(shapes | extra).family is describe(shapes).family


def test_alone_is_said_only_of_a_network_that_is_alone():
    unet = unet_shapes(SD_V1.unet, 32)
    tables = {"betas": (1000,), "model_ema.decay": (), f"{UNET}x.position_ids": (1, 77), "loss.logvar": ()}
    for shapes, alone in ((unet, True), (unet | tables, True), (unet | {"tower.weight": (2, 2)}, False)):
        assert ("alone" in describe(shapes).name) is alone
        with pytest.raises(CheckpointError) as caught:
            recognise(shapes)
        assert ("tensor of no network, such as tower.weight" in str(caught.value)) is not alone


DIFFUSERS = {  # what the class makes, with its default sizes -> the row
    **{"ControlNetModel": "controlnet", "SD3ControlNetModel": "controlnet", "MotionAdapter": "motion-module"},
    **{"T2IAdapter": "t2i-adapter", "AutoencoderTiny": "taesd", "UNetMotionModel": "animatediff"},
    **{"AutoencoderKLTemporalDecoder": "svd", "UNetSpatioTemporalConditionModel": "svd"},
    **{
        "AutoencoderKLWan": "video-vae",
        "AutoencoderKLCogVideoX": "video-vae",
        "AutoencoderKLHunyuanVideo": "video-vae",
    },
    **{"FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3", "WanTransformer3DModel": "wan"},
    **{"CogVideoXTransformer3DModel": "cogvideo", "PixArtTransformer2DModel": "pixart"},
    **{"AuraFlowTransformer2DModel": "aura-flow", "QwenImageTransformer2DModel": "qwen-image"},
    **{"ZImageTransformer2DModel": "lumina", "HunyuanVideoTransformer3DModel": "hunyuan"},
    **{"LTXVideoTransformer3DModel": "transformer", "MochiTransformer3DModel": "transformer"},
    "StableCascadeUNet": "stable-cascade",
}
TRANSFORMERS = {
    **{"CLIPVisionModelWithProjection": "clip-vision", "CLIPVisionModel": "clip-vision", "CLIPModel": "clip"},
    **{"CLIPTextModel": "text-encoder", "CLIPTextModelWithProjection": "text-encoder", "T5EncoderModel": "t5"},
    **{"LlamaForCausalLM": "language-model", "Qwen2ForCausalLM": "language-model", "GPT2LMHeadModel": "language-model"},
    **{"BertModel": "sequence-model", "WhisperForConditionalGeneration": "sequence-model"},
    **{"Dinov2Model": "image-encoder", "SamModel": "segmenter", "BlipForConditionalGeneration": "captioner"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DIFFUSERS, *TRANSFORMERS])
def test_the_classes_of_diffusers_and_transformers_are_named(name):
    import diffusers
    import transformers

    with torch.device("meta"):
        if name in DIFFUSERS:
            model = getattr(diffusers, name)()
        else:
            kind = getattr(transformers, name)
            model = kind(kind.config_class())
    found = describe({key: tuple(value.shape) for key, value in model.state_dict().items()})
    assert found.family.name == (DIFFUSERS | TRANSFORMERS)[name]


# Files that are told by their first bytes


def zipped(*names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return content.getvalue()


def saved(save, value):
    content = io.BytesIO()
    save(content, value)
    return content.getvalue()


BYTES = {
    "SQLite database, which Draw Things": b"SQLite format 3\0" + bytes(4000),
    "GGUF": b"GGUF\3\0\0\0" + bytes(20),
    "GGML": b"tjgg\3\0\0\0" + bytes(20),
    "ONNX": b"\x08\x07\x12\x07pytorch\x1a\x052.0.1:\x80\x01",
    "ONNX ": b"\x08\x08:\xc2\x01\n\x20",
    "TensorFlow SavedModel": b"\x08\x01\x12\xd2\x05\n\x05serve" + bytes(20),
    "TensorFlow Lite": b"\x1c\0\0\0TFL3" + bytes(20),
    "Core ML": b"\x08\x04\x12\x90\x01\n\x20\n\x05image\x12" + bytes(20),
    "TensorRT": b"ftrt" + bytes(20),
    "MessagePack file, such as Flax": b"\x83\xa7params\x82\xa4unet\x81\xc7",
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(20),
    "single NumPy array": saved(np.save, np.ones(2)),
    "NumPy archive": saved(np.savez, np.ones(2)),
    "zip archive with no checkpoint": zipped("word/document.xml"),
    "zip with model files": zipped("a.safetensors"),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4265380512\n",
    "web page (HTML)": b"\n<!DOCTYPE html><html><title>Sign in</title>",
    "OpenVINO": b'<?xml version="1.0"?>\n<net name="unet" version="11">',
    "XML text": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "picture (SVG)": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "JSON text": b'{"error": "Unauthorized"}',
    "text, not the weights": b"Entry not found",
    "picture (TIFF)": b"II*\0" + bytes(20) + b"\1",
    "picture (AVIF)": b"\0\0\0\x20ftypavif" + bytes(20),
    "video (MP4)": b"\0\0\0\x20ftypisom" + bytes(20),
    "sound (WAV)": b"RIFF\0\0\0\0WAVEfmt " + bytes(20),
    "picture (WebP)": b"RIFF\0\0\0\0WEBPVP8 " + bytes(20),
    "compressed with lz4": b"\x04\x22\x4d\x18" + bytes(20),
}


@pytest.mark.parametrize("words", BYTES)
@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
def test_a_file_of_another_kind_is_named_by_its_first_bytes(tmp_path, words, name):
    if name == "x.safetensors" and BYTES[words].startswith(b"PK"):
        words, content = "is named .safetensors, but is a zip archive", BYTES[words]
    else:
        content = BYTES[words]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, UnsupportedFileError, words.strip())
