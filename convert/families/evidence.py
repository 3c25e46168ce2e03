"""What a set of tensors is, told from names and shapes: also where it is nothing that can be loaded.

`convert.families.family` decides what is loaded; this only describes, and says what each conclusion rests on.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from convert.errors import counted
from convert.layouts.names import PREFIXES

Shapes = Mapping[str, tuple[int, ...]]

UNET = PREFIXES["unet"]
# (what some name starts with, what it says); the first that occurs decides
FAMILIES = (
    ("depth_model.", "Stable Diffusion 2 depth"),
    ("conditioner.embedders.1.", "Stable Diffusion XL"),
    ("conditioner.embedders.0.model.", "Stable Diffusion XL refiner"),
    ("embedder.model.", "Stable Diffusion 2.1 unCLIP"),
    ("cond_stage_model.model.", "Stable Diffusion 2"),
    ("cond_stage_model.transformer.", "Stable Diffusion 1"),
    ("cond_stage_model.roberta.", "AltDiffusion"),
)
CHANNELS = {  # what the first convolution of the UNet takes -> (what that is, what the model is called for it)
    4: ("the latents alone", ""),
    5: ("latents and a depth map", ""),
    7: ("latents and a small picture", ", x4 upscaler"),
    8: ("latents and those of a picture to edit", ", InstructPix2Pix"),
    9: ("latents, a mask and masked latents", ", inpainting"),
}
CONTEXTS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL", 1280: "the XL refiner"}
ADAPTERS = (  # a part of a name, what the file is
    ("hada_w", "LoHa adapter"),
    ("lokr_w", "LoKr adapter"),
    ("lora_", "LoRA"),
    (".lora.", "LoRA"),
)
MODULE = re.compile(r"(.*?)\.(lora_(down|up|A|B|mid)|lora\.(down|up)|hada_|lokr_|alpha|dora_scale|[a-z_]+_lora\.)")


@dataclass(frozen=True)
class Kind:
    """What a file holds, in a few words, and what that is told from."""

    name: str
    evidence: tuple[str, ...]


def describe(shapes: Shapes) -> Kind:
    """What the tensors with these names and shapes are. Never fails: what is not known is said to be so."""
    if not shapes:
        return Kind("no tensors", ())
    for look in (_ours, _adapter, _embedding, _diffusers, _model, _part):
        kind = look(shapes)
        if kind:
            return kind
    first = sorted(shapes)[0]
    return Kind("unknown", (f"{counted(len(shapes), 'tensor')}, none with a name that is known; the first is {first}",))


def _ours(shapes: Shapes) -> Kind | None:
    starts = {"UNet": "unet.input_blocks.", "VAE": "vae.encoder.down.", "text encoder": "text_encoder.layers."}
    there = [part for part, start in starts.items() if _some(shapes, start)]
    if not there:
        return None
    name = "Stable Diffusion" if len(there) == len(starts) else f"{' and '.join(there)} alone"
    channels = shapes.get("unet.input_blocks.0.conv.weight", ())[1:2]
    return Kind(name, (f"names start with {', '.join(starts[part] for part in there)}", *_channels(channels)[0]))


def _model(shapes: Shapes) -> Kind | None:
    """A checkpoint in the original layout, whole or not."""
    if not any(_some(shapes, start) for start in (UNET, "first_stage_model.", "cond_stage_model.", "conditioner.")):
        return None
    name, evidence = "a part of a Stable Diffusion checkpoint", []
    for start, family in FAMILIES:
        if _some(shapes, start):
            name = family
            evidence.append(f"text encoder or conditioner at {start}: {family}")
            break
    width = _context_width(shapes)
    if width:
        family = CONTEXTS.get(width, "no released model")
        name = family if name.startswith("a part") and width in CONTEXTS else name
        evidence.append(f"UNet attends to text vectors {width} wide (attn2.to_k): {family}")
    lines, addition = _channels(shapes.get(UNET + "input_blocks.0.0.weight", ())[1:2])
    evidence += lines
    starts = {"UNet": UNET, "VAE": "first_stage_model.", "text encoder": "cond"}
    there = [part for part, start in starts.items() if _some(shapes, start)]
    evidence += [f"no {part}: no name starts with {start}" for part, start in starts.items() if part not in there]
    if len(there) == 1:
        name = f"{there[0]} alone" + ("" if name.startswith("a part") else f", of {name}")
    if _some(shapes, "control_model."):
        addition += " with a ControlNet"
        evidence.append("ControlNet at control_model.")
    return Kind(name + addition, tuple(evidence))


def _part(shapes: Shapes) -> Kind | None:
    """A single network without the prefix that it has in a checkpoint."""
    if _some(shapes, "control_model.") or _some(shapes, "input_hint_block."):
        return Kind("ControlNet", ("names start with control_model. or input_hint_block.",))
    if _some(shapes, "input_blocks.") and _some(shapes, "output_blocks."):
        return Kind("UNet alone", ("names start with input_blocks. and output_blocks.",))
    if _some(shapes, "decoder.") and (_some(shapes, "encoder.") or _some(shapes, "post_quant_conv.")):
        return Kind("VAE alone", ("names start with decoder. and encoder.",))
    if _some(shapes, "text_model."):
        return Kind("text encoder alone", ("names start with text_model.",))
    return None


def _diffusers(shapes: Shapes) -> Kind | None:
    marks = {
        "UNet": ("down_blocks.", "unet.down_blocks."),
        "VAE": ("encoder.down_blocks.", "vae.encoder.down_blocks."),
        "text encoder": ("text_encoder.text_model.", "text_encoder.encoder.layers."),
    }
    there = {part: first for part, starts in marks.items() if (first := _first(shapes, starts))}
    if not there:
        return None
    name = "Stable Diffusion" if len(there) == len(marks) else f"{' and '.join(there)} alone"
    return Kind(f"{name}, with diffusers' names", tuple(f"names such as {first}" for first in there.values()))


def _adapter(shapes: Shapes) -> Kind | None:
    marked = {part: [name for name in shapes if part in name] for part, _ in ADAPTERS}
    for part, kind in ADAPTERS:
        if 2 * len(marked[part]) < len(shapes) // 2 or not marked[part]:  # a few may be left in a checkpoint
            continue
        modules = {match[1] for name in shapes if (match := MODULE.match(name))}
        where = Counter(
            "the text encoder" if "lora_te" in name or "text_encoder" in name else "the UNet" for name in modules
        )
        places = ", ".join(f"{counted(number, 'module')} of {place}" for place, number in sorted(where.items()))
        ranks = {
            shape[0] for name, shape in shapes.items() if shape and name.endswith(("lora_down.weight", "lora_A.weight"))
        }
        evidence = [f"names with {part!r}", *([places] if modules else [])]
        if ranks:
            evidence.append("rank " + (f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"))
        return Kind(f"{kind}, which changes a checkpoint but is none", tuple(evidence))
    return None


def _embedding(shapes: Shapes) -> Kind | None:
    names = [
        name for name in shapes if name.startswith("string_to_param") or name in ("emb_params", "clip_l", "clip_g")
    ]
    only = len(shapes) == 1 and len(next(iter(shapes.values()))) in (1, 2) and "." not in next(iter(shapes))
    if not names and not (only and next(iter(shapes.values()))[-1] in CONTEXTS):
        return None
    lines = []
    for name in names or shapes:
        shape = shapes[name]
        width = shape[-1] if shape else 0
        vectors = shape[0] if len(shape) == 2 else 1
        family = CONTEXTS.get(width, "no known text encoder")
        lines.append(f"{counted(vectors, 'vector')} {width} wide at {name}: {family}")
    return Kind("textual inversion, which adds a word to a checkpoint but is none", tuple(lines))


def _channels(found: tuple[int, ...]) -> tuple[list[str], str]:
    if not found:
        return [], ""
    meaning, addition = CHANNELS.get(found[0], ("no released model", ""))
    return [f"UNet takes {counted(found[0], 'channel')}: {meaning}"], addition


def _context_width(shapes: Shapes) -> int | None:
    for name, shape in shapes.items():
        if name.startswith(UNET) and name.endswith("attn2.to_k.weight") and len(shape) == 2:
            return shape[1]
    return None


def _some(shapes: Shapes, start: str) -> bool:
    return any(name.startswith(start) for name in shapes)


def _first(shapes: Shapes, starts: tuple[str, ...]) -> str | None:
    return next((name for name in shapes if name.startswith(starts)), None)
