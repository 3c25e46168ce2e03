"""Adapters on a loaded model: what they make of its weights, and that no bit of them stays."""

import copy
import os
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from adapters import FAMILY, lora, lora_shapes
from conftest import TINY, assemble, fill, pixels, settings
from make_checkpoint import made_up_state_dict, save_original, tiny
from safetensors.torch import save_file

from convert.adapters.adapter import open_adapter, read_adapter
from convert.errors import CheckpointError
from convert.files.tensors import as_tensor
from convert.layouts.adapter_names import adapted_family, kohya_names
from sd.app.cli import main
from sd.config import SD_V1_INPAINTING
from sd.pipeline.errors import SettingError
from sd.pipeline.runner import PRECISIONS, Runner
from sd.runtime.adapters import OpenAdapter
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.runtime.loading import load

Q = "unet.middle_block.attention.blocks.0.self_attention.q"
CONV = "unet.middle_block.residual1.conv1"
NAMES = kohya_names(FAMILY)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters of several kinds: paths by name."""
    folder = tmp_path_factory.mktemp("adapters")
    generator = torch.Generator().manual_seed(4)
    norm = NAMES["unet.middle_block.residual1.norm1"]
    full = {
        f"{NAMES[CONV]}.diff": (128, 128, 3, 3),
        f"{NAMES[CONV]}.diff_b": (128,),
        f"{NAMES[Q]}.diff_b": (128,),  # it has no bias of its own
        f"{norm}.w_norm": (128,),
    }
    full = {name: torch.randn(shape, generator=generator) / 30 for name, shape in full.items()}
    save_file(full, folder / "full.safetensors")
    text = {name: shape for name, shape in lora_shapes().items() if "lora_te" in name}
    return {
        "lora": lora(folder / "lora.safetensors", lora_shapes(rank=3), seed=1),
        "locon": lora(folder / "locon.pt", lora_shapes(rank=2, conv=True), seed=2, dtype=torch.float32, size=0.3),
        "text": lora(folder / "text.safetensors", text, seed=3),
        "full": folder / "full.safetensors",
    }


@pytest.fixture(scope="module")
def kept():
    """By precision: a loaded model, and what its weights were."""
    return {}


@pytest.fixture
def loaded_in(kept, tiny_ckpt):
    """The narrow model in a precision. After each test, its adapters are taken off, and no bit of them is left."""
    used = []

    def loaded_in(precision):
        if precision not in kept:
            model = load(tiny_ckpt, device="cpu", precision=precision)
            kept[precision] = model, state_of(model)
        used.append(precision)
        return kept[precision][0]

    yield loaded_in
    for precision in used:
        model, before = kept[precision]
        model.apply([])
        assert same(state_of(model), before)


@pytest.fixture
def loaded(loaded_in):
    return loaded_in("fp32")


def weight_of(model, target):
    return model.unet.get_submodule(target.removeprefix("unet.")).weight


def state_of(model):
    """A copy of what adapters may change."""
    parts = {"unet": model.unet, "text_encoder": model.text_encoder}
    return {f"{part}.{name}": value.clone() for part, net in parts.items() for name, value in net.state_dict().items()}


def same(first, second):
    """Whether all bits of two states, and their precisions, are the same."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def picture(model, **options):
    return pixels(model.make([settings(steps=1, **options)])[0])


def changes_in(path, strength, text_strength=None):
    """What a file of LoRA or LoCon adds to each weight: the formula, in float64."""
    file = open_adapter(path)
    changes = {}
    for change in read_adapter(file, TINY).changes:
        s = strength if text_strength is None or change.target.startswith("unet.") else text_strength
        up, down = (as_tensor(file, change.tensors[part]).double() for part in ("up", "down"))
        changes[f"{change.target}.weight"] = s * change.alpha / change.rank * up.flatten(1) @ down.flatten(1)
    return changes


def with_changes(state, *changes):
    state = {name: value.double() for name, value in state.items()}
    for name, change in (pair for each in changes for pair in each.items()):
        state[name] = state[name] + change.reshape(state[name].shape)
    return state


def worst(model, expected):
    """The largest relative difference of a weight."""
    found = state_of(model)
    assert found.keys() == expected.keys()
    return max(((found[name].double() - value).norm() / value.norm()).item() for name, value in expected.items())


@pytest.mark.slow
def test_a_weight_is_its_base_and_the_sum_of_all_changes(loaded, files):
    """Of one adapter at every sign of strength, and of three at once; each list begins with the base."""
    before = state_of(loaded)
    for used in ([("lora", 1)], [("locon", -1, 0)], [("text", 0, 0.7)], [("lora", 1), ("locon", 0.5), ("text", -1)]):
        loaded.apply([(files[name], *strengths) for name, *strengths in used])
        changes = [changes_in(files[name], *strengths) for name, *strengths in used]
        assert worst(loaded, with_changes(before, *changes)) < 1e-6
    assert [(each.name, each.strength, each.text_strength) for each in loaded.adapters] == [
        ("lora", 1, 1),
        ("locon", 0.5, 0.5),
        ("text", -1, -1),
    ]
    assert loaded.adapters[0].changes == {"unet": 192, "text_encoder": 12}
    loaded.apply([])
    assert same(state_of(loaded), before)
    assert loaded.adapters == ()


SOURCES = {  # what a model is loaded from, made by a conversion of the narrow checkpoint; in which precision and how
    "pickle": ([], "bf16", {}),
    "ours": (["x.safetensors"], "fp32", {}),
    "fp16": (["x.safetensors", "--precision", "fp16"], "fp16", {}),
    "fp16, widened": (["x.safetensors", "--precision", "fp16"], "fp32", {}),
    "folder": (["x", "--to", "diffusers"], "bf16", {}),
    "averages": ([], "fp32", {"weights": "ema"}),
    "low memory": ([], "fp32", {"low_memory": True}),
}
SLOW = "ours", "fp16", "fp16, widened", "folder", "averages", "low memory"


@pytest.mark.parametrize("source", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in SOURCES])
def test_no_bit_of_an_adapter_stays(tiny_ckpt, files, tmp_path, source):
    conversion, precision, options = SOURCES[source]
    path = tiny_ckpt
    if conversion:
        path = tmp_path / conversion[0]
        assert main(["convert", str(tiny_ckpt), str(path), *conversion[1:], "-q"]) == 0
    model = load(path, device="cpu", precision=precision, **options)
    before, plain = state_of(model), picture(model)
    model.apply([files["locon"]])
    changed = picture(model)
    assert abs(changed - plain).max() > 5
    error = {"fp32": 1e-6, "bf16": 5e-3, "fp16": 1e-3}[precision]
    assert worst(model, with_changes(before, changes_in(files["locon"], 1))) < error
    model.apply([files["full"]])
    model.apply([])
    assert same(state_of(model), before)
    assert (picture(model) == plain).all()
    model.apply([files["locon"]])
    assert (picture(model) == changed).all()


@pytest.mark.slow
def test_with_another_vae_the_weights_are_still_those_of_the_model(tiny_ckpt, files):
    model = load(tiny_ckpt, device="cpu", precision="fp32", vae=tiny_ckpt)
    before = state_of(model)
    model.apply([files["lora"]])
    assert worst(model, with_changes(before, changes_in(files["lora"], 1))) < 1e-6
    model.apply([])
    assert same(state_of(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_base_is_read_in_the_files_precision_and_rounded_once(loaded, loaded_in, tmp_path, precision):
    base, target = weight_of(loaded, Q), weight_of(loaded_in(precision), Q)
    small = lora(tmp_path / "a.safetensors", {f"{NAMES[Q]}.diff": tuple(base.shape)}, size=0.002)
    loaded_in(precision).apply([small])
    file = open_adapter(small)
    (record,) = file.root.values()
    change, dtype = as_tensor(file, record).float(), PRECISIONS[precision]
    assert torch.equal(target, (base + change).to(dtype))
    assert not torch.equal(target, (base.to(dtype) + change).to(dtype))  # rounded twice


@pytest.mark.slow
def test_order_and_history_do_not_matter(loaded, files):
    a, b, c = ((files[name], strength) for name, strength in (("lora", 0.8), ("locon", -0.3), ("text", 1)))
    loaded.apply([a, b, c])
    expected = state_of(loaded)
    for history in ([a], [c, (files["lora"], 0.2)], [b], [c, b, a]):
        loaded.apply(history)
    assert same(state_of(loaded), expected)
    loaded.apply([])
    loaded.apply([b, a, c])
    assert same(state_of(loaded), expected)


def test_the_same_list_again_does_nothing(loaded, files, monkeypatch):
    given = [(files["lora"], 0.5), (str(files["locon"]), 1)]
    loaded.apply(given)
    used = loaded.adapters
    with monkeypatch.context() as patch:
        patch.setattr("sd.runtime.adapted_weights.WeightChanges.set", None)
        loaded.apply(given)
    assert all(first is second for first, second in zip(used, loaded.adapters, strict=True))


def test_an_adapter_that_was_read_already_is_taken_as_it_is(loaded, files):
    with open_adapter(files["lora"]) as file:
        loaded.apply([(OpenAdapter(file, read_adapter(file, TINY)), 0.5)])
    expected = state_of(loaded)
    loaded.apply([])
    loaded.apply([(files["lora"], 0.5)])
    assert same(state_of(loaded), expected)


def test_differences_of_biases_and_norms_are_added_and_a_missing_bias_is_made(loaded, files):
    before = state_of(loaded)
    loaded.apply([(files["full"], 0.5)])
    changed = {
        name for name, value in state_of(loaded).items() if name not in before or not torch.equal(value, before[name])
    }
    norm = "unet.middle_block.residual1.norm1.weight"
    assert changed == {f"{CONV}.weight", f"{CONV}.bias", f"{Q}.bias", norm}
    file = open_adapter(files["full"])
    expected = 0.5 * as_tensor(file, file.root[f"{NAMES[Q]}.diff_b"])
    assert torch.equal(state_of(loaded)[f"{Q}.bias"], expected)
    loaded.apply([])
    assert same(state_of(loaded), before)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_were_trained_are_the_base(tiny_ckpt, files, precision):
    """Also a packed one, and those that some optimisers change without a trace."""
    model = load(tiny_ckpt, device="cpu", precision=precision)
    weight_of(model, Q).mul_(2)
    weight_of(model, CONV).data.mul_(2)
    weight_of(model, Q.replace(".q", ".k")).data = 2 * weight_of(model, Q)
    before = state_of(model)
    model.apply([files["locon"]])
    assert worst(model, with_changes(before, changes_in(files["locon"], 1))) < {"fp32": 1e-6, "bf16": 5e-3}[precision]
    model.apply([files["lora"]])
    model.apply([])
    assert same(state_of(model), before)


def test_what_is_trained_on_top_of_an_adapter_is_the_base_of_the_next(tiny_ckpt, files):
    model = load(tiny_ckpt, device="cpu", precision="fp32")
    model.apply([files["lora"]])
    weight = weight_of(model, Q)
    weight.mul_(2)
    trained = weight.clone()
    model.apply([files["text"]])
    assert torch.equal(weight, trained)
    model.apply([(files["text"], 2)])
    model.apply([])
    assert torch.equal(weight, trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "kind"),
    [
        pytest.param("before", "float", marks=pytest.mark.slow),
        pytest.param("meanwhile", "float", marks=pytest.mark.slow),
        ("meanwhile", "half"),
    ],
)
def test_another_precision_is_no_other_base(tiny_ckpt, loaded, files, when, kind):
    """As after a network has failed in a narrow one. The base has been through the same precisions."""
    model, other = (load(tiny_ckpt, device="cpu", precision="bf16") for _ in range(2))
    if when == "meanwhile":
        model.apply([files["locon"]])
    for network in (model.unet, model.text_encoder, other.unet, other.text_encoder):
        getattr(network, kind)()
    model.apply([files["lora"]])
    loaded.apply([files["lora"]])
    expected = weight_of(loaded, Q).to(weight_of(model, Q).dtype)  # from the file, rounded once
    assert torch.equal(weight_of(model, Q), expected)
    model.apply([])
    assert same(state_of(model), state_of(other))


FAULTS = {  # a file or argument, the precision of the model, the error, a part of its sentence
    "no file": ("nothere.safetensors", "fp32", CheckpointError, "nothere.safetensors does not exist"),
    "NaN": ("nan.safetensors", "fp32", CheckpointError, f"NaN or infinite values in 1 tensor: {NAMES[Q]}.lora_up"),
    "too large": (("large.safetensors", 1e9), "fp16", SettingError, "out of the range of fp16"),
    "huge": (("large.safetensors", 1e300), "fp32", SettingError, "out of the range of fp32"),
    "checkpoint": ("tiny.ckpt", "fp32", CheckpointError, "tiny.ckpt"),
    "strength": (("large.safetensors", "1"), "fp32", SettingError, "finite numbers"),
    "infinite": (("large.safetensors", float("nan")), "fp32", SettingError, "finite numbers"),
    "form": (("large.safetensors", 1, 1, 1), "fp32", SettingError, "a path, (path, strength)"),
    "endless": (("large.safetensors", 10**400), "fp32", SettingError, "finite numbers"),
    "nothing": ((), "fp32", SettingError, "a path, (path, strength)"),
    "number": (3, "fp32", SettingError, "a path, (path, strength)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_with_one_that_cannot_be_used_everything_stays(loaded_in, tiny_ckpt, files, tmp_path, monkeypatch, fault):
    given, precision, error, sentence = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.ckpt").symlink_to(tiny_ckpt)
    lora(tmp_path / "large.safetensors", lora_shapes(), seed=5)
    nan = {f"{NAMES[Q]}.lora_up.weight": torch.full((128, 4), torch.nan)}
    lora(tmp_path / "nan.safetensors", lora_shapes(), extra=nan)
    model = loaded_in(precision)
    model.apply([files["locon"]])
    state, used = state_of(model), model.adapters
    with pytest.raises(error) as caught:
        model.apply([files["lora"], given])
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert same(state_of(model), state)
    assert model.adapters == used


@pytest.mark.parametrize("form", [str, bytes, lambda path: {path: 0.5}])
def test_one_path_is_no_list_of_paths(loaded, files, form):
    with pytest.raises(SettingError, match="must be a list"):
        loaded.apply(form(files["lora"]))


def test_an_interrupt_leaves_the_model_as_it_was(loaded, files, monkeypatch):
    from sd.runtime import adapted_weights

    loaded.apply([files["lora"]])
    before, own, calls = state_of(loaded), adapted_weights.in_range, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 100:
            raise KeyboardInterrupt
        return own(*given)

    monkeypatch.setattr(adapted_weights, "in_range", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loaded.apply([files["locon"]])
    assert len(calls) > 100  # some were changed, and changed back
    assert same(state_of(loaded), before)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("copied", "precision"),
    [
        (copy.deepcopy, "fp32"),
        (pickled, "bf16"),
        pytest.param(copy.deepcopy, "bf16", marks=pytest.mark.slow),
        pytest.param(pickled, "fp32", marks=pytest.mark.slow),
    ],
)
def test_copies_take_their_adapters_along_and_off(loaded_in, files, copied, precision):
    model = loaded_in(precision)
    plain = state_of(model)
    model.apply([files["locon"]])
    changed = state_of(model)
    other = copied(model)
    assert other.adapters == model.adapters
    assert same(state_of(other), changed)
    other.apply([files["lora"]])
    other.apply([])
    assert same(state_of(other), plain)
    assert same(state_of(model), changed)
    other.apply([files["locon"]])
    error = {"fp32": 0, "bf16": 5e-3}[precision]  # a pickle's base is in the model's precision, not the file's
    assert worst(other, {name: value.double() for name, value in changed.items()}) <= error


def test_adapters_stay_while_a_picture_is_made(loaded, files):
    with pytest.raises(RuntimeError, match="while a picture is being made"):
        loaded.make([settings(steps=2)], on_step=lambda latents: loaded.apply([files["lora"]]))
    steps = loaded.sample([settings(steps=2)])
    next(steps)
    with pytest.raises(RuntimeError, match="while a picture is being made"):
        loaded.apply([])
    steps.close()
    loaded.apply([files["lora"]])
    made = []
    with loaded.runner.weights.lock:  # as while adapters change
        thread = threading.Thread(target=lambda: made.append(picture(loaded)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not made
    thread.join()
    assert (made[0] == picture(loaded)).all()


@pytest.fixture(scope="module")
def baked(files):
    """A model that was never loaded, whose weights have half of an adapter in them."""
    model = assemble(TINY, fill(TINY))
    changed = with_changes(state_of(model), changes_in(files["locon"], 0.5))
    for part in ("unet", "text_encoder"):
        mine = {name.removeprefix(f"{part}."): v.float() for name, v in changed.items() if name.startswith(f"{part}.")}
        getattr(model, part).load_state_dict(mine)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"tile": "x"}, {"merge_tokens": 0.5}))],
    ids=str,
)
def test_every_way_to_compute_uses_the_changed_weights(loaded, files, baked, options):
    """Packed and Winograd weights included: the model has made a picture before."""
    options |= {"width": 256, "height": 256}
    before = picture(loaded, **options)
    loaded.apply([(files["locon"], 0.5)])
    found = picture(loaded, **options)
    assert abs(found - picture(baked, **options)).max() <= 1
    assert abs(found - before).max() > 3
    loaded.apply([])
    assert (picture(loaded, **options) == before).all()


def test_a_model_that_is_from_no_file_keeps_its_weights_until_adapters_are_off(files):
    model = assemble(TINY, fill(TINY))
    before, weights = state_of(model), list(model.unet.parameters())
    places = [weight.data_ptr() for weight in weights]
    model.apply([files["lora"]])
    assert worst(model, with_changes(before, changes_in(files["lora"], 1))) < 1e-6
    model.apply([files["locon"]])
    model.apply([])
    assert same(state_of(model), before)
    assert [weight.data_ptr() for weight in weights] == places


def test_without_the_loaders_runner_it_says_so(model):
    plain = replace(model, runner=Runner())
    with pytest.raises(SettingError, match="adapters need a model from sd"):
        plain.apply([])
    assert plain.adapters == ()


@pytest.mark.slow
def test_weights_that_visit_a_device_are_changed_at_home(files):
    model = assemble(TINY, fill(TINY))
    expected = replace(model, runner=Execution())
    model.runner = Execution(RunOptions(low_memory=True), torch.device("cpu"))
    before = picture(model)
    model.apply([files["locon"]])
    changed = picture(model)
    assert abs(changed - before).max() > 5
    assert abs(picture(expected) - changed).max() <= 1  # the same networks
    model.apply([])
    assert (picture(model) == before).all()


def test_a_first_convolution_with_more_channels_is_changed_in_the_latents_only(tmp_path):
    config = tiny(SD_V1_INPAINTING)
    path = tmp_path / "inpainting.ckpt"
    save_original(path, made_up_state_dict(config))
    names = kohya_names(adapted_family(TINY))
    first = f"{names['unet.input_blocks.0.conv']}.diff"
    adapter = lora(tmp_path / "first.safetensors", {first: (32, 4, 3, 3)}, dtype=torch.float32)
    model = load(path, device="cpu", precision="fp32")
    before = state_of(model)["unet.input_blocks.0.conv.weight"]
    model.apply([adapter])
    change = state_of(model)["unet.input_blocks.0.conv.weight"] - before
    file = open_adapter(adapter)
    assert torch.allclose(change[:, :4], as_tensor(file, file.root[first]), atol=1e-6)
    assert not change[:, 4:].any()


def test_words_that_an_adapter_brings_along_are_known_while_it_is_used(loaded, files, tmp_path):
    word = {"bundle_emb.blorb.string_to_param.*": torch.ones(2, 64)}
    adapter = lora(tmp_path / "style.safetensors", lora_shapes(), extra=word)
    plain, before = loaded.tokenizer.encode("a blorb"), state_of(loaded)
    loaded.apply([adapter])
    assert loaded.tokenizer.encode("a blorb") == [320, 49408, 49409]
    loaded.apply([files["lora"]])
    assert loaded.tokenizer.encode("a blorb") == plain
    loaded.apply([])
    assert same(state_of(loaded), before)


def test_one_that_is_applied_can_be_given_again(loaded, files):
    loaded.apply([(files["lora"], 0.5, 1)])
    (first,) = loaded.adapters
    loaded.apply([*loaded.adapters, files["text"]])
    assert loaded.adapters[0] is first
    assert [each.strength for each in loaded.adapters] == [0.5, 1]
    loaded.apply([(first, 2)])
    assert [(each.path, each.strength, each.text_strength) for each in loaded.adapters] == [(first.path, 2, 2)]


def test_a_folder_for_two_networks_is_not_its_first_one(loaded, tmp_path):
    """Nor are other settings beside the same weights the same adapter."""
    target = "text_encoder.layers.0.attention.v.weight"
    modules = {
        "unet": ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 128),
        "text_encoder": ("text_model.encoder.layers.0.self_attn.v_proj", 64),
    }
    for network, (name, width) in modules.items():
        folder = tmp_path / network
        folder.mkdir()
        shapes = {"lora_A": (2, width), "lora_B": (width, 2)}
        ones = {f"base_model.model.{name}.{part}.weight": torch.ones(shape) for part, shape in shapes.items()}
        save_file(ones, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    before = state_of(loaded)[target]
    loaded.apply([tmp_path / "unet"])
    assert torch.equal(state_of(loaded)[target], before)
    loaded.apply([tmp_path])
    assert torch.allclose(state_of(loaded)[target], before + 2)
    (tmp_path / "text_encoder" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 8}')
    loaded.apply([tmp_path])
    assert torch.allclose(state_of(loaded)[target], before + 8)
    other = pickle.loads(pickle.dumps(loaded))
    other.apply([(other.adapters[0], 0.5)])
    assert torch.allclose(state_of(other)[target], before + 4)


def test_a_file_that_changes_after_it_was_applied(loaded, files, tmp_path):
    """Replaced, its hash is not noted any more; overwritten, nothing is read of it again: that would be a signal."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(files["lora"].read_bytes())
    loaded.apply([path])
    assert loaded.adapters[0].autov3() is not None
    changed = state_of(loaded)
    (tmp_path / "b").write_bytes(files["text"].read_bytes())
    (tmp_path / "b").replace(path)
    assert loaded.adapters[0].autov3() is None
    with pytest.raises(SettingError):
        loaded.apply([(files["locon"], 1e300)])
    assert same(state_of(loaded), changed)
    loaded.apply([path])
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="All adapters are off now: a cannot be applied again"):
        loaded.apply([(files["locon"], 1e300)])
    assert loaded.adapters == ()


@pytest.mark.slow
def test_networks_can_be_cast_when_an_adapter_is_gone(tiny_ckpt, tmp_path):
    path = lora(tmp_path / "a.safetensors", lora_shapes())
    model, other = (load(tiny_ckpt, device="cpu", precision="fp32") for _ in range(2))
    model.apply([path])
    os.truncate(path, 1000)
    for each in (model, other):
        each.unet.half()
    model.apply([])
    assert same(state_of(model), state_of(other))


def test_a_picture_notes_the_adapters_that_it_was_made_with(loaded, files, monkeypatch):
    """Whatever other threads do between the last step and the note."""
    texts = loaded.texts

    def late(*given):
        with pytest.raises(RuntimeError, match="while a picture is being made"):
            loaded.apply([])
        return texts(*given)

    monkeypatch.setattr(loaded, "texts", late)
    loaded.apply([files["lora"]])
    (made,) = loaded.txt2img("a cat", width=64, height=64, steps=1)
    assert '"lora": ["lora:1"]' in made.info["sd"]
