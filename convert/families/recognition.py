"""Recognise what a file holds from names and shapes, by the rows of `convert.families.table`, with the evidence."""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from convert.errors import CheckpointError, counted, shown
from convert.families.table import CHANNELS, FIRST, MODELS, TEXT_WIDTHS, UNET, V1_PARTS, VAE, VIDEO_VAE, Family, refusal
from convert.layouts.original_layout import spelling
from convert.layouts.wrapping import ADAPTER, ADAPTER_WORDS

Shapes = Mapping[str, tuple[int, ...]]

CONTEXTS = {row.context: row for row in reversed(MODELS) if row.context}  # width of a text vector -> the first such row
LABELS = {row.label for row in MODELS}
CONV_IN = (UNET + "input_blocks.0.0.weight", "unet.input_blocks.0.conv.weight")  # in the original layout and in ours
LABEL = UNET + "label_emb.0.0.weight"
CROSS_ATTENTION = ("attn2.to_k.weight", "cross_attention.k.weight")
TOKEN_EMBEDDINGS = (
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "text_encoder.token_embedding.weight",
    *("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),  # in files of their own
    *("token_embedding.weight", "cond_stage_model.model.token_embedding.weight"),
)
LATENTS = (VAE + "decoder.conv_in.weight", "vae.decoder.conv_in.weight")
PART_STARTS = {  # of a model, in the original layout and in ours
    "UNet": (UNET, "unet.input_blocks."),
    "VAE": (VAE, "vae.encoder.down."),
    "text encoder": ("cond_stage_model.", "conditioner.", "text_encoder.layers."),
}
OUR_STARTS = {"UNet": ("unet.",), "VAE": ("vae.",), "text encoder": ("text_encoder.",)}  # in ours and in diffusers'
USUAL = ("model_ema.", "loss.", "extra.")  # beside a network
TEXT_NAME = re.compile(  # of a text encoder's tensors
    r"text_model\.|text_projection|logit_scale|position|token_embedding|encoder\.layers|final_layer_norm"
    r"|transformer\.resblocks|ln_final|attn_mask"
)
ADAPTERS = ("lora", "loha", "lokr", "oft", "ia3")
MOST_WORDS = 64  # in one file of textual inversion
MODULE = re.compile(r"(.*?)\.(lora_(down|up|A|B|mid)|lora\.(down|up)|hada_|lokr_|alpha|dora_scale|[a-z_]+_lora\.)")


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """What a file holds."""

    family: Family | None = None  # None: a model of an unknown family, or nothing known
    name: str = "unknown"  # in a few words, for a reader
    parts: tuple[str, ...] = ()  # of a model: those that are there, keys of PART_STARTS
    evidence: tuple[str, ...] = ()  # that the family rests on
    details: tuple[str, ...] = ()  # what else is seen

    @property
    def refusal(self) -> str | None:
        """Why it cannot be loaded whatever its numbers are, in a sentence whose subject is the file."""
        if self.family is None or self.family.config:
            return None
        return refusal(self.family, self.evidence, self.parts[0] if len(self.parts) == 1 else None)


@dataclass(frozen=True)
class _Seen:
    """The few shapes that tell families apart."""

    context: int | None
    channels: int | None
    label: int | None
    latents: int | None


def describe(shapes: Shapes) -> Recognised:
    """What the tensors of a file are, by the names they have there."""
    original = {}
    for names in (shapes, [name for name in shapes if not ADAPTER.search(name)]):
        with suppress(CheckpointError):  # more layers than any model has, or adapters inside the layers
            original = original or spelling(names).originals
    original = {name: original.get(name, name) for name in shapes}
    named = {original[name]: shape for name, shape in shapes.items()}
    return recognise_names(named, {name: stored for stored, name in original.items()})


def recognise_names(shapes: Shapes, stored: Mapping[str, str] | None = None) -> Recognised:
    """What the tensors with these original names and shapes are; never fails.

    stored  original name -> the one in the file, to quote
    """
    if not shapes:
        return Recognised(name="no tensors")
    shapes, stored = dict(sorted(shapes.items())), stored or {}
    everything = Names(shapes)
    for row in FIRST:
        if mark := everything.mark(row):
            return _addition(row, mark, shapes, stored)
    if not everything.first((UNET,)) and any(
        len(shapes.get(name, ())) == 5 for name in LATENTS
    ):  # it convolves over time, too
        return _addition(VIDEO_VAE, next(name for name in LATENTS if name in shapes), shapes, stored)
    adapters = any(word in everything.text for word in ADAPTER_WORDS)
    weights = {name: shape for name, shape in shapes.items() if not ADAPTER.search(name)} if adapters else shapes
    names = Names(weights) if adapters else everything
    parts = tuple(part for part, starts in PART_STARTS.items() if names.first(starts))
    channels, label, latents = (_second_axis(weights, names) for names in (CONV_IN, (LABEL,), LATENTS))
    seen = _Seen(_context(weights), channels, label, latents)
    family, mark = _model(names, seen, parts)
    if family or parts:
        return _model_of(family, mark, parts, seen, names, shapes, stored)
    from convert.families.additions import ADDITIONS, EMBEDDING  # a model does not need them

    for row in ADDITIONS:
        if mark := everything.mark(row):
            return _addition(row, mark, shapes, stored)
    words = len(shapes) == 1 or (len(shapes) <= MOST_WORDS and "." not in "".join(shapes))
    if words and all(len(shape) in (1, 2) and shape[-1] in CONTEXTS for shape in shapes.values()):
        return _addition(EMBEDDING, next(iter(shapes)), shapes, stored)  # named like the words that it adds
    first = shown(min(shapes), 100)
    return Recognised(details=(f"{counted(len(shapes), 'tensor')}, none with a known name; the first is {first}",))


class Names:
    """All names of a file, in which a row is found in no time: there may be a hundred thousand."""

    def __init__(self, shapes: Shapes):
        self.sorted = [f"{name}\n" for name in sorted(shapes)]
        self.text = "".join(f".{name}" for name in self.sorted)

    def mark(self, row: Family) -> str | None:
        """A name that tells the row, if one does."""
        if row.lacks and self.first((row.lacks,)):
            return None
        return self.first(row.starts) or next((name for part in row.inside if (name := self.within(part))), None)

    def first(self, starts: tuple[str, ...]) -> str | None:
        """A name that starts with one of these."""
        for start in starts:
            place = bisect_left(self.sorted, start)
            if place < len(self.sorted) and self.sorted[place].startswith(start):
                return self.sorted[place][:-1]
        return None

    def within(self, part: str) -> str | None:
        """A name with this in it; a dot stands for the beginning, too."""
        place = self.text.find(part)
        if place < 0:
            return None
        start = self.text.rfind("\n", 0, place) + 2
        return self.text[start : self.text.index("\n", max(start, place))]


def beside(shapes: Shapes, parts: tuple[str, ...]) -> list[str]:
    """The names of tensors that belong to none of these networks, and are more than a table or a counter."""
    starts = tuple(start for part in parts for start in (*PART_STARTS[part], *OUR_STARTS.get(part, ())))
    return [
        name for name in shapes if "." in name and not name.startswith((*starts, *USUAL)) and "position_ids" not in name
    ]


def _model(names: Names, seen: _Seen, parts: tuple[str, ...]) -> tuple[Family | None, str | None]:
    """The row of a model, and the name that tells it where one does."""
    networks_only = {id(row) for row in MODELS if row.parts is V1_PARTS and row.inside} if not parts else ()
    named = [(row, mark) for row in MODELS if id(row) not in networks_only and (mark := names.mark(row))]
    agreeing = [(row, mark) for row, mark in named if _agrees(row, seen.context)]
    by_width = [(row, None) for row in MODELS if parts and row.context and row.context == seen.context]
    if parts == ("text encoder",) and seen.context in TEXT_WIDTHS:
        by_width = [(TEXT_WIDTHS[seen.context], None)]
    if parts == ("UNet",) and seen.label and not by_width:  # a narrow one of XL; the refiner's has a level more
        refines = bool(names.first((UNET + "output_blocks.9.",)))
        xl = [row for row in MODELS if row.config and row.name.startswith("sdxl")]
        by_width = [(row, None) for row in xl if (row.config.text_encoder_2 is None) == refines]
    if parts == ("VAE",):
        by_width = [(row, None) for row in MODELS if row.latents and row.latents == seen.latents]
    candidates = [*agreeing, *by_width]
    return next((pair for pair in candidates if _fits(pair[0], seen)), candidates[0] if candidates else (None, None))


def _agrees(row: Family, context: int | None) -> bool:
    """Whether the text vectors do not belong to another family: names alone may have been changed."""
    return row.context in (None, context) or context not in CONTEXTS


def _fits(row: Family, seen: _Seen) -> bool:
    if seen.channels is None:  # no UNet to look at
        return not row.lacks.startswith(UNET)
    if row.config:  # a narrow file has a vector of another width
        labelled = row.label == seen.label or bool(row.label and seen.label and seen.label not in LABELS)
    else:
        labelled = row.label in (None, seen.label)
    return row.channels in (None, seen.channels) and labelled


def _model_of(
    family: Family | None,
    mark: str | None,
    parts: tuple[str, ...],
    seen: _Seen,
    names: Names,
    shapes: Shapes,
    stored: Mapping[str, str],
) -> Recognised:
    mark = mark or names.first(PART_STARTS[parts[0]])
    evidence = [f"names such as {shown(stored.get(mark, mark), 100)}"]
    if seen.context:
        owner = "its UNet attends to text vectors" if "UNet" in parts else "the vectors of its text encoder are"
        evidence.append(f"{owner} {seen.context} wide")
    if seen.channels:
        meaning = CHANNELS.get(seen.channels, "no released model")
        evidence.append(f"its UNet takes {counted(seen.channels, 'channel')}: {meaning}")
    if seen.label:
        evidence.append(f"its UNet gets {seen.label} numbers beside the text")
    if family and family.lacks == UNET + "middle_block.1.":
        evidence.append("its UNet has no attention in the middle")
    if seen.latents and parts == ("VAE",):
        evidence.append(f"its latents have {counted(seen.latents, 'channel')}")
    details = [f"no {part}" for part in PART_STARTS if part not in parts] if parts else []
    if parts == ("VAE",) and not family:
        details.append("the VAEs of Stable Diffusion 1, 2 and XL have the same shapes: nothing tells whose this is")
    if family and not family.prediction and "UNet" in parts:
        details.append("neither names nor shapes tell whether its UNet predicts noise or velocity")
    title = family.title if family else "Stable Diffusion"
    if len(parts) == 1:
        others = beside(shapes, parts)
        title = f"{parts[0]} alone" + (f", of {title}" if family else "")
        if others:
            title = title.replace(" alone", f" and {counted(len(others), 'other tensor')}")
            details.append(f"other tensors: names such as {shown(stored.get(others[0], others[0]), 100)}")
    if control := names.first(("control_model.",)):
        title += " with a ControlNet"
        details.append(f"a ControlNet: names such as {shown(control, 100)}")
    if adapters := [name for name in shapes if ADAPTER.search(name)]:
        details.append(f"{counted(len(adapters), 'adapter tensor')}: names such as {shown(adapters[0], 100)}")
    return Recognised(family=family, name=title, parts=parts, evidence=tuple(evidence), details=tuple(details))


def _addition(row: Family, mark: str, shapes: Shapes, stored: Mapping[str, str]) -> Recognised:
    evidence = [f"names such as {shown(stored.get(mark, mark), 100)}"]
    details = []
    if row.name in ADAPTERS:
        modules = {match[1] for name in shapes if (match := MODULE.match(name))}
        where = Counter("text encoder" if "lora_te" in name or "text_encoder" in name else "UNet" for name in modules)
        details += [", ".join(f"{counted(count, 'module')} of the {place}" for place, count in sorted(where.items()))]
        down = [shape for name, shape in shapes.items() if name.endswith(("lora_down.weight", "lora_A.weight"))]
        ranks = sorted({shape[0] for shape in down if shape})
        details += [f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"] if ranks else []
    if row.name in ("embedding", "sdxl-embedding"):
        for name, shape in list(shapes.items())[:4]:
            width, count = (shape[-1] if shape else 0), (shape[0] if len(shape) == 2 else 1)
            known = CONTEXTS[width].title if width in CONTEXTS else "no known text encoder"
            details.append(f"{counted(count, 'vector')} {width} wide at {shown(name, 100)}: {known}")
    name = row.title
    if "text encoder" in row.parts:
        others = [name for name in shapes if not TEXT_NAME.search(name)]
        name += f" and {counted(len(others), 'other tensor')}" if others else " alone"
        width = _second_axis(shapes, TOKEN_EMBEDDINGS)
        if width in TEXT_WIDTHS:
            evidence.append(f"its vectors are {width} wide: of {TEXT_WIDTHS[width].title}")
    return Recognised(family=row, name=name, evidence=tuple(evidence), details=tuple(filter(None, details)))


def _context(shapes: Shapes) -> int | None:
    """How wide the text vectors are: as the UNet takes them, or, without a UNet, as the text encoder gives them."""
    for name, shape in shapes.items():
        if name.endswith(CROSS_ATTENTION) and name.startswith((UNET, "unet.")) and len(shape) == 2:
            return shape[1]
    return _second_axis(shapes, TOKEN_EMBEDDINGS)


def _second_axis(shapes: Shapes, names: tuple[str, ...]) -> int | None:
    return next((shapes[name][1] for name in names if len(shapes.get(name, ())) > 1), None)
