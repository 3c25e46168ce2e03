"""Merged models against the formulas, by hand and in float64; what cannot be merged is refused."""

import hashlib
import json
from dataclasses import replace

import make_checkpoint
import pytest
import torch
from conftest import TINY, refused
from safetensors import safe_open
from safetensors.torch import save_file
from weights_of import stored

import sd
from convert.actions.convert import convert
from convert.actions.merge import Merging, Share
from convert.actions.target import TargetError
from convert.layouts.names import parameter_shapes
from sd.config import SD_V1_INPAINTING, SD_V2, SD_V2_DEPTH
from sd.networks.block_plan import block_plan

CONV_IN = "unet.input_blocks.0.conv.weight"
ORIGINAL_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
WIDE = make_checkpoint.tiny(SD_V1_INPAINTING)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of other weights, and one for inpainting."""
    folder, paths = tmp_path_factory.mktemp("models"), {}
    for seed, name in enumerate("abc"):
        paths[name] = folder / f"{name}.safetensors"
        state = make_checkpoint.made_up_state_dict(TINY, seed)
        save_file(state, paths[name], {"sd_merge_recipe": '{"of": "b"}'} if name == "b" else None)
    paths["wide"] = folder / "wide.safetensors"
    save_file(make_checkpoint.made_up_state_dict(WIDE, 7), paths["wide"])
    return paths


def merged(target, first, second, third, share, **options):
    options = {"hash_source": False} | options
    convert(first, target, changing=Merging(second, third, share, hashed=False), **options)
    return stored(target)


def close(found, wanted):
    assert (found.double() - wanted).norm() <= 1e-7 * wanted.norm()


@pytest.mark.parametrize(("third", "weight"), [(False, 0.3), (False, 1.0), (True, 1.0), (True, -0.5)])
def test_sums_are_those_of_the_formula(tmp_path, models, weight, third):
    a, b, c = (stored(models[name]) for name in "abc")
    found = merged(tmp_path / "x.safetensors", models["a"], models["b"], models["c"] if third else None, Share(weight))
    for name, value in found.items():
        if name.startswith("vae."):
            assert torch.equal(value, a[name])
        elif third:
            close(value, a[name].double() + weight * (b[name].double() - c[name].double()))
        elif weight == 1:
            assert torch.equal(value, b[name])
        else:
            close(value, (1 - weight) * a[name].double() + weight * b[name].double())


def block_number(name):
    """As in block-weighted merging: 12 on the way down, the middle, 12 on the way up; -1: the base."""
    parts = name.split(".")
    if parts[0] != "unet":
        return -1
    starts = {"time_embed": 0, "input_blocks": 0, "middle_block": 12, "output_blocks": 13, "out": 24}
    return starts[parts[1]] + (int(parts[2]) if parts[1] in ("input_blocks", "output_blocks") else 0)


@pytest.mark.slow
@pytest.mark.parametrize("base_in_front", [False, True])
def test_every_block_has_its_weight(tmp_path, run, models, base_in_front):
    weights = [index / 40 for index in range(25)]
    listed = ",".join(map(str, [0.8, *weights] if base_in_front else weights))
    flags = [] if base_in_front else ["--weight", "0.8"]
    code, out, err = run(
        "merge", models["a"], models["b"], "-o", "x.ckpt", *flags, "--block-weights", listed, "--verify"
    )
    assert (code, out) == (0, ["x.ckpt"])
    assert "kept from a.safetensors: 6 tensors of the UNet and 248 tensors of the VAE" in err  # IN00 is 0
    a, b, found = stored(models["a"]), stored(models["b"]), stored(tmp_path / "x.ckpt")
    for name, value in found.items():
        weight = 0 if name.startswith("vae.") else [*weights, 0.8][block_number(name)]
        close(value, (1 - weight) * a[name].double() + weight * b[name].double())


@pytest.mark.parametrize("family", sd.list_models())
def test_every_weight_of_every_family_has_its_share(family):
    config = sd.get_config(family)
    plan = [row.name for row in block_plan(config.unet)]
    share = Share(0.5, tuple(range(1, 1 + len(plan))))
    found = {name: share.of(name, config) for name in parameter_shapes(config)}
    for number, block in enumerate(plan, 1):
        assert {value for name, value in found.items() if name.startswith(f"unet.{block}.")} == {number}
    for start, expected in {
        **{"unet.time_embed.": 1, "unet.label_emb.": 1, "unet.out.": len(plan)},
        **{"text_encoder.": 0.5, "text_encoder_2.": 0.5, "vae.": 0},
    }.items():
        assert {value for name, value in found.items() if name.startswith(start)} <= {expected}


@pytest.mark.slow
@pytest.mark.parametrize("third", [False, True])
def test_an_inpainting_model_stays_one(tmp_path, run, models, third):
    others = [models[name] for name in ("b", "c")[: 1 + third]]
    code, _, err = run("merge", models["wide"], *others, "-o", "x.safetensors", "-w", "0.5", "--no-hash")
    assert code == 0
    assert "the 5 channels that only wide.safetensors reads stay as they are" in err
    a, b, found = stored(models["wide"])[CONV_IN], stored(models["b"])[CONV_IN], stored(tmp_path / "x.safetensors")
    assert torch.equal(found[CONV_IN][:, 4:], a[:, 4:])
    wanted = (a[:, :4] + b) / 2
    if third:
        wanted = a[:, :4] + (b - stored(models["c"])[CONV_IN]) / 2
    close(found[CONV_IN][:, :4], wanted.double())


@pytest.mark.slow
def test_a_depth_model_learns_from_a_fine_tune_of_the_base(tmp_path, run):
    base = replace(SD_V2, prediction="eps", native_size=512)
    for seed, (name, config) in enumerate({"depth": SD_V2_DEPTH, "tuned": base, "base": base}.items()):
        state = make_checkpoint.made_up_state_dict(make_checkpoint.tiny(config), seed, dtype=torch.float16)
        save_file(state, tmp_path / f"{name}.safetensors")
    files = [f"{name}.safetensors" for name in ("depth", "tuned", "base")]
    code, _, err = run("merge", *files, "-o", "x.safetensors", "--no-hash")
    assert code == 0, err
    depth, tuned, base, found = (stored(tmp_path / name) for name in (*files, "x.safetensors"))
    wanted = depth[CONV_IN][:, :4].float() + tuned[CONV_IN].float() - base[CONV_IN].float()
    assert torch.equal(found[CONV_IN], torch.cat([wanted.half(), depth[CONV_IN][:, 4:]], dim=1))
    kept = [name for name in depth if name.startswith("depth_network.")]
    assert len(kept) == 300
    assert all(torch.equal(found[name], depth[name]) for name in kept)


def test_precision_is_that_of_the_first_model_and_sums_are_rounded_once(tmp_path, models):
    half = tmp_path / "half.safetensors"
    convert(models["a"], half, precision="fp16", hash_source=False)
    found = merged(tmp_path / "x.safetensors", half, models["b"], None, Share(0.25))
    a, b = stored(half), stored(models["b"])
    for name in ("unet.out.conv.weight", "text_encoder.layers.1.attention.q.bias"):
        assert torch.equal(found[name], torch.lerp(a[name].float(), b[name], 0.25).half())


def test_the_recipe_and_the_models_are_noted_as_elsewhere(tmp_path, run, models):
    assert run("merge", models["a"], models["b"], models["c"], "-o", "x.safetensors", "-w", "0.5")[0] == 0
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        recipe, noted = (json.loads(file.metadata()[name]) for name in ("sd_merge_recipe", "sd_merge_models"))
    digests = [hashlib.sha256(models[name].read_bytes()).hexdigest() for name in "abc"]
    places = ("primary", "secondary", "tertiary")
    assert [recipe[f"{place}_model_hash"] for place in places] == digests
    assert (recipe["interp_method"], recipe["multiplier"]) == ("Add difference", 0.5)
    assert [noted[digest]["name"] for digest in digests] == [f"{name}.safetensors" for name in "abc"]
    assert noted[digests[1]]["sd_merge_recipe"] == {"of": "b"}


@pytest.mark.slow
def test_another_vae_is_taken_and_the_layout_chosen(tmp_path, run, models):
    arguments = ("merge", models["a"], models["b"], "-o", "folder", "--to", "diffusers", "--vae", models["c"])
    code, _, err = run(*arguments)
    assert code == 0
    assert "kept from c.safetensors and a.safetensors: 248 tensors of the VAE" in err
    found, c = stored(tmp_path / "folder"), stored(models["c"])
    assert all(torch.equal(value, c[name]) for name, value in found.items() if name.startswith("vae."))


@pytest.fixture
def others(tmp_path, models):
    """Models that do not go with the first one."""
    velocity, narrow = tmp_path / "velocity.safetensors", tmp_path / "narrow.safetensors"
    convert(models["b"], velocity, prediction="v", hash_source=False)
    config = replace(TINY, text_encoder=replace(TINY.text_encoder, layers=1))
    save_file(make_checkpoint.made_up_state_dict(config), narrow)
    return {"V": velocity, "N": narrow, "W": models["wide"]} | {name.upper(): models[name] for name in "abc"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("A V", "velocity.safetensors predicts v, a.safetensors eps; a sum of them would predict neither"),
        (
            "A N",
            "narrow.safetensors is not built like a.safetensors: 16 weights of another shape",
        ),
        (
            "A W",
            "wide.safetensors reads 9 channels, a.safetensors 4. The model that reads more",
        ),
        ("W W B", "b.safetensors reads 4 channels, wide.safetensors 9, so they cannot be subtracted"),
        ("A B -w 0", "every weight is 0, so the result would be the first model"),
        ("A B -w nan", "must be finite numbers"),
        (
            "A B --block-weights 1,2,3",
            "the UNet has 25 blocks, so --block-weights takes 25 numbers, or 26 with",
        ),
        ("A B -w 1 --block-weights 1,2", "the first of 2 --block-weights is for the text encoder: leave out --weight"),
        ("A nothere", "nothere does not exist"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_leaves_no_file(tmp_path, run, others, arguments, said):
    words = [others.get(word, word) for word in arguments.split()]
    refused(run("merge", *words, "-o", "out.safetensors", "--no-hash"), said)
    assert not [*tmp_path.glob("*out*")]


def test_the_target_must_not_be_one_of_the_models(models):
    for place in ("a", "b", "c"):
        with pytest.raises(TargetError, match="is the source itself"):
            merged(models[place], models["a"], models["b"], models["c"], Share(1.0), force=True)
