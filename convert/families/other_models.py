"""What else people have on their disks: named with the evidence, so that the user knows what to look for.

The names and shapes that tell the families apart come from their original configs (CompVis/stable-diffusion,
Stability-AI/stablediffusion, Stability-AI/generative-models).
"""

from collections.abc import Callable, Mapping

from convert.layouts.names import PREFIXES

Shapes = Mapping[str, tuple[int, ...]]

UNET = PREFIXES["unet"]
TEXT_WIDTHS = (768, 1024, 1280)
PARTS = tuple(PREFIXES.values())
CONV_IN = UNET + "input_blocks.0.0.weight"  # (width, channels that the UNet takes, 3, 3)
CONTEXT = (  # (.., width of a text vector), of the first level that attends to the text: v1 and v2, XL and refiner
    UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
)
LABEL = UNET + "label_emb.0.0.weight"  # (.., width of what the UNet is told beside the text)

# (a part of a name, what the file is), for files without any part of a model. The first that occurs counts.
ADDITIONS = (
    ("control_model.", "a ControlNet, which steers a checkpoint but is none"),
    ("controlnet_cond_embedding.", "a ControlNet, which steers a checkpoint but is none"),
    ("input_hint_block.", "a ControlNet, which steers a checkpoint but is none"),
    ("lora_unet_", "a LoRA, which changes a checkpoint but is none"),
    ("lora_te", "a LoRA, which changes a checkpoint but is none"),
    (".lora_", "a LoRA, which changes a checkpoint but is none"),
    ("_lora.", "a LoRA, which changes a checkpoint but is none"),
    ("hada_w", "a LoHa adapter, which changes a checkpoint but is none"),
    ("lokr_w", "a LoKr adapter, which changes a checkpoint but is none"),
    ("string_to_param", "a textual inversion, which adds a word to a checkpoint but is none"),
    ("emb_params", "a textual inversion, which adds a word to a checkpoint but is none"),
    ("clip_g", "a textual inversion for Stable Diffusion XL, which adds a word to a checkpoint but is none"),
    ("motion_modules.", "a motion module, which adds movement to a checkpoint but is none"),
    ("ip_adapter.", "an IP-Adapter, which adds pictures to a prompt but is no checkpoint"),
    ("text_model.encoder.layers.", "a CLIP text encoder alone"),
    ("self_attn.q_proj.", "a CLIP text encoder alone"),
    ("transformer.resblocks.", "an OpenCLIP model alone"),
)


def other_model(shapes: Shapes) -> tuple[str, str] | None:
    """What a file without a complete v1 model is, and how that is seen; None if nothing of it is known.

    ("a Stable Diffusion 2 inpainting checkpoint", "its tensors have names with 'cond_stage_model.model.' ...")
    """
    for mark, kind in FAMILIES:
        if any(name.startswith(mark) for name in shapes):
            what, more = kind(shapes)
            return what, f"its tensors have names with {mark!r}" + (f" and {more}" if more else "")
    if any(name.startswith(PARTS) for name in shapes):
        return _unet_alone(shapes)
    for mark, what in ADDITIONS:
        if any(mark in name for name in shapes):
            return what, f"its tensors have names with {mark!r}"
    if len(shapes) == 1 and all(shape and shape[-1] in TEXT_WIDTHS and len(shape) <= 2 for shape in shapes.values()):
        (shape,) = shapes.values()
        what = "a textual inversion, which adds a word to a checkpoint but is none"
        return what, f"its one tensor of the shape {list(shape)} has the width of a text vector"
    return None


def _channels(shapes: Shapes) -> int | None:
    return _size(shapes, CONV_IN, 1)


def _size(shapes: Shapes, name: str, axis: int) -> int | None:
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else None


def _takes(channels: int | None) -> str:
    return "" if channels is None else f"its UNet takes {channels} channels"


def _v2(shapes: Shapes) -> tuple[str, str]:
    channels = _channels(shapes)
    kind = {
        5: "a Stable Diffusion 2 depth checkpoint without its depth network",
        7: "a Stable Diffusion x4 upscaler",
        8: "a Stable Diffusion 2 checkpoint for editing pictures",
        9: "a Stable Diffusion 2 inpainting checkpoint",
    }
    # 512-base and 768-v have the same names and shapes, version 2.0 and 2.1 as well
    return kind.get(channels, "a Stable Diffusion 2 checkpoint (512-base or 768-v, 2.0 or 2.1)"), _takes(channels)


def _unclip(shapes: Shapes) -> tuple[str, str]:
    label = _size(shapes, LABEL, 1)
    size = {1536: "-L", 2048: "-H"}.get(label, "")
    told = f"its UNet is told {label} numbers of a picture" if label else ""
    return f"a Stable Diffusion 2.1 unCLIP{size} checkpoint", told


def _xl(shapes: Shapes) -> tuple[str, str]:
    channels = _channels(shapes)
    has_unet = channels is not None
    if "edm_mean" in shapes or "edm_std" in shapes:
        return "a Playground 2.5 checkpoint, of Stable Diffusion XL's build", "with 'edm_mean'"
    if has_unet and not any(name.startswith(UNET + "middle_block.1.") for name in shapes):
        return "a distilled Stable Diffusion XL checkpoint (SSD-1B or Vega)", "its UNet has no middle attention"
    kind = {
        8: "a Stable Diffusion XL checkpoint for editing pictures",
        9: "a Stable Diffusion XL inpainting checkpoint",
    }
    return kind.get(channels, "a Stable Diffusion XL base checkpoint"), _takes(channels)


def _refiner(shapes: Shapes) -> tuple[str, str]:
    return "a Stable Diffusion XL refiner", _takes(_channels(shapes))


FAMILIES: tuple[tuple[str, Callable[[Shapes], tuple[str, str]]], ...] = (  # (what a name begins with, which of them)
    ("depth_model.", lambda shapes: ("a Stable Diffusion 2 depth checkpoint", _takes(_channels(shapes)))),
    ("conditioner.embedders.1.", _xl),
    ("conditioner.embedders.0.model.", _refiner),
    ("conditioner.embedders.", _xl),
    ("embedder.model.", _unclip),
    ("cond_stage_model.model.", _v2),
    ("cond_stage_model.roberta.", lambda shapes: ("an AltDiffusion checkpoint", "")),
    ("cond_stage_model.transformer.layers.", lambda shapes: ("a latent diffusion checkpoint of before CLIP", "")),
    (UNET + "joint_blocks.", lambda shapes: ("a Stable Diffusion 3 checkpoint", "")),
    (UNET + "double_blocks.", lambda shapes: ("a FLUX checkpoint", "")),
    ("joint_blocks.", lambda shapes: ("a Stable Diffusion 3 checkpoint", "")),
    ("double_blocks.", lambda shapes: ("a FLUX checkpoint", "")),
)


def _unet_alone(shapes: Shapes) -> tuple[str, str] | None:
    """A UNet without a text encoder, or with one that does not belong to it: of which family it is."""
    channels = _channels(shapes)
    if channels is None:
        return None
    width = next((size for name in CONTEXT if (size := _size(shapes, name, 1))), None)
    label = _size(shapes, LABEL, 1)
    attends = f"its UNet attends to text vectors {width} wide"
    if width == 1024 and label in (1536, 2048):
        return f"the UNet of a Stable Diffusion 2.1 unCLIP{'-L' if label == 1536 else '-H'} checkpoint", attends
    if width == 1024 and channels == 7:
        return "the UNet of the Stable Diffusion x4 upscaler", f"{attends} and takes 7 channels"
    if width == 1024:
        return "the UNet of a Stable Diffusion 2 checkpoint", attends
    if width == 2048:
        return "the UNet of a Stable Diffusion XL checkpoint", attends
    if width == 1280:
        return "the UNet of a Stable Diffusion XL refiner", attends
    return None
