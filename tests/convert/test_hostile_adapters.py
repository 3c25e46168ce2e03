"""Adapters that nobody should send us: each is refused in one sentence, or read and made use of without an error."""

import json
import time
import tracemalloc

import pytest
import torch
from adapters import FAMILY, lora, lora_shapes
from conftest import TINY
from hostile import assert_showable, call, checkpoint, dict_of, storage, tensor
from hostile import pickled as as_pickle
from mutation import safetensors
from safetensors.torch import save_file

from convert.adapters.adapter import open_adapter, read_adapter
from convert.errors import CheckpointError
from convert.layouts.adapter_names import kohya_names, modules
from sd.networks.adapters.weight_change import bias_change, weight_change

NAMES, SHAPES = kohya_names(FAMILY), modules(FAMILY)
LINEAR = "unet.middle_block.attention.proj_in"
MODULE = NAMES[LINEAR]
OTHER = "lora_unet_middle_block_1_proj_in"  # the same module in original names
OUT, IN = SHAPES[LINEAR]
BIG, NAN = float("1e300"), float("nan")


def part(**shapes):
    """Tensors of ones of one module, by what their names end in; a tensor is taken as it is."""
    return {
        f"{MODULE}.{name.replace('__', '.')}": torch.ones(shape) if isinstance(shape, tuple) else shape
        for name, shape in shapes.items()
    }


def low(rank=2, **others):
    return part(lora_down__weight=(rank, IN), lora_up__weight=(OUT, rank), **others)


def loha(a=(OUT, 2), b=(2, IN), **others):
    return part(**{"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b} | others)


def number(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype)


def glora(**others):
    shapes = {"a1__weight": (IN, 2), "a2__weight": (2, IN), "b1__weight": (OUT, 2), "b2__weight": (2, IN)}
    return part(**shapes | others)


REFUSED = {
    **{f"alpha {value}": (low(alpha=number(value)), "not one finite number") for value in (NAN, float("-inf"))},
    "alpha 1e300": (low(alpha=number(BIG)), r"holds 1e\+300 as .* up to 1e\+09"),
    "scale 1e300": (low(scale=number(BIG)), r"holds 1e\+300 as .* up to 1e\+09"),
    "scale nan": (low(scale=number(NAN)), "not one finite number"),
    "several alphas": (low(alpha=(2,)), "not one finite number"),
    "no alpha": (low(alpha=(0,)), "not one finite number"),
    "complex alpha": (low(alpha=torch.tensor(1j)), "not one finite number"),
    **{
        f"{dtype}": (part(lora_down__weight=torch.ones(2, IN, dtype=dtype), lora_up__weight=(OUT, 2)), "floating-point")
        for dtype in (torch.int32, torch.bool, torch.complex64)
    },
    "half a module": (part(lora_up__weight=(OUT, 2)), "changes nothing: it lacks tensors of 1 module"),
    "only a core": (part(lora_mid__weight=(2, 2)), "changes nothing"),
    "only alpha": (part(alpha=()), "changes nothing"),
    "only a rescale": (part(rescale=(OUT,)), "changes nothing"),
    "only lengths": (part(dora_scale=(OUT, 1)), "changes nothing"),
    "two kinds": (low(hada_w1_a=(OUT, 2)), "parts of several kinds"),
    "both spellings": (low() | {n.replace(MODULE, OTHER): t.clone() for n, t in low().items()}, "one module twice"),
    "one part twice": (low(lora_B__weight=(OUT, 2)), "one module twice"),
    "scalars": (part(lora_down__weight=(), lora_up__weight=()), "other shapes"),
    "vectors": (part(lora_down__weight=(IN,), lora_up__weight=(OUT,)), "other shapes"),
    "transposed": (part(lora_down__weight=(IN, 2), lora_up__weight=(2, OUT)), "other shapes"),
    "nothing read": (part(lora_down__weight=(2, 0), lora_up__weight=(OUT, 2)), "other shapes"),
    "ranks that differ": (part(lora_down__weight=(3, IN), lora_up__weight=(OUT, 2)), "other shapes"),
    "kernel for a matrix": (part(lora_down__weight=(2, IN, 3, 3), lora_up__weight=(OUT, 2, 1, 1)), "other shapes"),
    "core of one axis": (low(lora_mid__weight=(2,)), "other shapes"),
    "core of another rank": (low(lora_mid__weight=(2, 3)), "other shapes"),
    "loha of vectors": (loha(a=(OUT,), b=(IN,)), "other shapes"),
    "loha, a core that does not chain": (loha(hada_t1=(2, 2, 1, 1)), "other shapes"),
    "loha, halves that differ": (loha(hada_w2_a=(OUT, 3)), "other shapes"),
    "lokr of scalars": (part(lokr_w1=(), lokr_w2=()), "other shapes"),
    "lokr of nothing": (part(lokr_w1=(0, 0), lokr_w2=(0, 0)), "other shapes"),
    "lokr, whole and split": (part(lokr_w1=(4, 4), lokr_w1_a=(4, 2), lokr_w2=(OUT // 4, IN // 4)), "other shapes"),
    "lokr, a core too many": (part(lokr_w1=(4, 4), lokr_w2=(OUT // 4, IN // 4), lokr_t2=(2, 2, 1, 1)), "other shapes"),
    "lokr, core of one axis": (
        part(lokr_w1=(4, 4), lokr_w2_a=(2, OUT // 4), lokr_w2_b=(2, IN // 4), lokr_t2=(2,)), "other shapes"
    ),
    "glora that does not chain": (glora(a1__weight=(2, 2)), "other shapes"),
    "glora, an odd core": (glora(bm__weight=(7,)), "other shapes"),
    "oft of a vector": (part(oft_blocks=(4,)), "other shapes"),
    "oft of nothing": (part(oft_blocks=(0, 0, 0)), "other shapes"),
    "oft, oblong": (part(oft_blocks=(4, 2, 3)), "other shapes"),
    "oft of five axes": (part(oft_blocks=(1, 1, OUT // 4, 4, 4)), "other shapes"),
    "oft, rescale": (part(oft_blocks=(OUT // 4, 4, 4), rescale=(3,)), "other shapes"),
    "boft without stages": (part(oft_blocks=(0, OUT // 4, 4, 4)), "other shapes"),
    "boft, too many stages": (part(oft_blocks=(100, OUT // 4, 4, 4)), "other shapes"),
    "boft, odd blocks": (part(oft_blocks=(1, OUT, 1, 1)), "other shapes"),
    "ia3 of another length": (part(weight=(OUT + 1,), on_input=number(0)), "other shapes"),
    "ia3 of nothing": (part(weight=(0,), on_input=number(0)), "other shapes"),
    "ia3, nowhere": (part(weight=(OUT,), on_input=number(NAN)), "not one finite number"),
    "ia3 of a scalar": (part(ia3_l=()), "other shapes"),
    "difference of nothing": (part(diff=(0, IN)), "other shapes"),
    "difference, transposed length": (part(diff=(IN,)), "other shapes"),
    "bias of another length": (low(diff_b=(OUT + 1,)), "other shapes"),
    "bias with axes": (low(diff_b=(1, OUT, 1)), "other shapes"),
    "replaced by a scalar": (part(set_weight=()), "other shapes"),
    "lengths of nothing": (low(dora_scale=(0,)), "other shapes"),
    "one length": (low(dora_scale=()), "other shapes"),
    "lengths of two makers": (low(dora_scale=(OUT, 1), lora_magnitude_vector=(OUT,)), "other shapes"),
    "a prefix": ({"lora_unet_": torch.ones(2)}, "its one tensor does not belong"),
    "a suffix": ({".lora_up.weight": torch.ones(2), ".alpha": torch.ones(())}, "none of its 2 tensors belongs"),
    "a module": ({MODULE: torch.ones(OUT, IN)}, "its one tensor does not belong"),
    "no tensors": ({}, "is not an adapter: it holds no tensors"),
    "only embeddings of no name": ({"bundle_emb.": torch.ones(2), "bundle_emb.*": torch.ones(2)}, "only brings embed"),
    "control characters": ({"lora_unet_\n\0\x1b[31m.alpha": torch.ones(())}, "not printable"),
    "right to left": ({"\u202e" * 5000: torch.ones(())}, "not printable"),
    "a long name": ({"lora_unet_" + "a" * 100_000: torch.ones(())}, r"a\.\.\. \(100010 characters\)"),
}  # fmt: skip
READ = {  # odd, and read: what is said of it
    "rank 0": (low(rank=0), "rank 0 in 1 module"),
    "rank 0, lengths": (low(rank=0, dora_scale=(OUT, 1)), "rank 0 in 1 module"),
    "loha of rank 0": (loha(a=(OUT, 0), b=(0, IN)), "rank 0 in 1 module"),
    "alpha 0": (low(alpha=number(0)), "alpha 0 in 1 module"),
    "alpha -4": (low(alpha=number(-4)), ""),
    "alpha in a list": (low(alpha=(1,)), ""),
    "whole alpha": (low(alpha=torch.tensor(4)), ""),
    "scale 0": (low(scale=number(0)), ""),
    "rank of thousands": (low(rank=4000), ""),
    "float8": ({name: value.to(torch.float8_e4m3fn) for name, value in low().items()}, ""),
    "double": ({name: value.double() for name, value in low().items()}, ""),
    "three axes": (part(lora_down__weight=(2, IN, 1), lora_up__weight=(OUT, 2, 1)), ""),
    "a core of matrices": (low(lora_mid__weight=(2, 2)), ""),
    "half a module beside a whole": (low() | {NAMES[LINEAR.replace("in", "out")] + ".alpha": torch.ones(())}, "lacks"),
    "an unknown name of 100 kB": (low() | {"a" * 100_000: torch.ones(1)}, "holds 1 tensor of 3 that match"),
    "(IA)³ with axes": (part(weight=(1, OUT, 1, 1), on_input=number(0)), ""),
}


def saved(tmp_path, tensors, metadata=None):
    path = tmp_path / "x.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def read(path, config):
    with open_adapter(path) as file:
        return read_adapter(file, config)


def change_all(found, tensors):
    """Compute every change, as a model would."""
    for change in found.changes:
        weight = torch.ones(SHAPES[change.target])
        parts = {name: tensors[found.stored_names[change.target, name]] for name in change.tensors}
        options = {"scale": change.scale, "on_input": change.on_input, "constraint": change.constraint}
        if parts.keys() - {"bias"}:
            assert weight_change(change.kind, parts, weight, **options).shape == weight.shape
        if "bias" in parts:
            assert bias_change(parts).shape == weight.shape[:1]


@pytest.mark.parametrize(
    ("config", "case"),
    [(TINY, case) for case in REFUSED]
    + [(None, case) for case, (_, sentence) in REFUSED.items() if sentence != "other shapes"],  # than this model's
    ids=lambda value: value if isinstance(value, str) else "described" if value is None else "for a model",
)
def test_what_cannot_be_an_adapter_is_refused_in_a_sentence(tmp_path, case, config):
    tensors, sentence = REFUSED[case]
    with pytest.raises(CheckpointError, match=sentence) as found:
        read(saved(tmp_path, tensors), config)
    assert_showable(str(found.value))
    assert str(found.value).startswith("x.safetensors ")


@pytest.mark.parametrize(("tensors", "said"), READ.values(), ids=READ)
def test_what_is_odd_is_read_and_told(tmp_path, tensors, said):
    found = read(saved(tmp_path, tensors), TINY)
    told = " ".join((*found.problems, *found.notes))
    assert said in told
    assert bool(said) == bool(told)
    assert_showable(told)
    change_all(found, tensors)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"lora_adapter_metadata": "[" * 100_000}, "has metadata that is not JSON"),
        ({"lora_adapter_metadata": '{"lora_alpha": ' + "9" * 5000 + "}"}, "has metadata that is not JSON"),
        ({"lora_adapter_metadata": '{"lora_alpha": 1e999}'}, "states lora_alpha, not a usable number"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": "8"}'}, "states unet.lora_alpha, not a usable number"),
        ({"lora_adapter_metadata": json.dumps({"alpha_pattern": {f"m{i}": 1 for i in range(50_000)}})}, ""),
        ({"lora_adapter_metadata": '{"alpha_pattern": [1], "use_rslora": "yes"}'}, ""),
    ],
    ids=["nested", "digits", "infinite", "a text", "patterns", "other types"],
)
def test_settings_that_nobody_writes(tmp_path, metadata, said):
    found = read(saved(tmp_path, low(), metadata), TINY)
    assert {change.scale for change in found.changes} == {1.0}
    assert said in "".join(found.notes)
    assert bool(said) == bool(found.notes)


def test_fifty_thousand_patterns_for_every_module_take_no_time(tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"alpha_pattern": {f"m{i}": 1 for i in range(50_000)}})}
    path = lora(tmp_path / "x.safetensors", lora_shapes(conv=True), metadata)
    started = time.process_time()
    read(path, TINY)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("name", ["lora_unet_x{}.lora_up.weight", "a.lora_A.a.lora_A.{}.weight", "bundle_emb.w{}.x"])
def test_thousands_of_unknown_names_are_counted_without_much_time_or_memory(tmp_path, name):
    shapes = {key: ("float32", tuple(value.shape)) for key, value in low().items()}
    shapes |= {name.format(number): ("float32", (0,)) for number in range(5000)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(shapes, {}))
    with open_adapter(path) as file:
        read_adapter(file, TINY)  # makes the table of names
        tracemalloc.start()
        started = time.process_time()
        found = read_adapter(file, TINY)
        spent, (_, most) = time.process_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(found.unknown) + len(found.words) == 5000
    assert spent < 1  # ten times as long as needed
    assert most < 8 << 20
    assert_showable("".join(found.problems))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (call("os", "system", b"X\x04\0\0\0true"), "names code that does not belong in a checkpoint: os.system"),
        (dict_of(**{f"{MODULE}.lora_up.weight": tensor(size=(OUT, 2), stride=(0, 0))}), "lacks tensors of 1 module"),
        (
            dict_of(
                **{
                    f"{MODULE}.lora_up.weight": tensor(size=(OUT, 2), stride=(0, 1)),
                    f"{MODULE}.lora_down.weight": tensor(size=(2, IN), stride=(1, 0)),
                }
            ),
            None,  # both look at the same four numbers, again and again: torch writes such views
        ),
        (
            dict_of(
                **{
                    f"{MODULE}.lora_up.weight": tensor(size=(OUT, 10**7), stride=(0, 0)),
                    f"{MODULE}.lora_down.weight": tensor(size=(10**7, IN), stride=(0, 0)),
                }
            ),
            "exceeds the limit for bytes of all tensors",
        ),
        (
            dict_of(**{f"{MODULE}.lora_up.weight": tensor(size=(OUT, 2), stride=(2, 1))}),
            "claims 1024 bytes of storage 0, which has 16",
        ),
        (storage(), "no dictionary of tensors|no tensors|not"),
    ],
    ids=["code", "half, expanded", "overlapping views", "a rank of ten million", "beyond the storage", "a storage"],
)
def test_pickles_are_held_to_the_same_rules(tmp_path, value, sentence):
    path = tmp_path / "x.pt"
    path.write_bytes(checkpoint(as_pickle(value)))
    if sentence is None:
        assert len(read(path, TINY).changes) == 1
        return
    with pytest.raises(CheckpointError, match=sentence) as found:
        read(path, TINY)
    assert_showable(str(found.value))


def test_metadata_do_not_control_the_terminal(tmp_path, run):
    evil = "\x1b[31m\x07\u202e"
    names = ("modelspec.trigger_phrase", "ss_network_alpha", "sshs_model_hash", "ss_output_name", "modelspec.title")
    metadata = dict.fromkeys(names, evil) | {"ss_tag_frequency": json.dumps({evil: {evil: 3}}), evil: evil}
    code, lines, err = run("inspect", saved(tmp_path, low(), metadata))
    assert code == 0
    assert all(line.isprintable() for line in (*lines, *err.splitlines()))
    assert "states the alpha \\x1b[31m" in "".join(lines)


def test_an_empty_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match=r"x\.safetensors is empty"):
        read(path, TINY)
