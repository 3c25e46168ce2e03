"""Every family of files that people own, one row each: how to tell it, and what can be done with it.

Loading, `sd inspect`, `sd convert` and every refusal read these rows; `convert.families.recognition` applies them.
Names and shapes come from the original configs (CompVis/stable-diffusion, Stability-AI/stablediffusion,
Stability-AI/generative-models).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from convert.errors import joined
from convert.layouts.names import OPEN_CLIP, PREFIXES, SECOND_TEXT, generation
from sd.config import (
    SD_V1,
    SD_V1_DEPTH,
    SD_V1_EDIT,
    SD_V1_INPAINTING,
    SD_V2,
    SD_V2_DEPTH,
    SD_V2_EDIT,
    SD_V2_INPAINTING,
    SDXL,
    SDXL_INPAINTING,
    SDXL_REFINER,
    ModelConfig,
)

ANY_TASK = ("text to picture", "image to image", "inpainting")  # of a UNet with 4 channels
TASKS = {  # -> the command for it, and the channels that its UNet takes
    "text to picture": ("txt2img", "4"),
    "image to image": ("img2img", "4"),
    "inpainting": ("inpaint", "4 or 9"),
    "editing": ("edit", "8"),
    "depth to image": ("depth2img", "5"),
}
CHANNELS = {  # that a UNet takes -> what they are
    4: "latents",
    5: "latents and a depth map",
    7: "latents and a small picture",
    8: "latents, and the latents of a picture to edit",
    9: "latents, a mask and masked latents",
}
NOT_YET = "This family is not supported yet; only Stable Diffusion 1, 2 and XL models can be used"
UNET, VAE = PREFIXES["unet"], PREFIXES["vae"]
XL_TEXT = "conditioner.embedders."
V1_PARTS = {"UNet": UNET, "VAE": VAE, "text encoder": "cond_stage_model."}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row. A condition that is left out holds for every file; the first row whose conditions all hold counts."""

    name: str  # as in a config: "sd-v1-inpainting"
    title: str  # for a reader: "Stable Diffusion 1 inpainting"
    # how to tell it
    starts: tuple[str, ...] = ()  # some name starts with one of these ("clip_g\n": is that)
    inside: tuple[str, ...] = ()  # or has one of these in it; a dot in front is also the beginning
    lacks: str = ""  # no name starts with this
    context: int | None = None  # width of the text vectors; tells the family where the names do not
    channels: int | None = None  # that the UNet takes
    label: int | None = None  # width of the vector that the UNet gets beside the text; tells like the context
    latents: int | None = None  # channels of the VAE's latents; tells what a VAE alone is for
    pipeline: str = ""  # how the name of diffusers' class for it starts
    classes: tuple[str, ...] = ()  # how the names of its networks' classes start, in folders of their own
    # what can be done with it
    config: ModelConfig | None = None  # None: recognised, and refused
    why_not: str = NOT_YET  # without a config: the sentence that refuses it
    tasks: tuple[str, ...] = ()  # that its channels allow
    native_sizes: Mapping[str, int] = field(default_factory=dict)  # by prediction, where the config's is not everyone's
    averaged: bool = False  # the averaged weights are used where a file has both
    prediction: str = "eps"  # of the UNet unless the file says otherwise; "" where neither names nor shapes tell
    parts: Mapping[str, str] = field(default_factory=lambda: V1_PARTS)  # in words -> what their names start with


def like(row: Family, name: str, title: str, **changes: object) -> Family:
    """Another row, with what it does not share with its relative."""
    return replace(row, name=name, title=title, **changes)


V1 = Family(
    name="sd-v1",
    title="Stable Diffusion 1",
    starts=("cond_stage_model.transformer.text_model.", "text_encoder.layers."),  # the original layout and ours
    lacks=OPEN_CLIP,
    context=768,
    channels=4,
    pipeline="StableDiffusionPipeline",
    config=SD_V1,
    tasks=ANY_TASK,
)
V2 = Family(
    name="sd-v2",  # 512-base and 768-v, 2.0 and 2.1: the same names and shapes
    title="Stable Diffusion 2",
    starts=(OPEN_CLIP, "cond_stage_model.transformer.text_model."),  # and as diffusers names it
    context=1024,
    channels=4,
    config=SD_V2,
    pipeline="StableDiffusionPipeline",
    tasks=ANY_TASK,
    native_sizes={"eps": 512},
    prediction="",
)
V2_TOLD = replace(V2, config=None, pipeline="")  # relatives that are recognised, and refused
UNCLIP_PARTS = V1_PARTS | {"image encoder": "embedder."}
UNCLIP = {"starts": ("embedder.model.",), "tasks": (), "prediction": "v", "parts": UNCLIP_PARTS}
UNCLIP |= {
    "why_not": "It makes variations of a picture, which is not supported; a plain Stable Diffusion 2.1 can be used"
}
DEPTH = {"channels": 5, "tasks": ("depth to image",), "pipeline": "StableDiffusionDepth2ImgPipeline"}
DEPTH |= {"parts": V1_PARTS | {"depth network": "depth_model."}}
V2_DEPTH = DEPTH | {"config": SD_V2_DEPTH, "native_sizes": {}, "prediction": "eps"}
XL = Family(
    name="sdxl",
    title="Stable Diffusion XL base",
    starts=(XL_TEXT,),
    context=2048,
    channels=4,
    label=2816,
    pipeline="StableDiffusionXL",
    config=SDXL,
    tasks=ANY_TASK,
    parts={"UNet": UNET, "VAE": VAE, "text encoder 1": XL_TEXT + "0.", "text encoder 2": XL_TEXT + "1."},
)
XL_MARKED = replace(XL, context=None, pipeline="")  # XL, but for what some tensors say: see `layouts.noise_levels`
XL_BUILD = replace(XL, context=None, config=None, pipeline="")  # built like XL and recognised by names alone
REFINER = {"starts": (XL_TEXT + "0.model.",), "lacks": XL_TEXT + "1.", "context": 1280, "label": 2560}
REFINER |= {"config": SDXL_REFINER, "pipeline": "StableDiffusionXLImg2ImgPipeline"}
REFINER |= {"parts": {"UNet": UNET, "VAE": VAE, "text encoder": XL_TEXT + "0."}}
INPAINTING = {"channels": 9, "tasks": ("inpainting",)}
EDIT = {"channels": 8, "tasks": ("editing",), "averaged": True}
V1_INPAINTING = INPAINTING | {"pipeline": "StableDiffusionInpaintPipeline", "config": SD_V1_INPAINTING}
V2_INPAINTING = INPAINTING | {"pipeline": "StableDiffusionInpaintPipeline", "config": SD_V2_INPAINTING}
XL_INPAINTING = INPAINTING | {"pipeline": "StableDiffusionXLInpaintPipeline", "config": SDXL_INPAINTING}
XL_EDIT = EDIT | {"pipeline": "StableDiffusionXLInstructPix2PixPipeline", "config": None}
V1_EDIT = EDIT | {"pipeline": "StableDiffusionInstructPix2PixPipeline", "config": SD_V1_EDIT}
V2_EDIT = V1_EDIT | {"config": SD_V2_EDIT}
UPSCALER = {"channels": 7, "pipeline": "StableDiffusionUpscale", "tasks": (), "prediction": "v"}
UPSCALER |= {"why_not": "It enlarges pictures, which is not supported; --hires enlarges with a plain Stable Diffusion"}


def other(name: str, title: str, *names: str, **conditions: object) -> Family:
    """A family without anything in common with Stable Diffusion 1: told by names, under any prefix."""
    inside = tuple(f".{each}" for each in names)
    return Family(name=name, title=title, inside=inside, parts={"tensors": ""}, **conditions)


OTHERS = (  # transformers, cascades and video models
    other("hunyuan", "HunyuanVideo or HunyuanImage", "double_blocks.0.img_attn_qkv.", "token_refiner."),
    other("hidream", "HiDream", "double_stream_blocks.0."),
    other("aura-flow", "AuraFlow", "double_layers.0.", "joint_transformer_blocks.0.", pipeline="AuraFlow"),
    other("chroma", "Chroma", "distilled_guidance_layer.", pipeline="Chroma"),
    other("flux", "FLUX", "double_blocks.0.", "single_blocks.0.", "single_transformer_blocks.0.", pipeline="Flux"),
    other("qwen-image", "Qwen-Image", "transformer_blocks.0.img_mod.", pipeline="QwenImage"),
    other(
        *("sd3", "Stable Diffusion 3", "joint_blocks.0.", "transformer_blocks.0.attn.add_q_proj."),
        pipeline="StableDiffusion3",
        classes=("SD3",),
    ),
    other("wan", "Wan", "blocks.0.cross_attn.", "condition_embedder.time_proj.", pipeline="Wan"),
    other("ltx", "LTX-Video", "patchify_proj.", pipeline="LTX"),
    other("cogvideo", "CogVideo or CogView", "patch_embed.text_proj.", "mixins.patch_embed.", pipeline="CogVideo"),
    other("mochi", "Mochi", "t5_y_embedder.", pipeline="Mochi"),
    other("cosmos", "Cosmos", "blocks.block0.", pipeline="Cosmos"),
    other("hunyuan-dit", "Hunyuan-DiT", "mlp_t5.", "text_embedding_padding", pipeline="HunyuanDiT"),
    other(
        "pixart", "PixArt, Sana or Allegro", "adaln_single.", "y_embedder.y_proj.", "t_block.1.", "caption_norm.weight"
    ),
    other("lumina", "Lumina or Z-Image", "cap_embedder.", "time_caption_embed.", pipeline="Lumina"),
    other("dit", "DiT", "blocks.0.adaLN_modulation.", "transformer_blocks.0.norm1.emb.class_embedder.", pipeline="DiT"),
    other(
        "stable-cascade",
        "Stable Cascade",
        "clip_txt_pooled_mapper.",
        "clip_txt_mapper.",
        "effnet_mapper.",
        "clip_mapper.",
    ),
    other("stable-audio", "Stable Audio", "pretransform.model.", "to_timestep_embed."),
    other("kandinsky", "Kandinsky or Kolors", "encoder_hid_proj.", "add_embedding.image_proj.", pipeline="Kandinsky"),
    other("deepfloyd", "DeepFloyd IF", "add_embedding.pool.", "encoder_pooling.", pipeline="IFPipeline"),
    *(
        Family(name=name, title=title, inside=inside, pipeline=pipeline)
        for name, title, inside, pipeline in (
            ("svd", "Stable Video Diffusion", (".time_stack.", ".time_mixer.", ".temporal_res_block."), "StableVideo"),
            ("text-to-video", "text-to-video", (".temp_convs.", ".temp_attentions."), "TextToVideo"),
            ("animatediff", "AnimateDiff", (".motion_modules.",), "AnimateDiff"),
        )
    ),
)
MODELS = (
    *OTHERS,
    V1,
    like(V1, "sd-v1-inpainting", "Stable Diffusion 1 inpainting", **V1_INPAINTING),
    like(V1, "sd-v1-edit", "Stable Diffusion 1 edit (InstructPix2Pix)", **V1_EDIT),
    like(V1, "sd-v1-depth", "Stable Diffusion 1 depth", config=SD_V1_DEPTH, **DEPTH),
    like(V2, "sd-v2-depth", "Stable Diffusion 2 depth", starts=("depth_model.",), **V2_DEPTH),
    like(V2_TOLD, "sd-v2-unclip-l", "Stable Diffusion 2.1 unCLIP-L", label=1536, **UNCLIP),
    like(V2_TOLD, "sd-v2-unclip-h", "Stable Diffusion 2.1 unCLIP-H", label=2048, **UNCLIP),
    like(V2_TOLD, "sd-v2-unclip", "Stable Diffusion 2.1 unCLIP", context=None, pipeline="StableUnCLIP", **UNCLIP),
    V2,
    like(V2, "sd-v2-inpainting", "Stable Diffusion 2 inpainting", prediction="eps", **V2_INPAINTING),
    like(V2, "sd-v2-depth", "Stable Diffusion 2 depth (without its depth network)", **V2_DEPTH),
    like(V2, "sd-v2-edit", "Stable Diffusion 2 edit (InstructPix2Pix)", **V2_EDIT),
    like(V2_TOLD, "sd-x4-upscaler", "Stable Diffusion x4 upscaler", **UPSCALER),
    like(XL_MARKED, "playground-v2.5", "Playground 2.5 (built like SDXL)", starts=("edm_mean", "edm_std")),
    like(XL_MARKED, "cosxl", "CosXL (built like SDXL)", starts=("edm_vpred.",)),
    like(
        XL_BUILD,
        "sdxl-distilled",
        "distilled Stable Diffusion XL (SSD-1B or Vega)",
        starts=(XL_TEXT + "1.",),
        lacks=UNET + "middle_block.1.",
    ),
    like(XL, "sdxl-refiner", "Stable Diffusion XL refiner", **REFINER),
    XL,
    like(XL, "sdxl-inpainting", "Stable Diffusion XL inpainting", **XL_INPAINTING),
    like(XL, "sdxl-edit", "Stable Diffusion XL edit", **XL_EDIT),
    Family(name="alt-diffusion", title="AltDiffusion", starts=("cond_stage_model.roberta.",), pipeline="AltDiffusion"),
    Family(name="ldm", title="latent diffusion (before CLIP)", starts=("cond_stage_model.transformer.layers.",)),
    Family(name="latent-upscaler", title="latent upscaler", pipeline="StableDiffusionLatentUpscale"),
    Family(name="image-variations", title="image variations", pipeline="StableDiffusionImageVariation"),
    # not told by names or by their UNets: a VAE alone
    Family(name="latents-16", title="Stable Diffusion 3, FLUX or Qwen-Image", latents=16),
    Family(name="latents-32", title="FLUX.2, Sana or another new", latents=32),
    Family(name="latents-other", title="latent diffusion or VQ", inside=("quantize.embedding.",)),
)
TEXT_WIDTHS = {row.context: row for row in reversed(MODELS) if row.context in (768, 1024)}
TEXT_WIDTHS[1280] = XL  # of a text encoder's vectors -> whose that is

ONE_PART = "Use a complete checkpoint"
CONTROLNET = Family(
    name="controlnet",
    title="ControlNet",
    starts=(
        *("control_model.", "input_hint_block.", "controlnet_cond_embedding.", "controlnet_down_blocks."),
        *("controlnet_mid_block.", "controlnet_blocks.", "controlnet_x_embedder.", "lora_controlnet"),
    ),
    lacks=UNET + "output_blocks.",  # of a whole UNet beside it
    pipeline="StableDiffusionControlNet",
    classes=("ControlNet", "SparseControlNet"),
    why_not="It steers a checkpoint and is not one itself",
    parts={"ControlNet": ""},
)


def named(name: str, title: str, why_not: str, *starts: str, **conditions: object) -> Family:
    """Another kind of file, told by how some name in it starts."""
    return Family(name=name, title=title, why_not=why_not, starts=starts, parts={"tensors": ""}, **conditions)


VIDEO_VAE = named(
    *("video-vae", "VAE of a video model", ONE_PART, "encoder.downsamples.", "decoder.upsamples."),
    inside=("coder.conv_in.conv.", "coder.norm_out.gamma", ".time_conv."),
    lacks=UNET,
    classes=("AutoencoderKLTemporal", "AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderKLLTX"),
)
FIRST = (  # told before a model is looked for: their names are partly those of a network
    named("controlnet-lllite", "ControlNet-LLLite", CONTROLNET.why_not, inside=("lllite_",), lacks=UNET),
    CONTROLNET,
    VIDEO_VAE,
)


def row_named(name: str | None) -> Family | None:
    """The row of a family whose models can be loaded; None for others."""
    return next((row for row in MODELS if row.name == name and row.config), None)


def with_open_clip(shapes: Mapping[str, tuple[int, ...]]) -> Family | None:
    """The row of a model of version 2 or XL by what its UNet takes, where its widths need not tell the version."""
    channels = shapes.get(UNET + "input_blocks.0.0.weight", ())[1:2]
    built = any(name.startswith(SECOND_TEXT[1]) for name in shapes), UNET + "label_emb.0.0.weight" in shapes
    rows = (row for row in MODELS if row.config and generation(row.config).linear and (row.channels,) == channels)
    parts = ((row, (bool(row.config.text_encoder_2), bool(row.config.unet.vector_width))) for row in rows)
    return next((row for row, there in parts if there == built), None)


def family_named(name: str) -> Family:
    """The row of a config's family. Raises KeyError."""
    if row := row_named(name):
        return row
    raise KeyError(name)


def family_of_pipeline(pipeline: str) -> Family | None:
    """The row of a diffusers pipeline, by the name of its class; None for classes not known here."""
    rows = (row for row in (*MODELS, CONTROLNET) if row.pipeline and pipeline.startswith(row.pipeline))
    return max(rows, key=lambda row: len(row.pipeline), default=None)


def refusal(row: Family, evidence: Iterable[str], part: str | None = None) -> str:
    """Why a file of this kind cannot be loaded, in a sentence whose subject is the file.

    part  the only network that is there, in words
    """
    kind = f"{row.title} checkpoint" if row in MODELS else row.title
    owner = f"the {part} of " if part and row in MODELS else ""
    article = "an" if kind.strip("(")[0] in "AEIOUaeio" else "a"
    return f"is {owner}{article} {kind}: {'; '.join(evidence)}. {row.why_not}."


def task_refusal(config: ModelConfig, task: str | None) -> str | None:
    """Why a model cannot do a task, one of TASKS, in a sentence; None where it can. Without a task: any of them."""
    family = family_named(config.family)
    if task is None or task in family.tasks:
        return None
    channels = config.unet.in_channels
    use = joined([f"sd {TASKS[each][0]}" for each in family.tasks], "or")
    return (
        f"this is an {config.family} checkpoint: its UNet takes {channels} channels ({CHANNELS[channels]}). Use it "
        f"with {use}. {task[0].upper()}{task[1:]} needs a checkpoint whose UNet takes {TASKS[task][1]}."
    )
