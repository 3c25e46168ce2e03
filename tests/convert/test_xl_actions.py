"""What is done with files of Stable Diffusion XL: both text encoders take part, and are named."""

import json

import make_checkpoint
import pytest
import torch
from adapters import lora, lora_shapes
from conftest import TINY, refused, rest_slow
from safetensors.torch import load_file, save_file
from weights_of import stored

from convert.actions.bake import Baking, Strengths
from convert.actions.convert import convert
from convert.layouts.adapter_names import adapted_family, kohya_names
from sd.config import SDXL, SDXL_INPAINTING, SDXL_REFINER
from sd.networks.adapters.weight_change import weight_change

CONFIG, REFINER, INPAINTING = (make_checkpoint.tiny(each) for each in (SDXL, SDXL_REFINER, SDXL_INPAINTING))
FAMILY = adapted_family(CONFIG)


def written(path, config, seed=0, **options):
    state = make_checkpoint.made_up_state_dict(config, seed, **options)
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    found = {name: written(folder / f"{name}.safetensors", CONFIG, seed) for seed, name in enumerate("abc")}
    return found | {"wide": written(folder / "wide.safetensors", INPAINTING, 7)}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return lora(tmp_path_factory.mktemp("adapters") / "detail.safetensors", lora_shapes(FAMILY, conv=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", rest_slow(["original", "diffusers"]))
def test_baked_adapters_are_the_sum_in_every_network(tmp_path, models, adapter, layout, run):
    target = tmp_path / ("baked" if layout == "diffusers" else "baked.safetensors")
    code, _, err = run("convert", models["a"], target, "--to", layout, "--lora", f"{adapter}:0.5:-1", "--no-hash")
    assert code == 0, err
    assert "(307 of the UNet, 18 of the text encoder and 18 of the second text encoder)" in err
    base, found, tensors = stored(models["a"]), stored(target), load_file(adapter)
    names = {f"{ours}.weight": name for ours, name in kohya_names(FAMILY).items() if f"{name}.alpha" in tensors}
    assert base.keys() == found.keys()
    for ours, value in found.items():
        wanted = base[ours].double()
        if name := names.get(ours):
            down, up = (tensors[f"{name}.lora_{part}.weight"].double().flatten(1) for part in ("down", "up"))
            strength = 0.5 if ours.startswith("unet.") else -1.0
            wanted = wanted + (strength * 0.5 * up @ down).reshape(wanted.shape)
        assert (value - wanted).norm() <= 1e-6 * wanted.norm(), ours


CHANGED = {  # one layer of each network -> its name in a LoRA
    "model.diffusion_model.input_blocks.4.1.proj_in.weight": "lora_unet_input_blocks_4_1_proj_in",
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    ),
    "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.weight": (
        "lora_te2_text_model_encoder_layers_1_mlp_fc1"
    ),
    "conditioner.embedders.1.model.text_projection": "lora_te2_text_projection",
}


def test_what_is_extracted_gives_the_other_model_when_it_is_added(tmp_path, models, run):
    state, tuned = load_file(models["a"]), tmp_path / "tuned.safetensors"
    generator = torch.Generator().manual_seed(1)
    for name in CHANGED:
        outputs, inputs = state[name].shape
        factors = torch.randn(outputs, 2, generator=generator), torch.randn(2, inputs, generator=generator)
        state[name] += 0.02 * factors[0] @ factors[1]
    save_file(state, tuned)
    code, _, err = run("extract", models["a"], tuned, "-o", "lora.safetensors", "--rank", "2", "--precision", "fp32")
    assert code == 0, err
    for part in ("UNet input_blocks.4", "text encoder encoder.layers.0", "second text encoder encoder.layers.1"):
        assert f"  {part} " in err
    found = load_file(tmp_path / "lora.safetensors")
    assert {name.partition(".")[0] for name in found} == set(CHANGED.values())
    convert(
        models["a"],
        tmp_path / "again.safetensors",
        changing=Baking([Strengths(tmp_path / "lora.safetensors")], weight_change),
        hash_source=False,
    )
    wanted = stored(tuned)
    for ours, value in stored(tmp_path / "again.safetensors").items():
        assert (value - wanted[ours]).norm() <= 1e-6 * wanted[ours].norm(), ours


@pytest.mark.slow
@pytest.mark.parametrize("third", [False, True])
def test_merged_networks_are_those_of_the_formula(models, third, run):
    paths = [models[name] for name in ("abc" if third else "ab")]
    code, _, err = run("merge", *paths, "-o", "x.safetensors", "--weight", "0.3", "--no-hash")
    assert code == 0, err
    assert "718 tensors of the UNet, 52 tensors of the text encoder and 53 tensors of the second text encoder" in err
    a, b, *c = map(stored, paths)
    for ours, value in stored("x.safetensors").items():
        change = 0 if ours.startswith("vae.") else b[ours].double() - (c[0] if third else a)[ours]
        wanted = a[ours].double() + 0.3 * change
        assert (value - wanted).norm() <= 1e-6 * wanted.norm(), ours


def test_a_difference_makes_a_model_for_inpainting(models, run):
    code, _, err = run("merge", models["wide"], models["b"], models["c"], "-o", "x.safetensors", "--no-hash")
    assert code == 0, err
    assert "the 5 channels that only wide.safetensors reads stay as they are" in err


@pytest.mark.parametrize("config", [TINY, REFINER], ids=lambda config: config.family)
def test_models_of_other_families_are_not_merged(tmp_path, models, config, run):
    other = written(tmp_path / "other.safetensors", config)
    refused(run("merge", models["a"], other, "-o", "x.safetensors", "--no-hash"), "other.safetensors is not built like")
    refused(run("merge", other, models["a"], "-o", "x.safetensors", "--no-hash"), "a.safetensors is not built like")


def test_what_differs_is_told_of_each_text_encoder(models, run):
    code, out, _ = run("diff", models["a"], models["b"], "--json")
    parts = {block["part"] for block in json.loads(out[0])["blocks"]}
    assert (code, parts) == (1, {"unet", "vae", "text_encoder", "text_encoder_2"})
    _, out, _ = run("diff", models["a"], models["b"])
    titles = [line.partition(":")[0] for line in out if line.endswith("by block")]
    assert titles == ["UNet", "VAE", "text encoder", "second text encoder"]
