"""Every family of files that people own, one row each: how to tell it, and what can be done with it.

Loading, `sd inspect`, `sd convert` and every refusal read these rows; `convert.families.recognition` applies them.
Names and shapes come from the original configs (CompVis/stable-diffusion, Stability-AI/stablediffusion,
Stability-AI/generative-models).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from convert.layouts.names import PREFIXES
from sd.config import SD_V1, SD_V1_EDIT, SD_V1_INPAINTING, ModelConfig

ANY_TASK = ("text to picture", "image to image", "inpainting")
CHANNELS = {  # that a UNet takes -> what they are
    4: "latents",
    5: "latents and a depth map",
    7: "latents and a small picture",
    8: "latents, and the latents of a picture to edit",
    9: "latents, a mask and masked latents",
}
NOT_YET = "This family is not supported yet; only Stable Diffusion 1 models can be used"
UNET, VAE = PREFIXES["unet"], PREFIXES["vae"]
XL_TEXT = "conditioner.embedders."
V1_PARTS = {"UNet": UNET, "VAE": VAE, "text encoder": "cond_stage_model."}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row. A condition that is left out holds for every file; the first row whose conditions all hold counts."""

    name: str  # as in a config: "sd-v1-inpainting"
    title: str  # for a reader: "Stable Diffusion 1 inpainting"
    # how to tell it
    starts: tuple[str, ...] = ()  # some name starts with one of these
    inside: tuple[str, ...] = ()  # or has one of these in it
    lacks: str = ""  # no name starts with this
    context: int | None = None  # width of the text vectors; tells the family where the names do not
    channels: int | None = None  # that the UNet takes
    label: int | None = None  # width of the vector that the UNet gets beside the text
    pipeline: str = ""  # how the name of diffusers' class for it starts
    # what can be done with it
    config: ModelConfig | None = None  # None: recognised, and refused
    why_not: str = NOT_YET  # without a config: the sentence that refuses it
    tasks: tuple[str, ...] = ()  # that its channels allow
    prediction: str = "eps"  # of the UNet unless the file says otherwise; "" where neither names nor shapes tell
    parts: Mapping[str, str] = field(default_factory=lambda: V1_PARTS)  # in words -> what their names start with


def like(row: Family, name: str, title: str, **changes: object) -> Family:
    """Another row, with what it does not share with its relative."""
    return replace(row, name=name, title=title, **changes)


V1 = Family(
    name="sd-v1",
    title="Stable Diffusion 1",
    starts=("cond_stage_model.transformer.text_model.", "text_encoder.layers."),  # the original layout and ours
    context=768,
    channels=4,
    pipeline="StableDiffusionPipeline",
    config=SD_V1,
    tasks=ANY_TASK,
)
V2 = Family(
    name="sd-v2",  # 512-base and 768-v, 2.0 and 2.1: the same names and shapes
    title="Stable Diffusion 2",
    starts=("cond_stage_model.model.",),
    context=1024,
    channels=4,
    tasks=ANY_TASK,
    prediction="",
)
UNCLIP_PARTS = V1_PARTS | {"image encoder": "embedder."}
UNCLIP = {"starts": ("embedder.model.",), "tasks": (), "prediction": "v", "parts": UNCLIP_PARTS}
DEPTH = {"starts": ("depth_model.",), "channels": 5, "parts": V1_PARTS | {"depth network": "depth_model."}}
XL = Family(
    name="sdxl",
    title="Stable Diffusion XL base",
    starts=(XL_TEXT,),
    context=2048,
    channels=4,
    label=2816,
    pipeline="StableDiffusionXL",
    tasks=ANY_TASK,
    parts={"UNet": UNET, "VAE": VAE, "text encoder 1": XL_TEXT + "0.", "text encoder 2": XL_TEXT + "1."},
)
XL_BUILD = replace(XL, context=None, pipeline="")  # built like XL and recognised by names alone
REFINER = {"starts": (XL_TEXT + "0.model.",), "lacks": XL_TEXT + "1.", "context": 1280, "label": 2560, "pipeline": ""}
REFINER |= {"tasks": ("image to image",), "parts": {"UNet": UNET, "VAE": VAE, "text encoder": XL_TEXT + "0."}}
INPAINTING = {"channels": 9, "tasks": ("inpainting",)}
EDIT = {"channels": 8, "tasks": ()}
V1_INPAINTING = INPAINTING | {"pipeline": "StableDiffusionInpaintPipeline", "config": SD_V1_INPAINTING}
V1_EDIT = EDIT | {"pipeline": "StableDiffusionInstructPix2PixPipeline", "config": SD_V1_EDIT}
UPSCALER = {"channels": 7, "pipeline": "StableDiffusionUpscale", "tasks": (), "prediction": "v"}
MODELS = (
    V1,
    like(V1, "sd-v1-inpainting", "Stable Diffusion 1 inpainting", **V1_INPAINTING),
    like(V1, "sd-v1-edit", "Stable Diffusion 1 edit (InstructPix2Pix)", **V1_EDIT),
    like(V2, "sd-v2-depth", "Stable Diffusion 2 depth", pipeline="StableDiffusionDepth", prediction="eps", **DEPTH),
    like(V2, "sd-v2-unclip-l", "Stable Diffusion 2.1 unCLIP-L", label=1536, pipeline="StableUnCLIP", **UNCLIP),
    like(V2, "sd-v2-unclip-h", "Stable Diffusion 2.1 unCLIP-H", label=2048, **UNCLIP),
    V2,
    like(V2, "sd-v2-inpainting", "Stable Diffusion 2 inpainting", prediction="eps", **INPAINTING),
    like(V2, "sd-v2-depth", "Stable Diffusion 2 depth (without its depth network)", channels=5, tasks=()),
    like(V2, "sd-v2-edit", "Stable Diffusion 2 edit", **EDIT),
    like(V2, "sd-x4-upscaler", "Stable Diffusion x4 upscaler", **UPSCALER),
    like(XL_BUILD, "playground-v2.5", "Playground 2.5, built like SDXL", starts=("edm_mean", "edm_std")),
    like(
        XL_BUILD,
        "sdxl-distilled",
        "distilled Stable Diffusion XL (SSD-1B or Vega)",
        starts=(XL_TEXT + "1.",),
        lacks=UNET + "middle_block.1.",
    ),
    like(XL, "sdxl-refiner", "Stable Diffusion XL refiner", **REFINER),
    XL,
    like(XL, "sdxl-inpainting", "Stable Diffusion XL inpainting", **INPAINTING),
    like(XL, "sdxl-edit", "Stable Diffusion XL edit", **EDIT),
    Family(name="alt-diffusion", title="AltDiffusion", starts=("cond_stage_model.roberta.",), pipeline="AltDiffusion"),
    Family(name="ldm", title="latent diffusion (before CLIP)", starts=("cond_stage_model.transformer.layers.",)),
    Family(
        name="sd3",
        title="Stable Diffusion 3",
        starts=(UNET + "joint_blocks.", "joint_blocks."),
        pipeline="StableDiffusion3",
    ),
    Family(name="flux", title="FLUX", starts=(UNET + "double_blocks.", "double_blocks."), pipeline="Flux"),
    Family(name="latent-upscaler", title="latent upscaler", pipeline="StableDiffusionLatentUpscale"),
    Family(name="image-variations", title="image variations", pipeline="StableDiffusionImageVariation"),
)

ONE_PART = "Use a complete checkpoint"
MOVES = "It adds movement to a checkpoint and is not one itself"
SHOWS = "It adds pictures to a prompt and is not a checkpoint"
CONTROLNET = Family(
    name="controlnet",
    title="ControlNet",
    starts=("control_model.", "input_hint_block.", "controlnet_cond_embedding."),
    lacks=UNET + "output_blocks.",  # of a whole UNet beside it
    pipeline="StableDiffusionControlNet",
    why_not="It steers a checkpoint and is not one itself",
    parts={"ControlNet": ""},
)
LORA = Family(
    name="lora",
    title="LoRA",
    inside=("lora_unet_", "lora_te", ".lora_", "_lora.", ".lora."),
    why_not="It modifies a checkpoint and is not one itself",
    parts={"adapter of the UNet": "lora_unet_", "adapter of the text encoder": "lora_te", "tensors": ""},
)
EMBEDDING = Family(
    name="embedding",
    title="textual inversion",
    starts=("string_to_param", "emb_params", "clip_l"),
    why_not="It adds a word to a checkpoint and is not one itself",
    parts={"tensors": ""},
)
TEXT_ENCODER = Family(
    name="text-encoder",
    title="CLIP text encoder alone",
    inside=("text_model.encoder.layers.", "self_attn.q_proj."),
    why_not=ONE_PART,
    parts={"text encoder": ""},
)
T2I_ADAPTER = ("body.0.block1.", "body.0.in_conv.", "adapter.body.")
HYPERNETWORK = tuple(f"[{width}][" for width in (320, 640, 768, 1024, 1280, 2048))  # what its layers change
TAESD = ("1.conv.0.", "3.conv.0.", "encoder.layers.0.weight", "decoder.layers.0.weight", "taesd_")
ADDITIONS = (  # files that are not a model of their own
    like(LORA, "loha", "LoHa adapter", inside=("hada_w",)),
    like(LORA, "lokr", "LoKr adapter", inside=("lokr_w",)),
    LORA,
    like(EMBEDDING, "sdxl-embedding", "textual inversion for Stable Diffusion XL", starts=("clip_g",)),
    EMBEDDING,
    like(EMBEDDING, "hypernetwork", "hypernetwork", starts=HYPERNETWORK, why_not=LORA.why_not),
    like(EMBEDDING, "motion-module", "motion module", starts=(), inside=("motion_modules.",), why_not=MOVES),
    like(EMBEDDING, "ip-adapter", "IP-Adapter", starts=("ip_adapter.",), why_not=SHOWS),
    like(EMBEDDING, "t2i-adapter", "T2I-Adapter", starts=T2I_ADAPTER, why_not=CONTROLNET.why_not),
    like(EMBEDDING, "taesd", "TAESD, a tiny VAE", starts=TAESD, why_not=ONE_PART),
    TEXT_ENCODER,
    like(TEXT_ENCODER, "open-clip", "OpenCLIP model alone", inside=("transformer.resblocks.",)),
)


def family_named(name: str) -> Family:
    """The row of a config's family. Raises KeyError."""
    return {row.name: row for row in MODELS if row.config}[name]


def family_of_pipeline(pipeline: str) -> Family | None:
    """The row of a diffusers pipeline, by the name of its class; None for classes not known here."""
    return next((row for row in (*MODELS, CONTROLNET) if row.pipeline and pipeline.startswith(row.pipeline)), None)


def task_refusal(config: ModelConfig, task: str) -> str | None:
    """Why a model cannot do a task, one of ANY_TASK, in a sentence; None where it can."""
    family = family_named(config.family)
    if task in family.tasks:
        return None
    channels = config.unet.in_channels
    use = " Use it with sd inpaint." if family.tasks else ""
    return (
        f"this is an {config.family} checkpoint: its UNet takes {channels} channels ({CHANNELS[channels]}).{use} "
        f"{task[0].upper()}{task[1:]} needs a checkpoint whose UNet takes 4."
    )
