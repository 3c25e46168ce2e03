"""Files that are not a model: what adds to one, a part of one, or another kind. One row each, as in `table`.

Needed once no model was found in a file.
"""

from convert.families.table import CONTROLNET, FIRST, MODELS, ONE_PART, Family, family_of_pipeline, like, named

LORA = Family(
    name="lora",
    title="LoRA",
    inside=(
        *("lora_unet_", "lora_te", "lora_prior_", "lora_transformer_", "lycoris_", "lora_up.", "lora_down."),
        *("lora_A.", "lora_B.", ".lora_", "_lora.", ".lora.", "dora_scale", ".diff_b\n", ".diff\n"),
        *(":up\n", ":down\n", "bundle_emb."),
    ),
    why_not="It modifies a checkpoint and is not one itself",
    parts={"adapter of the UNet": "lora_unet_", "adapter of the text encoder": "lora_te", "tensors": ""},
)
EMBEDDING = Family(
    name="embedding",
    title="textual inversion",
    starts=("string_to_param", "emb_params", "clip_l\n"),
    why_not="It adds a word to a checkpoint and is not one itself",
    parts={"tensors": ""},
)
TEXT_ENCODER = Family(
    name="text-encoder",
    title="CLIP text encoder",
    starts=("text_model.", "encoder.layers.", "embeddings.token_embedding.", "clip_l.", "clip_g.", "text_encoders."),
    inside=(".text_model.encoder.layers.", ".transformer.text_model."),
    why_not=ONE_PART,
    classes=("CLIPText",),
    parts={"text encoder": ""},
)

IMAGES = "image encoder, such as CLIP's"
PICTURES = "It adds pictures to a prompt and is not a checkpoint"
NO_MODEL = "It makes no pictures from text. Give a checkpoint"
T2I_ADAPTER = ("body.0.block1.", "body.0.in_conv.", "body.0.body.0.", "adapter.body.", "adapter.conv_in.")
HYPERNETWORK = tuple(f"[{width}][0][" for width in (320, 640, 768, 1024, 1280, 2048))  # what its layers change
TAESD = ("1.conv.0.", "3.conv.0.", "encoder.layers.0.weight", "decoder.layers.0.weight", "taesd_")
TAESD += ("encoder.1.conv.0.", "decoder.3.conv.0.", "tiny_vae.")
TINY = "It decodes the latents of a checkpoint: give it with --tiny-vae FILE, and the checkpoint with -m FILE"
UPSCALER_NAMES = (  # ESRGAN of three kinds, SRVGG, SwinIR, SPAN, DAT and HAT
    *("model.1.sub.", "RRDB_trunk.", "body.0.rdb1.", "body.0.weight", "layers.0.residual_group.", "block_1.c1_r."),
    *("params_ema.", "conv_first.", "sub_mean.", "module.body."),
)
FACES = (".stylegan_decoder.", ".idx_pred_layer.", ".generator.blocks.")
LANGUAGE = (  # of transformers, of Meta, of llama.cpp; GPT-2, NeoX, BLOOM, Mamba
    *("model.layers.", "model.embed_tokens.", "lm_head.", "language_model.", "model.language_model."),
    *(
        "layers.0.attention.wq.",
        "layers.0.self_attn.",
        "embed_tokens.",
        "tok_embeddings.",
        "blk.",
        "token_embd.",
        "h.0.attn.",
        "wte.",
        "transformer.h.",
    ),
    *("transformer.wte.", "gpt_neox.", "backbone.layers.", "transformer.word_embeddings."),
)
SEQUENCE = ("bert.", "roberta.", "encoder.layer.", "embeddings.word_embeddings.", "model.encoder.", "model.decoder.")
ADDITIONS = (  # files that are not a model of their own, in the order in which they are looked for
    named(
        *("safety-checker", "safety checker", "It looks at finished pictures. Give a checkpoint"),
        *("concept_embeds", "special_care_embeds", "vision_model.vision_model."),
        classes=("StableDiffusionSafetyChecker",),
    ),
    named("ip-adapter-faceid", "IP-Adapter FaceID", PICTURES, *(f"ip_adapter.{index}.to_q_lora." for index in (0, 1))),
    named("ip-adapter", "IP-Adapter", PICTURES, "ip_adapter.", "image_proj.", "image_proj_model."),
    named("photomaker", "PhotoMaker or PuLID adapter", PICTURES, "id_encoder.", "pulid_", "id_adapter."),
    named("hypernetwork", "hypernetwork", LORA.why_not, *HYPERNETWORK),
    like(LORA, "loha", "LoHa adapter", inside=("hada_w",)),
    like(LORA, "lokr", "LoKr adapter", inside=("lokr_w",)),
    like(LORA, "oft", "OFT adapter", inside=("oft_blocks", "oft_diag", ".oft_R", ".oft_r", "boft_")),
    like(LORA, "ia3", "(IA)³ adapter", inside=(".on_input", ".ia3_l")),
    LORA,
    like(EMBEDDING, "sdxl-embedding", "textual inversion for Stable Diffusion XL", starts=("clip_g\n",)),
    EMBEDDING,
    named(
        *("motion-module", "motion module", "It adds movement to a checkpoint and is not one itself"),
        inside=("motion_modules.", ".temporal_transformer."),
        classes=("MotionAdapter",),
    ),
    named("t2i-adapter", "T2I-Adapter", CONTROLNET.why_not, *T2I_ADAPTER, classes=("T2IAdapter", "MultiAdapter")),
    named("style-adapter", "T2I style adapter", CONTROLNET.why_not, "style_embedding", "transformer_layes."),
    named("taesd", "TAESD, a tiny VAE", TINY, *TAESD, classes=("AutoencoderTiny",)),
    named("face-restorer", "face restorer", NO_MODEL, inside=FACES),
    named("upscaler", "picture upscaler, such as ESRGAN", NO_MODEL, *UPSCALER_NAMES),
    named("segmenter", "segmentation model", NO_MODEL, "image_encoder.blocks.", "mask_decoder.", "vision_encoder."),
    named("captioner", "captioning model", NO_MODEL, "visual_encoder.", "text_decoder.", "qformer."),
    named(
        "t5",
        "T5 text encoder",
        ONE_PART,
        "enc.blk.",
        inside=(".SelfAttention.q.", ".DenseReluDense."),
        classes=("T5", "UMT5", "MT5"),
    ),
    named(
        "language-model", "language model", NO_MODEL, *LANGUAGE, classes=("Llama", "GPT2", "Qwen", "Gemma", "Mistral")
    ),
    named(
        "clip-vision",
        IMAGES,
        NO_MODEL,
        "vision_model.",
        "embeddings.class_embedding",
        lacks="text_model.",
        classes=("CLIPVision",),
    ),
    named("clip-vision", IMAGES, NO_MODEL, "visual.", lacks="transformer.resblocks."),
    named("image-encoder", IMAGES, NO_MODEL, "embeddings.patch_embedding", "embeddings.cls_token"),
    named(
        "clip",
        "whole CLIP model, with text and image encoder",
        ONE_PART,
        "vision_model.",
        "visual.",
        classes=("CLIPModel",),
    ),
    named("sequence-model", "language or speech model", NO_MODEL, *SEQUENCE, classes=("Bert", "Roberta", "XLMRoberta")),
    TEXT_ENCODER,
    like(TEXT_ENCODER, "open-clip", "OpenCLIP text encoder", starts=(), inside=("transformer.resblocks.",)),
    named(
        *(
            "transformer",
            "transformer of another family of models",
            "Only Stable Diffusion 1, 2 and XL models can be used",
        ),
        *("transformer_blocks.", "blocks.0.", "visual_transformer_blocks.", "net.blocks.", "layers.0."),
        *(
            "model.diffusion_model.transformer_blocks.",
            "model.diffusion_model.blocks.",
            "model.diffusion_model.layers.",
        ),
    ),
)


def family_of_class(name: str) -> Family | None:
    """The row that the class of a network belongs to, by its name in a config.json; None for classes not known here."""
    rows = (*MODELS, *FIRST, *ADDITIONS)
    return next((row for row in rows if name.startswith(row.classes)), None) or family_of_pipeline(name)
