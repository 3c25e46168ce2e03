"""What a file is if it is not an adapter for the model in use, in one sentence."""

from collections.abc import Iterable, Mapping

from convert.adapters.grouping import WORDS
from convert.errors import CheckpointError, UnsupportedFileError, counted, shown, shown_list
from convert.families.recognition import describe
from convert.files.records import TensorRecord
from convert.layouts.adapter_names import AdaptedFamily
from convert.layouts.wrapping import ADAPTER

ARCHITECTURES = ("modelspec.architecture", "ss_base_model_version")
OTHERS = (  # families of transformers: what names have in them; what the stated architecture has
    ("Wan", ("cross_attn_k_img", "blocks_0_cross_attn", "blocks.0.cross_attn"), "wan"),
    ("HunyuanVideo", ("double_blocks_0_img_attn_qkv",), "hunyuan"),
    ("FLUX", ("double_blocks", "single_blocks", "single_transformer_blocks"), "flux"),
    ("Stable Diffusion 3", ("joint_blocks", "attn_add_q_proj", "attn.add_q_proj"), "stable-diffusion-v3"),
    ("Stable Cascade", ("lora_prior_",), "cascade"),
    ("PixArt or Sana", ("adaln_single",), "pixart"),
    ("a video model", ("motion_modules", "temporal_transformer"), "animatediff"),
    ("a transformer of another kind", ("transformer.", "lora_transformer_", "layers.0."), "transformer"),
)


def described(tensors: Mapping[str, TensorRecord], metadata: Mapping[str, str]) -> CheckpointError:
    """The error for a file that no adapter of a known family is in."""
    if not any(ADAPTER.search(name) or name.startswith(WORDS) for name in tensors):
        kind = describe({name: record.shape for name, record in tensors.items()})
        holds, use = kind.name, ""
        if kind.parts:
            use = ". A checkpoint is given with --model"
        elif "*" in tensors or (kind.family and "embedding" in kind.family.name):
            holds, use = "textual inversion", ". An embedding is given with --embeddings"
        elif holds == "unknown":
            holds = "; ".join(kind.details)
        return UnsupportedFileError(f"is not an adapter: it holds {holds}{use}")
    if all(name.startswith(WORDS) for name in tensors):
        return UnsupportedFileError(
            f"changes no module: it only brings embeddings along: {shown_list(sorted(tensors))}"
        )
    if all(name.startswith(("[", "tensor")) for name in tensors):
        return UnsupportedFileError("is a list of tensors without names, so nobody can say which modules they change")
    if other := _other(tensors, metadata):
        return UnsupportedFileError(f"is an adapter for {other}, which is not supported")
    return UnsupportedFileError(
        f"is an adapter, but {_none_of(len(tensors))} to a module of Stable Diffusion: {shown_list(sorted(tensors))}"
    )


def other_family(
    tensors: Mapping[str, TensorRecord],
    metadata: Mapping[str, str],
    family: AdaptedFamily,
    misfits: list[str],
    incomplete: list[str],
    best: AdaptedFamily | None,
) -> CheckpointError:
    """The error for an adapter that does not fit a model.

    misfits, incomplete  modules whose shapes do not fit, and those that lack tensors
    best                 the family that it fits best
    """
    if (best is None or best.title == family.title) and not misfits and incomplete:
        return UnsupportedFileError(
            f"changes nothing: it lacks tensors of {counted(len(incomplete), 'module')}: {shown_list(incomplete)}"
        )
    if best is None:
        return described(tensors, metadata)
    if best.title == family.title:
        return UnsupportedFileError(
            f"has tensors of other shapes than this {family.title} model's in {counted(len(misfits), 'module')}: "
            f"{shown(misfits[0], 300) if misfits else ''}"
        )
    return UnsupportedFileError(
        f"is an adapter for {best.title}; the model is {family.title}. Use it with a model of its own family"
    )


def _none_of(count: int) -> str:
    return "its one tensor does not belong" if count == 1 else f"none of its {count} tensors belongs"


def _other(tensors: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    stated = " ".join(metadata.get(name, "") for name in ARCHITECTURES).lower()
    for title, words, architecture in OTHERS:
        if architecture in stated or any(word in name for name in tensors for word in words):
            return title
    return None
