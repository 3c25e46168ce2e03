"""Recognise what a file holds from names and shapes, by the rows of `convert.families.table`, with the evidence."""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from convert.errors import CheckpointError, counted, shown
from convert.families.table import ADDITIONS, CHANNELS, CONTROLNET, EMBEDDING, LORA, MODELS, UNET, VAE, Family
from convert.layouts.original_layout import spelling

Shapes = Mapping[str, tuple[int, ...]]

CONTEXTS = {row.context: row for row in reversed(MODELS) if row.context}  # width of a text vector -> the first such row
CONV_IN = (UNET + "input_blocks.0.0.weight", "unet.input_blocks.0.conv.weight")  # in the original layout and in ours
LABEL = UNET + "label_emb.0.0.weight"
CROSS_ATTENTION = ("attn2.to_k.weight", "cross_attention.k.weight")
TOKEN_EMBEDDINGS = (
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "text_encoder.token_embedding.weight",
)
PART_STARTS = {  # of a model, in the original layout and in ours
    "UNet": (UNET, "unet.input_blocks."),
    "VAE": (VAE, "vae.encoder.down."),
    "text encoder": ("cond_stage_model.", "conditioner.", "text_encoder.layers."),
}
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
        kind = f"{self.family.title} checkpoint" if self.family in MODELS else self.family.title
        owner = "the UNet of " if self.parts == ("UNet",) else ""
        article = "an" if kind[0] in "AEIOU" else "a"
        return f"is {owner}{article} {kind}: {'; '.join(self.evidence)}. {self.family.why_not}."


@dataclass(frozen=True)
class _Seen:
    """The few shapes that tell families apart."""

    context: int | None
    channels: int | None
    label: int | None


def describe(shapes: Shapes) -> Recognised:
    """What the tensors of a file are, by the names they have there."""
    try:
        original = spelling(shapes).originals
    except CheckpointError:  # names of more layers than any model has
        original = {name: name for name in shapes}
    named = {original[name]: shape for name, shape in shapes.items()}
    return recognise_names(named, {name: stored for stored, name in original.items()})


def recognise_names(shapes: Shapes, stored: Mapping[str, str] | None = None) -> Recognised:
    """What the tensors with these original names and shapes are; never fails.

    stored  original name -> the one in the file, to quote
    """
    if not shapes:
        return Recognised(name="no tensors")
    shapes, stored = dict(sorted(shapes.items())), stored or {}  # in order: see `_first`
    mark = _mark(CONTROLNET, shapes)
    if mark:
        return _addition(CONTROLNET, mark, shapes, stored)
    parts = tuple(part for part, starts in PART_STARTS.items() if _first(shapes, starts))
    seen = _Seen(_context(shapes), _second_axis(shapes, CONV_IN), _second_axis(shapes, (LABEL,)))
    family, mark = _model(shapes, seen)
    if family or parts:
        return _model_of(family, mark, parts, seen, shapes, stored)
    for row in ADDITIONS:
        if mark := _mark(row, shapes):
            return _addition(row, mark, shapes, stored)
    (name, shape), *others = shapes.items()
    if not others and 1 <= len(shape) <= 2 and shape[-1] in CONTEXTS:  # named like the word it adds
        return _addition(EMBEDDING, name, shapes, stored)
    first = shown(min(shapes), 100)
    return Recognised(details=(f"{counted(len(shapes), 'tensor')}, none with a known name; the first is {first}",))


def _model(shapes: Shapes, seen: _Seen) -> tuple[Family | None, str | None]:
    """The row of a model, and the name that tells it where one does."""
    named = [(row, mark) for row in MODELS if (mark := _mark(row, shapes))]
    agreeing = [(row, mark) for row, mark in named if _agrees(row, seen.context)]
    by_width = [(row, None) for row in MODELS if row.context and row.context == seen.context]
    candidates = [*agreeing, *by_width]
    return next((pair for pair in candidates if _fits(pair[0], seen)), candidates[0] if candidates else (None, None))


def _agrees(row: Family, context: int | None) -> bool:
    """Whether the text vectors do not belong to another family: names alone may have been changed."""
    return row.context in (None, context) or context not in CONTEXTS


def _fits(row: Family, seen: _Seen) -> bool:
    if seen.channels is None:  # no UNet to look at
        return not row.lacks.startswith(UNET)
    return row.channels in (None, seen.channels) and row.label in (None, seen.label)


def _model_of(
    family: Family | None,
    mark: str | None,
    parts: tuple[str, ...],
    seen: _Seen,
    shapes: Shapes,
    stored: Mapping[str, str],
) -> Recognised:
    mark = mark or _first(shapes, PART_STARTS[parts[0]])
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
    details = [f"no {part}" for part in PART_STARTS if part not in parts]
    if family and not family.prediction:
        details.append("neither names nor shapes tell whether its UNet predicts noise or velocity")
    title = family.title if family else "Stable Diffusion"
    if len(parts) == 1:
        title = f"{parts[0]} alone" + (f", of {title}" if family else "")
    if control := _first(shapes, ("control_model.",)):
        title += " with a ControlNet"
        details.append(f"a ControlNet: names such as {shown(control, 100)}")
    return Recognised(family=family, name=title, parts=parts, evidence=tuple(evidence), details=tuple(details))


def _addition(row: Family, mark: str, shapes: Shapes, stored: Mapping[str, str]) -> Recognised:
    evidence = [f"names such as {shown(stored.get(mark, mark), 100)}"]
    details = []
    if row.why_not == LORA.why_not:
        modules = {match[1] for name in shapes if (match := MODULE.match(name))}
        where = Counter("text encoder" if "lora_te" in name or "text_encoder" in name else "UNet" for name in modules)
        details += [", ".join(f"{counted(count, 'module')} of the {place}" for place, count in sorted(where.items()))]
        down = [shape for name, shape in shapes.items() if name.endswith(("lora_down.weight", "lora_A.weight"))]
        ranks = sorted({shape[0] for shape in down if shape})
        details += [f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"] if ranks else []
    if row.why_not == EMBEDDING.why_not:
        for name, shape in list(shapes.items())[:4]:
            width, count = (shape[-1] if shape else 0), (shape[0] if len(shape) == 2 else 1)
            known = CONTEXTS[width].title if width in CONTEXTS else "no known text encoder"
            details.append(f"{counted(count, 'vector')} {width} wide at {shown(name, 100)}: {known}")
    return Recognised(family=row, name=row.title, evidence=tuple(evidence), details=tuple(filter(None, details)))


def _mark(row: Family, shapes: Shapes) -> str | None:
    """The first name that tells the row, if one does."""
    if row.lacks and _first(shapes, (row.lacks,)):
        return None
    if row.inside:
        return next((name for name in shapes if any(part in name for part in row.inside)), None)
    return _first(shapes, row.starts)


def _context(shapes: Shapes) -> int | None:
    """How wide the text vectors are: as the UNet takes them, or, without a UNet, as the text encoder gives them."""
    for name, shape in shapes.items():
        if name.endswith(CROSS_ATTENTION) and name.startswith((UNET, "unet.")) and len(shape) == 2:
            return shape[1]
    return _second_axis(shapes, TOKEN_EMBEDDINGS)


def _second_axis(shapes: Shapes, names: tuple[str, ...]) -> int | None:
    return next((shapes[name][1] for name in names if len(shapes.get(name, ())) > 1), None)


def _first(shapes: Shapes, starts: tuple[str, ...]) -> str | None:
    """A name that starts with one of these. The names are in order: a file may have a hundred thousand of them."""
    names = list(shapes)
    for start in starts:
        place = bisect_left(names, start)
        if place < len(names) and names[place].startswith(start):
            return names[place]
    return None
