"""Which names mean a model or an adapter for few steps: see `convert.families.few_steps`."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from convert.families.few_steps import (
    ANIMATE,
    DMD2,
    DMD2_1,
    DMD2_MODEL,
    FLASH,
    HYPER,
    HYPER_1,
    HYPER_CFG,
    HYPER_MERGE,
    HYPER_UNET,
    LCM,
    LCM_MERGE,
    LCM_MODEL,
    LIGHTNING,
    LIGHTNING_1,
    LIGHTNING_MERGE,
    LIGHTNING_MODEL,
    PCM,
    PCM_LCM,
    PCM_NORMAL,
    SD_TURBO,
    SDXL_TURBO,
    TCD,
    TURBO,
    TURBO_MERGE,
    FewSteps,
)
from convert.files.folder_kinds import CHECKPOINTS
from convert.files.hashing import remembered_sha256
from sd.config import ModelConfig

NAMES = ("ss_output_name", "modelspec.title", "name", "source_file")  # metadata that name it; the last is ours
SENTENCES = ("ss_training_comment", "modelspec.description")  # metadata that may mention other adapters
LONGEST = 200  # characters of a text that are looked at
STEP_COUNTS = (1, 2, 4, 8, 12, 16)  # adapters for a number of steps have it in their names

# What a name must have, as `words` gives it: in lower case, letters and digits apart, "hyper sd 15 8 steps lora".
# The words are also ordinary ones (lightning, flash, turbo, hyper), so none is enough alone.
STEPS = re.compile(r"\b(\d+) steps?\b")
PATTERNS = tuple(
    (re.compile(text), kind, fixed)  # fixed: is for the number of steps in its name, and must name one
    for text, kind, fixed in (
        (r"\banimate ?lcm\b|\banimate ?diff\b.*\blcm\b", ANIMATE, False),
        (r"\bpcm\b.*\blcm ?like\b", PCM_LCM, False),
        (r"\bpcm\b.*\bnormal ?cfg\b", PCM_NORMAL, True),
        (r"\bpcm\b.*\bsmall ?cfg\b", PCM, True),
        (r"\bdmd ?2\b", DMD2, False),
        (r"^flash ?sd(xl)?( lora)?$|\bflash ?diffusion\b", FLASH, False),
        (r"\btcd\b.*\b(sd(xl)?|lora)\b|\bsd(xl)?( \d+)* tcd\b", TCD, False),
        (r"\bhyper ?sd(xl)?\b.*\bcfg\b", HYPER_CFG, True),
        (r"\bhyper ?sd(xl)?\b", HYPER, True),
        (r"\blightning\b", LIGHTNING, True),
        (r"\bsd ?(xl ?)?turbo( \d+)*( lora\b|$)", TURBO, False),
        (r"\blcm ?(lora|sd(v|xl)?|ssd|xl)\b|\b(sd(v|xl)?|ssd|xl|lora)( \d+)* lcm\b|^lcm$", LCM, False),
    )
)


# The same of whole models, by the family that they are of. Other people's models are made from those of the first rows.
XL, ANY = "sdxl", "sd"
MODEL_PATTERNS = tuple(
    (re.compile(text), family, kind)
    for text, family, kind in (
        (r"^sd ?xl turbo( 1 0)?( fp 16)?$", XL, SDXL_TURBO),
        (r"^sd turbo( fp 16)?$", "sd-v2", SD_TURBO),
        (r"^sd ?xl lightning 1 steps?\b", XL, LIGHTNING_1),
        (r"^sd ?xl lightning\b", XL, LIGHTNING_MODEL),
        (r"^hyper ?sd ?xl 1 steps? unet\b", XL, HYPER_UNET),
        (r"^dmd 2 sd ?xl 1 steps?\b", XL, DMD2_1),
        (r"\bdmd ?2\b", XL, DMD2_MODEL),
        (r"xl.*\bturbo|\bturbo.*xl", XL, TURBO_MERGE),
        (r"xl.*\blightning|\blightning.*xl", XL, LIGHTNING_MERGE),
        (r"\bhyper ?(vae|sd|sdxl)\b|\bhyper( \d+ ?steps?)?( fp 16)?$", ANY, HYPER_MERGE),
        (r"\blcm\b", ANY, LCM_MERGE),
    )
)
HASHES = {  # of published models whose files are often renamed -> their name
    "e869ac7d6942cb327d68d5ed83a40447aadf20e0c3358d98b2cc9e270db0da26": "sd_xl_turbo_1.0_fp16",
}
NOT_TOLD = (
    "Turbo, Lightning and other fine-tunes have the names and shapes of the base model; neither the name of this file "
    "nor its metadata says that it is one."
)


class Told(NamedTuple):
    """What a model for few steps is, and what says so."""

    kind: FewSteps
    why: str  # "its name"

    @property
    def note(self) -> str:
        return f"is {self.kind.title}, as {self.why} says, for pictures in few steps. Recommended: {self.kind.flags}."


def words(text: str) -> str:
    """The form in which names are compared: "Hyper-SD15-8steps-lora" -> "hyper sd 15 8 steps lora"."""
    return " ".join(re.findall(r"[a-z]+|[0-9]+", text[:LONGEST].lower()))


def advice(name: str, metadata: Mapping[str, str]) -> FewSteps | None:
    """What the adapter is, if it is one for few steps; None for all others.

    name      of the file, without its suffix, or of the folder that holds it
    metadata  of the file
    """
    for _, text, from_start in _texts(name, metadata):
        for pattern, kind, fixed in PATTERNS:
            if not _names(pattern, text, from_start):
                continue
            count = _count(text)
            if not fixed:
                return kind
            if count == 1 and kind is HYPER:
                return HYPER_1
            if count:
                return _for_count(kind, count)
    return None


def model_advice(name: str, metadata: Mapping[str, str], config: ModelConfig, sha256: str | None = None) -> Told | None:
    """What a model is, if it is one for few steps; None for all others, and for those that nothing tells.

    name      of the file or folder
    metadata  of the file
    sha256    of the file, if it is known
    """
    if config.unet.guidance_width:
        return Told(LCM_MODEL, "the input of its UNet for the guidance scale")
    name = name.rpartition("/")[2].rpartition("--")[2]  # of a folder in a cache: models--stabilityai--sdxl-turbo
    texts = [("its sha256", words(HASHES[sha256]), False)] if sha256 in HASHES else []
    for why, text, from_start in (*texts, *_texts(_stem(name), metadata)):
        for pattern, family, kind in MODEL_PATTERNS:
            if config.family.startswith(family) and _names(pattern, text, from_start):
                count = _count(text)
                return Told(_for_count(kind, count) if kind is LIGHTNING_MODEL and count else kind, why)
    return None


def known_by_hash(path: Path, config: ModelConfig) -> Told | None:
    """What a file is whose sha256 is remembered, if it is a published model for few steps."""
    sha256 = remembered_sha256(path) if path.is_file() else None
    return model_advice("", {}, config, sha256) if sha256 in HASHES else None


def _names(pattern: re.Pattern, text: str, from_start: bool) -> bool:
    """Whether a text has such a name, and begins with it or with the family if it must."""
    found = pattern.search(text)
    return found is not None and not (from_start and found.start() > len("sd xl "))


def _stem(name: str) -> str:
    return name[: name.rindex(".")] if name.lower().endswith(CHECKPOINTS) else name


def _count(text: str) -> int | None:
    """The number of steps in a name."""
    return next((int(number) for number in STEPS.findall(text) if int(number) in STEP_COUNTS), None)


def _for_count(kind: FewSteps, count: int) -> FewSteps:
    return replace(kind, title=f"{kind.title} ({count} steps)", steps=count, fewest=count, most=count)


def _texts(name: str, metadata: Mapping[str, str]) -> Iterator[tuple[str, str, bool]]:
    """Texts that name it, what they are, and whether only their beginning does: sentences mention others, too."""
    yield "its name", words(name), False
    for keys, from_start in ((NAMES, False), (SENTENCES, True)):
        for key in keys:
            if key in metadata:
                yield f"{key} in its metadata", words(_stem(metadata[key])), from_start
