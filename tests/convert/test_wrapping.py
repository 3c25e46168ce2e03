"""Whatever frameworks and tools put around weights, the same tensors are found; what was dropped is said."""

import json
import time

import pytest
import torch
from conftest import TINY, refused
from hostile import refused_model

from convert.actions.convert import convert
from convert.actions.inspect import inspect
from convert.actions.tensor_set import tensors_of
from convert.checkpoint import POSITION_IDS, read_checkpoint
from convert.errors import UnsupportedFileError, WeightMismatchError
from convert.families.recognition import describe
from convert.files.reader import open_checkpoint
from convert.layouts.names import PREFIXES, diffusers_names, original_names
from convert.layouts.original_layout import spelling
from convert.layouts.wrapping import plain_names
from convert.single_part import read_part
from sd.config import SD_V1

UNET, VAE, TEXT = PREFIXES.values()
NAMES = [original.name for original in original_names(TINY).values()]
DIFFUSERS = {theirs.name: NAMES[index] for index, theirs in enumerate(diffusers_names(TINY).values())}
KEYS = ("q", "k", "v", "proj_out", "norm")
ATTENTION = {  # spellings of the attention in the VAE's middle, beside the original's
    "new": dict(zip(KEYS, ("to_q", "to_k", "to_v", "to_out.0", "group_norm"), strict=True)),
    "old": dict(zip(KEYS, ("query", "key", "value", "proj_attn", "group_norm"), strict=True)),
    "new, with the original norm": dict(zip(KEYS, ("to_q", "to_k", "to_v", "to_out.0", "norm"), strict=True)),
    "original": {key: key for key in KEYS},
}


@pytest.fixture(scope="module")
def state(tiny_state):
    """A narrow model; each weight is one number of its own, so that files are small."""
    names = [*NAMES, "betas", POSITION_IDS]
    return {
        name: torch.tensor(index / 1000).expand(tiny_state[name].shape) if index < 970 else tiny_state[name]
        for index, name in enumerate(names)
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.pt"


def part_of(state, part):
    prefix = PREFIXES[part]
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def same_weights(path, part=None):
    """The checkpoint in a file in which every weight has the number of its name in `state`."""
    with open_checkpoint(path) as file:
        checkpoint = read_part(file, part) if part else read_checkpoint(file)
        number = {name: index for index, name in enumerate(NAMES)}
        for ours, record in checkpoint.tensors.items():
            found = torch.frombuffer(file.storage_bytes(record), dtype=torch.float32)[record.offset]
            assert found == torch.tensor(number[checkpoint.names[ours].name] / 1000), ours
    return checkpoint


# Words in names


def after(place, word):
    return lambda name: name.replace(place, place + word)


WORDS = [
    "_forward_module.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_module.",
    "_fsdp_wrapped_module._fpw_module.",
    "base_model.model.",
]
RENAMED = {
    **{word: lambda name, word=word: word + name for word in WORDS},
    **{f"{word} inside": after("diffusion_model.", word) for word in WORDS},
    **{f"{word} deep": after(".transformer_blocks.0.", word) for word in WORDS},
    **{
        prefix: lambda name, prefix=prefix: prefix + name
        for prefix in ("model.", "a.b-c.7.", "net.module.x.", "model/", "my_")
    },
    "one of each": lambda name: {"m": "a.", "f": "b.c.", "c": "d."}.get(name[0], "a.") + name,
    "word and prefix": lambda name: f"lit.{name}".replace("encoder.", "encoder._orig_mod."),
    "base_layer": lambda name: name.replace("to_q.", "to_q.base_layer.").replace("q_proj.", "q_proj.base_layer."),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", RENAMED)
def test_words_and_prefixes_of_any_framework_are_dropped_and_said(state, path, how):
    torch.save({"state_dict": {RENAMED[how](name): value for name, value in state.items()}}, path)
    checkpoint = same_weights(path)
    (note,) = checkpoint.notes
    assert "without the words" in note
    assert (checkpoint.config, checkpoint.unknown) == (TINY, ())
    report = inspect(path)
    assert (report.kind, report.problem) == ("Stable Diffusion 1", None)
    assert report.dropped
    assert all(word in note for word in report.dropped)
    assert sum(part.tensors for part in (*report.components, *report.leftovers)) == len(state)


def test_the_commands_say_which_words_were_dropped(state, path, run):
    torch.save({f"_forward_module.net.{name}": value for name, value in state.items()}, path)
    for command in (("inspect", path), ("convert", path, "y.safetensors")):
        code, out, err = run(*command)
        assert code == 0
        assert "_forward_module, net" in " ".join((*out, err))
    assert json.loads(run("inspect", "--json", path)[1][0])["dropped"] == ["_forward_module", "net"]


@pytest.mark.slow
@pytest.mark.parametrize("part", PREFIXES)
@pytest.mark.parametrize("prefix", ["", "net.", "module.net.", "_orig_mod."])
def test_a_network_alone_is_found_under_any_prefix(state, path, part, prefix):
    root = "text_model." if part == "text_encoder" else ""
    torch.save({prefix + root + name: value for name, value in part_of(state, part).items()}, path)
    assert same_weights(path, part).notes or not prefix
    assert inspect(path).part == part


@pytest.mark.parametrize("first", ["", "online."])
@pytest.mark.parametrize("second", ["ema.", "module."])
def test_two_copies_under_different_prefixes_are_never_mixed(state, path, first, second):
    torch.save({prefix + n: v for prefix in (first, second) for n, v in state.items()}, path)
    refused_model(path, WeightMismatchError, "twice", "It is unclear which of")


def test_a_file_of_other_tensors_beside_a_network_is_not_called_that_network_alone(state):
    names = [*NAMES[:-200], *(f"tower{index}.weight" for index in range(300))]
    for some in (names, [f"x.{name}" for name in names]):
        assert "alone" not in describe(dict.fromkeys(some, (4, 4))).name


def test_a_hundred_thousand_names_take_no_longer_than_their_number():
    names = [f"a.model.diffusion_model.{'module.' * 5}{index}" for index in range(100_000)]
    start = time.process_time()
    plain_names(names)
    spelling([f"x{name}" for name in names])
    assert time.process_time() - start < 10


# The attention of the VAE


def attention(name, spelled):
    for original, other in ATTENTION[spelled].items() if "coder.mid" in name else ():
        for block in (".mid.attn_1.", ".mid_block.attentions.0."):
            for leaf in ("weight", "bias"):
                if name.endswith(f"{block}{original}.{leaf}"):
                    return name.removesuffix(f"{original}.{leaf}") + f"{other}.{leaf}"
    return name


@pytest.mark.slow
@pytest.mark.parametrize("spelled", ATTENTION)
@pytest.mark.parametrize("axes", [0, 2])
def test_every_spelling_of_the_vae_s_attention_is_read_in_the_original_layout(state, path, spelled, axes):
    for prefix in ("", VAE):
        renamed = {
            attention(name, spelled): value.reshape(*value.shape[:2], *[1] * axes) if ".attn_1." in name else value
            for name, value in state.items()
            if not name.endswith("norm.weight")
        } | {attention(name, spelled): value for name, value in state.items() if name.endswith("norm.weight")}
        if prefix:
            torch.save(renamed, path)
            assert same_weights(path).unknown == ()
        torch.save(part_of(renamed, "vae") if not prefix else renamed, path)
        assert len(same_weights(path, "vae").tensors) == 248


@pytest.mark.slow
@pytest.mark.parametrize("spelled", ATTENTION)
@pytest.mark.parametrize("root", ["vae.", "first_stage_model.", ""])
def test_every_spelling_of_the_vae_s_attention_is_read_in_diffusers_layout(state, path, spelled, root):
    back = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    renamed = {}
    for theirs, name in DIFFUSERS.items():
        for new, old in back.items():
            theirs = (
                theirs.replace(f".attentions.0.{new}.", f".attentions.0.{old}.") if "coder.mid" in theirs else theirs
            )
        renamed[attention(theirs, spelled)] = state[name]
    vae = {root + name.removeprefix("vae."): value for name, value in renamed.items() if name.startswith("vae.")}
    torch.save(vae, path)
    assert len(same_weights(path, "vae").tensors) == 248
    if root:
        torch.save({name: v for name, v in renamed.items() if not name.startswith("vae.")} | vae, path)
        assert same_weights(path).layout == "diffusers"


# Adapters inside the layers


def test_adapters_inside_the_layers_are_counted_and_refused(state, path, run):
    inside = {name.replace("to_q.", "to_q.base_layer."): value for name, value in state.items()}
    adapters = {
        name.replace("base_layer.weight", f"lora_{half}.default.weight"): torch.ones(4, 4)
        for name in inside
        if "base_layer" in name
        for half in "AB"
    }
    torch.save(inside | adapters, path)
    refused_model(path, UnsupportedFileError, f"holds {len(adapters)} adapter tensors inside its layers", "merge")
    refused(run("convert", path, "y.safetensors"), f"holds {len(adapters)} adapter tensors", "to_q.lora_A")
    report = inspect(path)
    assert (report.kind, f"{len(adapters)} adapter tensors" in report.problem) == ("Stable Diffusion 1", True)


def test_layers_that_were_saved_twice_for_training_are_refused(state, path):
    name = f"{UNET}input_blocks.0.0"
    copies = {f"{name}.{copy}.weight": torch.ones(2) for copy in ("original_module", "modules_to_save.default")}
    torch.save(state | copies, path)
    refused_model(path, UnsupportedFileError, "holds 1 adapter tensor", "modules_to_save")
    names = [name for name in NAMES if name.endswith("attn1.to_q.weight")]  # as old diffusers saved them
    lora = {name.replace("to_q.", "processor.to_q_lora.down."): torch.ones(4, 4) for name in names}
    torch.save(state | lora, path)
    refused_model(path, UnsupportedFileError, f"holds {len(lora)} adapter tensors inside its layers", "merge")


# Dictionaries and lists


def three(state, *keys):
    """A dictionary for each network, under these names."""
    return {key: part_of(state, part) for key, part in zip(keys, PREFIXES, strict=True)}


OPTIMISER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0}]}
WRAPPED = {
    **{word: lambda s, word=word: {word: s} for word in ("net", "params_ema", "model_state_dict", "generator", "x y")},
    "a list": lambda s: [s],
    "a list inside": lambda s: {"checkpoints": [{"weights": s}]},
    "a tuple": lambda s: (3, {"a": s}),
    "a scalar beside": lambda s: {"epoch": torch.tensor(3), "model": s},
    "an optimiser beside": lambda s: {"net": s, "optimizer": OPTIMISER, "optim": [OPTIMISER]},
    "tensors beside": lambda s: {"net": s, "callbacks": {"best": torch.ones(2), "all": [torch.ones(3)]}},
    "both": lambda s: {"state_dict": {"net": s}, "global_step": 7},
    "three": lambda s: three(s, "unet", "vae", "text_encoder"),
    "three of other names": lambda s: three(s, "model", "first", "clip"),
    "three inside": lambda s: {"state_dict": three(s, "unet", "vae", "te"), "epoch": 1},
    "three and averages": lambda s: three(s, "unet", "vae", "text_encoder") | {"unet_ema": part_of(s, "unet")},
    "three of which one is sure": lambda s: three(s, "unet", "vae", "te") | {"unet2": part_of(s, "unet")},
    "three with text_model": lambda s: (
        three(s, "unet", "vae", "text_encoder")
        | {"text_encoder": {f"text_model.{name}": value for name, value in part_of(s, "text_encoder").items()}}
    ),
    "three with their prefixes": lambda s: {
        part: {name: value for name, value in s.items() if name.startswith(prefix)} for part, prefix in PREFIXES.items()
    },
    "three with prefixes": lambda s: {
        key: {f"net.{root}{name}": value for name, value in part.items()}
        for root, (key, part) in zip(
            ("", "", "text_model."), three(s, "unet", "vae", "text_encoder").items(), strict=True
        )
    },
    "three with a word": lambda s: {
        key: {f"module.{name}": value for name, value in part.items()} for key, part in three(s, "a", "b", "c").items()
    },
}


@pytest.mark.parametrize("how", WRAPPED)
def test_weights_are_found_in_whatever_holds_them(state, path, how):
    torch.save(WRAPPED[how](state), path)
    assert same_weights(path).config == TINY
    report = inspect(path)
    assert report.problem is None
    assert {part.name for part in report.components} == {"UNet", "VAE", "text encoder"}


def test_three_networks_in_diffusers_names_are_read_as_one_model(state, path):
    parts = {"unet": {}, "vae": {}, "text_encoder": {}}
    for theirs, original in DIFFUSERS.items():
        part, _, name = theirs.partition(".")
        parts[part][name] = state[original]
    torch.save(parts, path)
    assert same_weights(path).layout == "diffusers"
    torch.save(parts | {"vae": part_of(state, "vae")}, path)  # one of them in the original layout
    assert same_weights(path).config == TINY


def test_numbers_beside_the_weights_are_read_from_every_dictionary_around_them(state, path):
    torch.save({"epoch": 2, "run": {"global_step": 5, "net": state}}, path)
    assert same_weights(path).global_step == 5
    report = inspect(path)
    assert (report.epoch, report.global_step) == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: {"a": s, "b": dict(s)}, "holds 2 sets of weights: a, b. It is unclear"),
        (lambda s: [s, dict(s)], "holds 2 sets of weights: [0], [1]"),
        (lambda s: {"x": [{"y": s}, s]}, 'holds 2 sets of weights: ["x"][0]["y"], ["x"][1]'),
        (lambda s: three(s, "unet1", "vae", "te") | {"unet2": part_of(s, "unet")}, "holds 4 sets of weights"),
        (lambda s: {"a": [torch.ones(2), torch.ones(2)]}, 'Their names: ["a"][0], ["a"][1]'),
        (lambda s: [torch.ones(2)] * 9, "[0], [1], [2]"),
        (lambda s: {"a": {"x": torch.ones(2, 2)}, "b": {"y": torch.ones(2, 2)}}, "Their names: a.x, b.y"),
        (lambda s: {5: torch.ones(2)}, "[5]"),
        (lambda s: {"net": OPTIMISER, "optimizer": OPTIMISER}, "state of an optimiser"),
        (lambda s: [3, "x"], "holds no dictionary of tensors"),
    ],
)
def test_where_the_tensors_are_is_said_if_it_is_unclear_which_count(state, path, make, words):
    torch.save(make(state), path)
    refused_model(path, UnsupportedFileError, words)
    assert words in inspect(path).problem


def test_a_structure_that_is_deep_or_repeats_itself_ends(path):
    deep: list = [torch.ones(2)]
    for _ in range(20):
        deep = [deep, deep]
    root = {"a": deep, "b": {"c": torch.ones(2)}}
    root["self"] = root
    torch.save(root, path)
    with open_checkpoint(path) as file:
        assert list(tensors_of(file.root)) == ["c"]


# Tensors that are not used


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (POSITION_IDS, POSITION_IDS.replace("text_model.", "")),
        (POSITION_IDS, f"module.{POSITION_IDS}"),
        ("betas", "module.betas"),
        ("model_ema.decay", "_orig_mod.model_ema.decay"),
        ("loss.logvar", "module.loss.logvar"),
        (f"{VAE}loss.x", f"{VAE}module.loss.x"),
        ("v_pred", "module.v_pred"),
        ("something.else", "module.something.else"),
    ],
)
def test_what_is_not_used_may_be_there_twice(state, path, first, second):
    torch.save(state | {first: torch.ones(3), second: torch.zeros(3)}, path)
    assert same_weights(path).config.unet == TINY.unet
    convert(path, path.with_suffix(".safetensors"))


def test_published_names_hold_no_words_to_drop():
    names = [*(original.name for original in original_names(SD_V1).values()), "model_ema.decay", "betas"]
    assert spelling(names) == ("original", {name: name for name in names}, ())
