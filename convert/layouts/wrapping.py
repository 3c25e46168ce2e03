"""Take off what frameworks and tools put around weights: dictionaries and lists, and words in the names."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from convert.errors import UnsupportedFileError, WeightMismatchError, counted, shown
from convert.files.limits import LIMITS
from convert.files.records import GlobalName, Inert, TensorRecord
from sd.config import USUAL_GUIDANCE, ModelConfig

NUMBERS = {"global_step": int, "native_size": int, "epoch": int, "guidance_scale": float}  # read beside the weights
OF_CONFIG = ("native_size", "guidance_scale")  # those of `numbers_of`
IN_METADATA = (*OF_CONFIG, "global_step")  # those that a `.safetensors` in the original layout has in its metadata
OPTIMISER = {"state", "param_groups"}  # the keys of its state, which holds tensors too
DEEPEST = 8  # dictionaries and lists around tensors
# Parts of a name that DDP, FSDP, DeepSpeed, torch.compile, activation checkpointing and PEFT put in. No weight of a
# model has a part that starts with an underscore before its last.
WORD = re.compile(r"(?:^|(?<=\.))(?:module|_\w+|base_model\.model)\.")
DOTLESS_WORD = re.compile(r"_orig_mod|_\w*?wrapped_module|_forward_module|module")  # in averaged names
ADAPTER_WORDS = (  # one of them is in every name that the pattern below finds; looked for first, which is quicker
    *("lora", "lycoris", "hada", "lokr", "oft_", "ia3", "vera_", "dora_", "modules_to_save"),
    *(":up\n", ":down\n", ".alpha\n", ".diff\n", ".diff_b\n", ".on_input\n"),
)
ADAPTER = re.compile(  # what adapters of every kind have in their names
    r"(?:^|[._])(?:lora|lycoris|hada|lokr|b?oft|ia3|vera|dora)_|[._]lora\.|\.modules_to_save\.|:(?:up|down)$"
    r"|\.(?:alpha|diff|diff_b|on_input)$"
)
NETWORK_ANYWHERE = re.compile(  # how the names of each network begin in a whole model
    r"(model\.diffusion_model\.|unet\.\w+\.)"
    r"|(first_stage_model\.|vae\.(?:en|de)coder\.)"
    r"|(cond_stage_model\.|conditioner\.embedders\.|text_encoder\.(?:text_model|embeddings|encoder)\.)"
)
NETWORK = re.compile(rf"(?:^|(?<=\.))(?:{NETWORK_ANYWHERE.pattern})")
BARE_UNET = (
    "time_embed.",
    "label_emb.",
    "input_blocks.",
    "middle_block.",
    "output_blocks.",
    "out.",
)  # original names, no prefix
BARE_VAE = (
    *(f"{half}.{part}" for half in ("encoder", "decoder") for part in ("down.", "up.", "mid.", "conv_", "norm_out.")),
    "quant_conv.",
    "post_quant_conv.",
)
BARE_DIFFUSERS = {  # component -> how its names begin in a file of its own
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "conv_in.", "conv_norm_out.", "conv_out."),
    "vae": ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
}
LONE = (*BARE_UNET, *BARE_VAE, *BARE_DIFFUSERS["unet"], "encoder.", "decoder.", "text_model.", "loss.", "model_ema.")
LONE_SIGNS = (  # one of these is in a file of a network alone, whose names all start with one of the above
    *("input_blocks.0.0.weight", "time_embedding.linear_1.weight"),
    *("encoder.conv_in.weight", "text_model.embeddings.token_embedding.weight"),
)


@dataclass(frozen=True, kw_only=True)
class Unwrapped:
    """The tensors of a file, without what was around them."""

    tensors: dict[str, TensorRecord]
    dictionaries: tuple[dict, ...]  # that hold them
    beside: dict[str, int | float]  # those of NUMBERS that the file has


def unwrap(root: object, networks_in: Callable[[Iterable[str]], frozenset[str]]) -> Unwrapped:
    """The weights by name: from a dictionary of tensors, wherever it is, or from one for each network.

    networks_in  which networks ("unet", ...) the tensors with these names belong to

    Without weights of a known network: all tensors, by their places in the file.

    Raises UnsupportedFileError where there are none, or several sets of weights.
    """
    beside: dict[str, int | float] = {}
    for _ in range(LIMITS.wrappers + 1):
        _note_numbers(root, beside)
        if not (isinstance(root, dict) and isinstance(root.get("state_dict"), dict)):
            break
        root = root["state_dict"]
    else:
        raise UnsupportedFileError(f"has more than {LIMITS.wrappers} dictionaries named state_dict inside each other")
    if isinstance(root, TensorRecord):
        raise UnsupportedFileError(
            f"holds a single tensor of the shape {list(root.shape)}, not a checkpoint, perhaps an embedding."
        )
    places = dict(_places(root))
    found = {path: tensors for path, holder in places.items() if (tensors := _named_tensors(holder))}
    if len(places) == 1:
        chosen = list(found)
    else:
        networks = {path: there for path, tensors in found.items() if (there := networks_in(tensors))}
        chosen = _chosen(networks)
    for path in chosen:
        inner = root
        for key in path:
            inner = inner[key]
            _note_numbers(inner, beside)
    if len(chosen) == 1:
        tensors = found[chosen[0]]
    elif chosen:
        tensors = {
            (name if NETWORK.match(name) else f"{min(networks[path])}.{name}"): record
            for path in chosen
            for name, record in found[path].items()
        }
    elif not (tensors := all_tensors(root)):
        raise UnsupportedFileError(_without_tensors(root))
    return Unwrapped(tensors=tensors, dictionaries=tuple(places[path] for path in chosen), beside=beside)


def numbers_of(config: ModelConfig) -> dict[str, int | float]:
    """What no shape shows, to stand beside a model's weights."""
    guidance = {} if config.guidance_scale == USUAL_GUIDANCE else {"guidance_scale": config.guidance_scale}
    return {"native_size": config.native_size, **guidance}


def numbers_in(metadata: Mapping[str, str]) -> dict[str, int | float]:
    """The numbers in the metadata of a `.safetensors`; what is no number is left out."""
    found = {}
    for name in IN_METADATA:
        with suppress(ValueError):
            found[name] = NUMBERS[name](metadata.get(name, ""))
    return found


def all_tensors(root: object) -> dict[str, TensorRecord]:
    """Every tensor outside of optimisers by its place: `string_to_param.*`, `["a"][0]`."""
    if isinstance(root, TensorRecord):
        return {"tensor": root}
    return {
        place((*path, key)): record
        for path, holder in _places(root)
        for key, record in (holder.items() if isinstance(holder, dict) else enumerate(holder))
        if isinstance(record, TensorRecord)
    }


def place(path: tuple) -> str:
    """Where something is in a file: with dots as in other names, or, if there are lists, as Python writes it."""
    if all(isinstance(key, str) for key in path):
        return ".".join(path)
    return "".join(f'["{key}"]' if isinstance(key, str) else f"[{key}]" for key in path)


def _chosen(networks: dict[tuple, frozenset[str]]) -> list[tuple]:
    """Of the dictionaries that hold networks, those that count. Raises UnsupportedFileError if it is unclear."""
    if () in networks or len(networks) < 2:
        return [()] if () in networks else list(networks)
    sure = {path[-1] for path in networks if path[-1] in networks[path]}  # of {"unet": ..., "unet_ema": ...}
    paths = [path for path in networks if path[-1] in networks[path] or not networks[path] & sure]
    if len(set().union(*(networks[path] for path in paths))) == sum(len(networks[path]) for path in paths):
        return paths
    raise UnsupportedFileError(
        f"holds {len(networks)} sets of weights: {', '.join(shown(place(path), 100) for path in list(networks)[:8])}. "
        "It is unclear which one counts; save one of them alone."
    )


def _note_numbers(root: object, beside: dict[str, int | float]) -> None:
    for name, kind in NUMBERS.items() if isinstance(root, dict) else ():
        if type(root.get(name)) is kind:
            beside.setdefault(name, root[name])


def _named_tensors(holder: dict | list | tuple) -> dict[str, TensorRecord]:
    if not isinstance(holder, dict):
        return {}
    return {name: item for name, item in holder.items() if isinstance(name, str) and isinstance(item, TensorRecord)}


def _places(root: object) -> Iterator[tuple[tuple, dict | list | tuple]]:
    """Every dictionary and list that holds tensors, in the order of the file, optimisers left out.

    One with tensors that is there a million times is given twice, which is enough to see that.
    """
    todo, seen = [((), root)], Counter()
    while todo:
        path, holder = todo.pop()
        if seen[id(holder)] > 1 or not isinstance(holder, dict | list | tuple):
            continue
        if isinstance(holder, dict) and holder.keys() >= OPTIMISER:
            continue
        items = list(holder.items() if isinstance(holder, dict) else enumerate(holder))
        has_tensors = any(isinstance(item, TensorRecord) for _, item in items)
        seen[id(holder)] += 1 if has_tensors else 2
        if has_tensors:
            yield path, holder
        if len(path) < DEEPEST:
            inner = [((*path, key), item) for key, item in items if isinstance(item, dict | list | tuple)]
            todo.extend(reversed(inner))


def _without_tensors(root: object) -> str:
    """Name contents without tensors."""
    if not isinstance(root, dict):
        return "holds no dictionary of tensors, so it is not a checkpoint."
    keys = {key for key in root if isinstance(key, str)}
    if "string_to_param" in keys:
        return "is a textual inversion: it adds a word to a checkpoint and is not one itself. Give the checkpoint."
    if keys >= OPTIMISER or {"optimizer", "optimizer_states"} & keys:
        return "holds the state of an optimiser, which only training needs, and no weights. Give the checkpoint."
    if keys and all(isinstance(root[key], Inert | GlobalName) for key in keys):
        return "holds objects of another program, not a dictionary of tensors. Its author should save the state_dict."
    return "holds no tensors, so it is not a checkpoint."


def plain_names(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each name without the words and the prefix around it; and those words, sorted.

    Raises WeightMismatchError if the same networks are there under several prefixes, UnsupportedFileError for adapters
    inside the layers.
    """
    words: set[str] = set()
    plain = {name: _without_words(name, words) for name in names}
    if any(".base_layer." in name or ".modules_to_save." in name for name in plain.values()):
        adapters = [name for name in plain if ADAPTER.search(name)]
        if adapters:
            raise adapters_inside(adapters)
        words.add("base_layer")
        plain = {name: today.replace(".base_layer.", ".") for name, today in plain.items()}
    prefixes = _prefixes(plain.values())
    for prefix in prefixes:
        plain = {name: today.removeprefix(prefix) for name, today in plain.items()}
    for root in ("unet.", "vae.", "text_encoder."):  # of a folder, or of a dictionary for each network
        for prefix in _lone_prefix(today[len(root) :] for today in plain.values() if today.startswith(root)):
            plain = {name: today.replace(root + prefix, root, 1) for name, today in plain.items()}
            prefixes.append(prefix)
    return plain, tuple(sorted({*words, *(prefix.rstrip(".") for prefix in prefixes)}))


def adapters_inside(names: list[str]) -> UnsupportedFileError:
    """The error for tensors of adapters among the weights of a network."""
    return UnsupportedFileError(
        f"holds {counted(len(names), 'adapter tensor')} inside its layers, such as {shown(names[0], 100)}. Adapters "
        "are not supported yet: merge and unload them in the program that made the file, and save it again."
    )


def _without_words(name: str, words: set[str]) -> str:
    found = WORD.findall(name)
    if found:
        words.update(word.rstrip(".") for word in found)
        name = WORD.sub("", name)
    if name.startswith("model_ema."):  # its dots are gone
        words.update(DOTLESS_WORD.findall(name))
        return DOTLESS_WORD.sub("", name)
    return name


def _prefixes(names: Iterable[str]) -> list[str]:
    """What stands in front of the names of every network: one prefix of all, or one of each."""
    names = list(names)
    if not (found := _networks_behind(names, NETWORK)):
        anywhere = _networks_behind(names, NETWORK_ANYWHERE)  # behind "model/" or "my_"
        return list(anywhere) if list(map(len, anywhere.values())) == [NETWORK.groups] else _lone_prefix(names)
    networks = set().union(*found.values())
    whole = [prefix for prefix, there in found.items() if there == networks]
    if len(whole) > 1 and (len(networks) > 1 or "" not in whole):
        places = [
            f"with the prefix {shown(prefix.rstrip('.'), 60)}" if prefix else "without a prefix" for prefix in whole[:4]
        ]
        raise WeightMismatchError(
            f"holds the same networks twice: {' and '.join(places)}. It is unclear which of them count."
        )
    if "" in whole:
        return []
    each = list(found) if sum(map(len, found.values())) == len(networks) else []
    return sorted(filter(None, whole or each), key=len, reverse=True)


def _networks_behind(names: Iterable[str], pattern: re.Pattern[str]) -> dict[str, set[int]]:
    """Each prefix, and the networks whose names it stands in front of."""
    found: dict[str, set[int]] = {}
    for name in names:
        if match := pattern.search(name):
            found.setdefault(name[: match.start()], set()).add(match.lastindex)
    return found


def _lone_prefix(names: Iterable[str]) -> list[str]:
    """The prefix that all names of a network alone have."""
    names = set(names)
    first = min(names, default="").split(".")
    for count in range(1, min(len(first), DEEPEST)):
        prefix = ".".join(first[:count]) + "."
        if prefix == "control_model.":  # which tells what the file is
            return []
        if any(prefix + sign in names for sign in LONE_SIGNS):
            return [prefix] if all(n.startswith(prefix) and n.startswith(LONE, len(prefix)) for n in names) else []
    return []
