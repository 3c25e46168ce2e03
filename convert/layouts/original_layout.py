"""Find the tensors of a file by their original names, however they were saved.

Training frameworks, compilers and other people's tools wrap the weights, put words into their names or leave some out.
All of these spellings mean the same tensors; none of them is changed here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from convert.errors import UnsafeFileError, UnsupportedFileError, WeightMismatchError, shown
from convert.files.limits import LIMITS
from convert.files.reader import CheckpointFile
from convert.files.records import GlobalName, Inert, TensorRecord
from convert.layouts.diffusers_names import COMPONENTS, current_name, is_diffusers, original_by_diffusers
from convert.layouts.names import PREFIXES

WRAPPERS = ("model", "ema", "module", "params", "weights")  # beside `state_dict`, where nothing else holds tensors
NUMBERS = ("global_step", "native_size")  # read beside the weights
FRAMEWORK_WORDS = {"module", "_orig_mod"}  # parts of a name that data parallelism and torch.compile put in
TEXT_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")  # of a CLIP text transformer
BARE_UNET = ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.")
BARE_VAE = (
    *(f"{half}.{part}" for half in ("encoder", "decoder") for part in ("down.", "up.", "mid.", "conv_", "norm_out.")),
    "quant_conv.",
    "post_quant_conv.",
)
TEXT_ROOT = "cond_stage_model.transformer."


@dataclass(frozen=True, kw_only=True)
class Found:
    """The tensors of a file under their original names."""

    tensors: dict[str, TensorRecord]
    stored_names: dict[str, str]  # original name -> name in the file
    beside: dict[str, int]  # those of NUMBERS that the file has
    layout: str  # "original" or "diffusers"


def find_tensors(file: CheckpointFile) -> Found:
    """All tensors of a file, without wrappers, by their original names.

    Raises UnsupportedFileError for files without tensors, WeightMismatchError for two names of the same weight.
    """
    tensors, beside = unwrap(file.root)
    layout, originals = spelling(tensors, is_folder=bool(file.configs))
    stored: dict[str, str] = {}
    for name, original in originals.items():
        if original in stored:
            raise WeightMismatchError(
                f"holds {shown(original)} twice, as {shown(stored[original])} and as {shown(name)}. "
                "It is unclear which of the two counts."
            )
        stored[original] = name
    return Found(
        tensors={original: tensors[name] for original, name in stored.items()},
        stored_names=stored,
        beside=beside,
        layout=layout,
    )


def spelling(names: Iterable[str], *, is_folder: bool = False) -> tuple[str, dict[str, str]]:
    """The layout, "original" or "diffusers", and name -> original name; unknown names keep their own."""
    names = list(names)
    if is_folder or (is_diffusers(names) and not any(name.startswith(tuple(PREFIXES.values())) for name in names)):
        return "diffusers", diffusers_spelling(names)
    return "original", original_spelling(names)


def unwrap(root: object) -> tuple[dict[str, TensorRecord], dict[str, int]]:
    """The tensors by name, and the training step and native size stored beside them."""
    beside: dict[str, int] = {}
    for _ in range(LIMITS.wrappers + 1):
        if type(root) is TensorRecord:
            raise UnsupportedFileError(
                f"holds a single tensor of the shape {list(root.shape)}, not a checkpoint, perhaps an embedding."
            )
        if not isinstance(root, dict):
            raise UnsupportedFileError("holds no dictionary of tensors, so it is not a checkpoint.")
        for name in NUMBERS:
            if type(root.get(name)) is int:
                beside.setdefault(name, root[name])
        if isinstance(root.get("state_dict"), dict):
            root = root["state_dict"]
            continue
        tensors = {
            name: item for name, item in root.items() if isinstance(name, str) and isinstance(item, TensorRecord)
        }
        inner = [name for name in WRAPPERS if _holds_tensors(root.get(name))]
        if tensors or not inner:
            if not tensors:
                raise UnsupportedFileError(_without_tensors(root))
            return tensors, beside
        if len(inner) > 1:
            raise UnsupportedFileError(
                f"holds {len(inner)} sets of weights: {', '.join(inner)}. It is unclear which one counts; save "
                "one of them alone."
            )
        root = root[inner[0]]
    raise UnsafeFileError("wraps its weights in itself")


def _holds_tensors(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return any(isinstance(item, TensorRecord) for item in value.values()) or isinstance(value.get("state_dict"), dict)


def _without_tensors(root: Mapping) -> str:
    """Name a dictionary that has no tensors in it."""
    keys = {key for key in root if isinstance(key, str)}
    if "string_to_param" in keys:
        return "is a textual inversion: it adds a word to a checkpoint and is not one itself. Give the checkpoint."
    if {"state", "param_groups"} <= keys or {"optimizer", "optimizer_states"} & keys:
        return "holds the state of an optimiser, which only training needs, and no weights. Give the checkpoint."
    if keys and all(isinstance(root[key], Inert | GlobalName) for key in keys):
        return "holds objects of another program, not a dictionary of tensors. Its author should save the state_dict."
    return "holds no tensors, so it is not a checkpoint."


def diffusers_spelling(names: Iterable[str]) -> dict[str, str]:
    """name -> original name; unknown names keep their own."""
    current = {name: current_name(without_framework(name)) for name in names}
    table = original_by_diffusers(current.values())
    ids = f"{COMPONENTS[2]}.text_model.embeddings.position_ids"
    table[ids] = PREFIXES["text_encoder"] + "embeddings.position_ids"
    return {name: table.get(today, today) for name, today in current.items()}


def original_spelling(names: Iterable[str]) -> dict[str, str]:
    """name -> original name; unknown names keep their own."""
    plain = {name: without_framework(name) for name in names}
    # Names without a prefix belong to a part that has no names with its prefix; else they are leftovers.
    has_vae = any(name.startswith(PREFIXES["vae"]) for name in plain.values())
    has_unet = any(name.startswith(PREFIXES["unet"]) for name in plain.values())
    return {name: _with_prefix(today, has_unet, has_vae) for name, today in plain.items()}


def without_framework(name: str) -> str:
    """A name without the words that data parallelism and torch.compile insert."""
    if name.startswith("model_ema."):  # its dots are gone
        return name.replace("_orig_mod", "")
    if "module" in name or "_orig_mod" in name:
        return ".".join(part for part in name.split(".") if part not in FRAMEWORK_WORDS)
    return name


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
