"""Adapters on a loaded model: what they make of its weights, and that no bit of them stays."""

import pytest
import torch
from adapters import FAMILY, lora, lora_shapes
from conftest import TINY, pixels, settings
from safetensors.torch import save_file

import sd
from convert.adapters.adapter import open_adapter, read_adapter
from convert.layouts.adapter_names import kohya_names

Q = "unet.middle_block.attention.blocks.0.self_attention.q"
CONV = "unet.middle_block.residual1.conv1"
NAMES = kohya_names(FAMILY)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters of several kinds: paths by name."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = {
        "lora": lora(folder / "lora.safetensors", lora_shapes(rank=3), seed=1),
        "locon": lora(folder / "locon.pt", lora_shapes(rank=2, conv=True), seed=2, dtype=torch.float32),
        "text": lora(folder / "text.safetensors", {n: s for n, s in lora_shapes().items() if "lora_te" in n}, seed=3),
    }
    generator = torch.Generator().manual_seed(4)
    full = {f"{NAMES[CONV]}.diff": torch.randn(128, 128, 3, 3, generator=generator) / 30}
    full |= {f"{NAMES[CONV]}.diff_b": torch.randn(128, generator=generator)}
    full |= {f"{NAMES[Q]}.diff_b": torch.randn(128, generator=generator)}  # without a bias of its own
    full |= {f"{NAMES['unet.middle_block.residual1.norm1']}.w_norm": torch.randn(128, generator=generator)}
    save_file(full, folder / "full.safetensors")
    return {**paths, "full": folder / "full.safetensors"}


def state_of(model):
    """A copy of what the adapters may change."""
    parts = {"unet": model.unet, "text_encoder": model.text_encoder}
    return {f"{part}.{name}": value.clone() for part, net in parts.items() for name, value in net.state_dict().items()}


def same(first, second):
    """Whether all bits of two states, and their precisions, are the same."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def picture(model, **options):
    return pixels(model.make([settings(steps=1, **options)])[0])


def formula(path, strength, text_strength=None):
    """What a file of LoRA or LoCon adds to each weight, in float64."""
    file = open_adapter(path)
    adapter = read_adapter(file, TINY)
    from convert.files.tensors import as_tensor

    changes = {}
    for change in adapter.changes:
        s = strength if text_strength is None or change.target.startswith("unet.") else text_strength
        up, down = (as_tensor(file, change.tensors[part]).double() for part in ("up", "down"))
        flat = s * change.alpha / change.rank * up.flatten(1) @ down.flatten(1)
        changes[f"{change.target}.weight"] = flat.unflatten(1, down.shape[1:]).squeeze() if down.dim() > 2 else flat
    return changes


def with_changes(state, *changes):
    state = {name: value.double() for name, value in state.items()}
    for each in changes:
        for name, change in each.items():
            state[name] = state[name] + change.reshape(state[name].shape)
    return state


def worst(model, expected):
    """The largest relative difference of a weight."""
    found = state_of(model)
    assert found.keys() == expected.keys()
    return max(((found[name].double() - value).norm() / value.norm()).item() for name, value in expected.items())


@pytest.mark.parametrize("strengths", [(1,), (0.5,), (-1, 0), (0, 0.7)])
@pytest.mark.parametrize("name", ["lora", "locon", "text"])
def test_a_weight_is_its_base_and_the_change(tiny_ckpt, files, name, strengths):
    model = sd.load(tiny_ckpt, device="cpu", precision="fp32")
    before = state_of(model)
    model.apply([(files[name], *strengths)])
    assert worst(model, with_changes(before, formula(files[name], *strengths))) < 1e-6
    assert model.adapters[0].changes == {**({} if name == "text" else {"unet": 192}), "text_encoder": 12} | (
        {"unet": 278} if name == "locon" else {}
    )
    model.apply([])
    assert same(state_of(model), before)
    assert model.adapters == ()
