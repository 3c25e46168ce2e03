"""Find the tensors of a file by their original names, however they were saved.

Training frameworks, compilers and other people's tools wrap the weights, put words into their names or leave some out.
All of these spellings mean the same tensors; none of them is changed here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from convert.errors import CheckpointError, WeightMismatchError, shown, shown_list
from convert.files.reader import CheckpointFile
from convert.files.records import TensorRecord
from convert.layouts.names import DEPTH_ESTIMATOR, DEPTH_NETWORK, OPEN_CLIP, PREFIXES, SECOND_TEXT
from convert.layouts.wrapping import BARE_UNET, BARE_VAE, numbers_in, plain_names, unwrap

TEXT_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")  # of a CLIP text transformer
TEXT_ROOT = "cond_stage_model.transformer."
TEXT_ALONE = ("text_model.", "transformer.text_model.", "embeddings.token_embedding.")  # a text encoder in its own file
# The attention in the VAE's middle, in the original, in diffusers since 0.17 and before it; tools mix the spellings.
VAE_ATTENTION = (
    ("norm", "group_norm", "group_norm"),
    ("q", "to_q", "query"),
    ("k", "to_k", "key"),
    ("v", "to_v", "value"),
    ("proj_out", "to_out.0", "proj_attn"),
)
MIDDLE_ATTENTION = re.compile(r"((?:en|de)coder\.mid(\.attn_1|_block\.attentions\.0)\.)(.+)\.(weight|bias)")
ROOTS = (  # names that start so tell the layout of the network -> its root there, and the root that goes with it
    (("unet.time_embed.", "unet.input_blocks."), "unet.", PREFIXES["unet"]),
    (("vae.encoder.down.", "vae.decoder.up."), "vae.", PREFIXES["vae"]),
    (("model.diffusion_model.down_blocks.",), PREFIXES["unet"], "unet."),
    (("first_stage_model.encoder.down_blocks.", "first_stage_model.decoder.up_blocks."), PREFIXES["vae"], "vae."),
)
TELLING = ("unet.down_blocks.", "unet.mid_block.", "vae.encoder.down_blocks.", "vae.decoder.up_blocks.")
TELLING += ("down_blocks.", "mid_block.", "encoder.down_blocks.", "decoder.up_blocks.")
TELLING += tuple(f"text_encoder.{start}" for start in ("text_model.", "transformer.text_model.", "embeddings."))
GUIDANCE = "time_embedding.cond_proj.", "time_embed.cond_proj."  # as some write it among original names -> as we do
OUR_NAMES = ("unet.input_blocks.0.conv.weight", "vae.encoder.mid.attention.norm.weight")  # not the original's
# Where Stability-AI/generative-models keeps the text encoder of Stable Diffusion 1 and 2, and where the original code
# does. The refiner of XL has one there, too, and beside it a part that is told the size of the picture.
GENERATIVE_MODELS = ("conditioner.embedders.0.", "cond_stage_model.")
ONLY_XL = ("conditioner.embedders.1.", PREFIXES["unet"] + "label_emb.")
ELSEWHERE = (OPEN_CLIP, "conditioner.embedders.")  # names of text encoders that are not CLIP's in version 1
# Found in files and not used: their names do not matter, nor how often they are there.
NO_WEIGHTS = ("model_ema.decay", "model_ema.num_updates", "loss.", "first_stage_model.loss.")
NO_WEIGHTS += ("first_stage_model.model_ema.",)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The tensors of a file under their original names."""

    tensors: dict[str, TensorRecord]
    stored_names: dict[str, str]  # original name -> name in the file
    beside: dict[str, int | float]  # those of NUMBERS that the file has
    layout: str  # "original" or "diffusers"
    dropped: tuple[str, ...]  # words and prefixes that frameworks put into the names
    is_open_clip: bool  # its text encoder has OpenCLIP's names, as in files of version 2 at every width

    @property
    def notes(self) -> tuple[str, ...]:
        """What was dropped or renamed, a sentence each."""
        words, (theirs, ours) = shown_list(self.dropped), GENERATIVE_MODELS
        notes = (f"its names are read without the words that a framework put into them: {words}.",) * bool(words)
        renamed = (theirs in name for original, name in self.stored_names.items() if original.startswith(ours))
        if any(renamed) and not any("label_emb" in name for name in self.tensors):  # in XL, that is its place
            notes += (f"its text encoder is named as in generative-models, {theirs}*; it is read as {ours}*.",)
        return notes


def find_tensors(file: CheckpointFile) -> Found:
    """All tensors of a file, without wrappers, by their original names.

    Raises UnsupportedFileError for files without tensors, WeightMismatchError for two names of the same weight.
    """
    inside = unwrap(file.root, networks_in)
    layout, originals, dropped = spelling(inside.tensors, is_folder=bool(file.configs))
    stored = _once(originals.items())
    tensors = {original: inside.tensors[name] for original, name in stored.items()}
    if is_open_clip := any(name.startswith(ELSEWHERE) for name in tensors):
        from convert.layouts.open_clip import as_clip

        renamed = list(as_clip(tensors))
        stored = _once((stored[original], clip) for original, clip, _ in renamed)
        tensors = {clip: record for _, clip, record in renamed}
    if any(name.startswith(DEPTH_NETWORK[1]) for name in tensors):
        from convert.layouts.depth_layout import apart

        renamed = list(apart(tensors))
        stored = {part: stored[original] for original, part, _ in renamed}
        tensors = {part: record for _, part, record in renamed}
    return Found(
        tensors=tensors,
        stored_names=stored,
        beside=inside.beside | numbers_in(file.metadata),
        layout=layout,
        dropped=dropped,
        is_open_clip=is_open_clip,
    )


def _is_weight(original: str) -> bool:
    """Whether it matters which of two tensors has this name."""
    networks = (*PREFIXES.values(), *ELSEWHERE, "model_ema.")
    return original.startswith(networks) and not original.startswith(NO_WEIGHTS) and "position_ids" not in original


class Spelling(NamedTuple):
    """How the names of a file are written."""

    layout: str  # "original" or "diffusers"
    originals: dict[str, str]  # name -> original name; unknown names keep their own
    dropped: tuple[str, ...]  # words and prefixes that frameworks put into the names


def spelling(names: Iterable[str], *, is_folder: bool = False) -> Spelling:
    """What the names stand for. Each network may be in the original layout or in diffusers'.

    Raises WeightMismatchError for the same networks under several prefixes or more layers than any model has,
    UnsupportedFileError for adapters inside the layers.
    """
    plain, dropped = plain_names(names)
    if not set(OUR_NAMES).intersection(plain.values()):
        for starts, root, right in ROOTS:
            if any(name.startswith(starts) for name in plain.values()):
                plain = {
                    n: right + today[len(root) :] if today.startswith(root) else today for n, today in plain.items()
                }
        plain = {name: vae_attention_name(today) for name, today in plain.items()}
        plain = _without_conditioner(plain)
    original = {part for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in plain.values())}
    if not (is_folder or any(name.startswith(TELLING) for name in plain.values())):
        plain = {name: today.replace(*GUIDANCE) if GUIDANCE[0] in today else today for name, today in plain.items()}
        # Names without a prefix belong to a part that has no names with its prefix; else they are leftovers.
        has_unet = "unet" in original or not any("input_blocks." in name for name in plain.values())
        has_vae = "vae" in original
        originals = {name: _with_prefix(today, has_unet, has_vae) for name, today in plain.items()}
        return Spelling("original", originals, dropped)
    from convert.layouts.diffusers_names import (
        COMPONENTS,
        current_name,
        original_by_diffusers,
        with_first_text_encoder,
    )

    current = with_first_text_encoder({name: current_name(today) for name, today in plain.items()})
    table = original_by_diffusers(current.values())
    for component, prefix in (("text_encoder", PREFIXES["text_encoder"]), SECOND_TEXT):
        table[f"{component}.text_model.embeddings.position_ids"] = f"{prefix}embeddings.position_ids"
    originals = {
        name: table.get(today, today)
        if today.partition(".")[0]
        in {*COMPONENTS, SECOND_TEXT[0], DEPTH_ESTIMATOR} - original  # the others are in the original layout
        else _with_prefix(plain[name], has_unet=True, has_vae=True)
        for name, today in current.items()
    }
    return Spelling("original" if "unet" in original else "diffusers", originals, dropped)


def _once(names: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Names in the file and original ones, the other way round. Raises WeightMismatchError for a weight with two."""
    stored: dict[str, str] = {}
    for name, original in names:
        if stored.setdefault(original, name) != name and _is_weight(original):
            raise WeightMismatchError(
                f"holds {shown(original)} twice, as {shown(stored[original])} and as {shown(name)}. "
                "It is unclear which of the two counts."
            )
    return stored


def _without_conditioner(plain: dict[str, str]) -> dict[str, str]:
    """The same with the text encoder where the original code of Stable Diffusion 1 and 2 keeps it."""
    theirs, ours = GENERATIVE_MODELS
    starts = {
        start for name in plain.values() for start in (theirs, *ONLY_XL, PREFIXES["unet"]) if name.startswith(start)
    }
    if starts != {theirs, PREFIXES["unet"]}:
        return plain
    return {n: ours + name.removeprefix(theirs) if name.startswith(theirs) else name for n, name in plain.items()}


def vae_attention_name(name: str) -> str:
    """A name in which the attention of a VAE is spelled as in the layout of the block around it."""
    match = MIDDLE_ATTENTION.search(name) if "coder.mid" in name else None
    row = next((row for row in VAE_ATTENTION if match and match[3] in row), None)
    if not row:
        return name
    return f"{name[: match.start(3)]}{row[0] if match[2] == '.attn_1' else row[1]}.{match[4]}"


def networks_in(names: Iterable[str]) -> frozenset[str]:
    """The networks ("unet", "vae", "text_encoder") that tensors with these names are part of."""
    names = list(names)
    try:
        originals = spelling(names).originals.values()
    except CheckpointError:  # named when these tensors are read
        return frozenset(PREFIXES)
    found = {part for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in originals)}
    if any(name.startswith(TEXT_ALONE) for name in originals):
        found.add("text_encoder")
    return frozenset(found)


def _with_prefix(name: str, has_unet: bool, has_vae: bool) -> str:
    if name.startswith(TEXT_ROOT):
        rest = name.removeprefix(TEXT_ROOT)
        return PREFIXES["text_encoder"] + rest if rest.startswith(TEXT_PARTS) else name
    if not has_unet and name.startswith("diffusion_model."):
        return "model." + name
    if not has_unet and name.startswith(BARE_UNET):
        return PREFIXES["unet"] + name
    if not has_vae and name.startswith(BARE_VAE):
        return PREFIXES["vae"] + name
    return name
