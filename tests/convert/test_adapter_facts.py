"""What is said of an adapter, and the hashes by which programs name it."""

import hashlib
import json

import pytest
import torch
from adapters import lora, lora_shapes
from safetensors.torch import load_file, save_file

from convert.actions.inspect import inspect
from convert.adapters.hashes import autov3
from convert.layouts.adapter_names import FAMILIES

V1, V2, XL, _ = FAMILIES
TAGS = {"10_cat": {"cat": 10, "sitting": 4}, "5_more": {" cat": 2, "": 7, "odd": "x"}, "6": []}


@pytest.fixture(scope="module")
def detail(tmp_path_factory):
    metadata = {"ss_tag_frequency": json.dumps(TAGS), "modelspec.trigger_phrase": "my cat", "ss_network_alpha": "1"}
    return lora(tmp_path_factory.mktemp("adapters") / "detail.safetensors", lora_shapes(V1, rank=2), metadata)


def test_what_an_adapter_changes_is_counted(detail):
    facts = inspect(detail).adapter
    assert (facts.family, facts.kinds, facts.ranks) == ("sd-v1", {"LoRA": 264}, {"2": 264})
    assert facts.modules == {"UNet": 192, "text encoder": 72}
    assert (facts.alphas, facts.scales, facts.plain, facts.dora) == ({"1": 264}, {"0.5": 264}, True, 0)
    assert (facts.trigger, facts.captions) == ("my cat", {"cat": 12, "sitting": 4})


@pytest.mark.parametrize("tags", ["", "[", "[1]", '{"a": 1}', "[" * 100_000, '{"a": {"b": 1e999}}'])
def test_odd_captions_are_passed_over(tmp_path, tags):
    shapes = {name: shape for name, shape in lora_shapes().items() if "proj_in" in name}
    assert inspect(lora(tmp_path / "a.safetensors", shapes, {"ss_tag_frequency": tags})).adapter.captions == {}


def test_the_page_of_an_adapter(run, detail):
    code, lines, _ = run("inspect", detail)
    text = "\n".join(lines)
    assert code == 0
    for part in (
        "usable       with a Stable Diffusion 1 model: --lora detail",
        "adapter      for Stable Diffusion 1: LoRA (264 modules)",
        "rank         2, alpha 1: scale 0.5",
        "trigger      my cat",
        "captions     cat (12), sitting (4)",
        f"AutoV3       {autov3(detail)[:12]}",
    ):
        assert part in text
    code, lines, _ = run("inspect", "--json", detail)
    assert json.loads(lines[0])["adapter"]["modules"] == {"UNet": 192, "text encoder": 72}


@pytest.mark.slow
def test_an_adapter_of_xl_is_used_with_xl(run, tmp_path):
    path = lora(tmp_path / "xl.safetensors", lora_shapes(XL, rank=1))
    code, lines, _ = run("inspect", path, path)
    assert code == 0
    assert "with a Stable Diffusion XL model: --lora xl" in lines[1]


def test_what_makes_an_adapter_unusual_is_said(run, tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    extra = {f"{name}.dora_scale": torch.ones(1280, 1), "lora_unet_nowhere.alpha": torch.tensor(1.0)}
    shapes = {
        key: shape for key, shape in lora_shapes(V1, rank=2).items() if key.startswith(name) and "alpha" not in key
    }
    path = lora(tmp_path / "d.safetensors", shapes, {"ss_network_alpha": "8"}, extra=extra)
    text = "\n".join(run("inspect", path)[1])
    assert "1 module with a DoRA magnitude" in text
    assert "strength     programs agree at 1" in text
    assert "unknown      1 tensor of no module: lora_unet_nowhere.alpha" in text
    assert "states the alpha 8 in its metadata, but has no alpha tensor for 1 module, whose scale is 1." in text


def test_the_hash_of_the_tensors_does_not_change_with_the_metadata(tmp_path, detail):
    save_file(load_file(detail), again := tmp_path / "again.safetensors", {"other": "words"})
    data = detail.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert autov3(detail) == autov3(again) == hashlib.sha256(data[start:]).hexdigest()
    assert inspect(detail).sha256 == hashlib.sha256(data).hexdigest() != inspect(again).sha256


def test_of_a_pickle_all_is_hashed(tmp_path):
    path = lora(tmp_path / "a.pt", {name: shape for name, shape in lora_shapes().items() if "proj_in" in name})
    assert autov3(path) == hashlib.sha256(path.read_bytes()).hexdigest()
