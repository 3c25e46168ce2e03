"""A model with the VAE of another file: in every layout, also where the model has none of its own."""

import hashlib
import json
import shutil

import make_checkpoint
import pytest
import safetensors.torch
import torch
from conftest import TINY, refused
from PIL import Image
from safetensors import safe_open
from test_convert import WEIGHTS, same_bits

import sd
from convert.actions.convert import convert
from convert.actions.target import TargetError
from convert.errors import CheckpointError
from convert.layouts.names import PREFIXES

VAE = PREFIXES["vae"]


@pytest.fixture(scope="module")
def other_state():
    weights = make_checkpoint.made_up_state_dict(TINY, 5)
    return {name: value.half() for name, value in weights.items() if name in WEIGHTS and name.startswith(VAE)}


@pytest.fixture(scope="module")
def other(tmp_path_factory, other_state):
    """Another VAE in half precision, saved as the training code saves one alone."""
    path = tmp_path_factory.mktemp("vae") / "other.vae.pt"
    bare = {name.removeprefix(VAE): value for name, value in other_state.items()}
    torch.save({"state_dict": bare | {"loss.logvar": torch.zeros(())}}, path)
    return path


@pytest.fixture(scope="module")
def expected(tiny_state, other_state):
    return {name: other_state.get(name, tiny_state[name]) for name in WEIGHTS}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sd-zoo", "original", "diffusers"])
def test_the_vae_of_another_file_is_in_the_place_of_the_models_own(tmp_path, tiny_ckpt, other, expected, layout):
    target = tmp_path / ("x" if layout == "diffusers" else "x.safetensors")
    done = convert(tiny_ckpt, target, layout=layout, vae=other, verify=True)
    assert (done.verified.same, done.verified.rounded) == (970, 0)
    convert(target, tmp_path / "back.ckpt")
    same_bits(torch.load(tmp_path / "back.ckpt")["state_dict"], expected)


@pytest.mark.slow
def test_a_vae_comes_from_any_layout_into_a_model_of_any(tmp_path, tiny_ckpt, other, expected):
    convert(other, tmp_path / "ours.safetensors", part="vae")
    convert(other, tmp_path / "folder", part="vae", layout="diffusers")
    convert(tiny_ckpt, tmp_path / "model", layout="diffusers")
    convert(tiny_ckpt, tmp_path / "model.safetensors")
    for number, (model, vae) in enumerate(
        [("model", "ours.safetensors"), ("model.safetensors", "folder"), ("model", "folder")]
    ):
        back = tmp_path / f"{number}.safetensors"
        convert(tmp_path / model, back, layout="original", vae=tmp_path / vae)
        same_bits(safetensors.torch.load_file(back), expected)


@pytest.mark.slow
def test_a_precision_is_that_of_both(tmp_path, tiny_ckpt, other, expected):
    done = convert(tiny_ckpt, tmp_path / "x.ckpt", vae=other, precision="bf16", verify=True)
    assert (done.verified.same, done.verified.rounded) == (0, 970)
    found = torch.load(tmp_path / "x.ckpt")["state_dict"]
    same_bits(found, {name: value.bfloat16() for name, value in expected.items()})


def test_a_checkpoint_without_a_vae_gets_one(tmp_path, tiny_state, other, expected, run):
    state = {name: tiny_state[name] for name in WEIGHTS if not name.startswith(VAE)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    refused(run("convert", "x.safetensors", "y.ckpt"), "has no VAE", "sd convert --vae FILE")
    code, out, _ = run("convert", "x.safetensors", "y.ckpt", "--vae", other)
    assert (code, out) == (0, ["y.ckpt"])
    same_bits(torch.load(tmp_path / "y.ckpt")["state_dict"], expected)


def test_our_file_says_where_its_vae_came_from(tmp_path, tiny_ckpt, other):
    convert(tiny_ckpt, tmp_path / "x.safetensors", vae=other)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["source_file"], metadata["vae_file"]) == ("tiny.ckpt", "other.vae.pt")
    assert len({metadata["source_sha256"], metadata["vae_sha256"]}) == 2


def test_a_vae_of_other_latents_is_refused_with_the_name_of_its_file(tmp_path, tiny_ckpt, other, other_state):
    def message(vae):
        with pytest.raises(CheckpointError) as caught:
            convert(tiny_ckpt, tmp_path / "y.ckpt", vae=vae)
        return str(caught.value)

    convert(other, tmp_path / "scaled", part="vae", layout="diffusers")
    config = tmp_path / "scaled/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.13025}))
    assert message(tmp_path / "scaled").startswith("scaled has a VAE with the latent scale 0.13025; the model was")
    changed = {name.removeprefix(VAE): value for name, value in other_state.items()}
    changed["post_quant_conv.weight"] = torch.zeros(8, 8, 1, 1)
    torch.save(changed, tmp_path / "wide.pt")
    assert message(tmp_path / "wide.pt").startswith("wide.pt has a VAE for latents of 8 channels; the UNet")
    torch.save({name: value for name, value in changed.items() if "encoder.mid" not in name}, tmp_path / "half.pt")
    assert message(tmp_path / "half.pt").startswith("half.pt lacks")
    assert not (tmp_path / "y.ckpt").exists()


def test_a_vae_of_a_wrong_shape_is_refused(tmp_path, tiny_ckpt, other_state):
    state = {name.removeprefix(VAE): value for name, value in other_state.items()}
    torch.save(state | {"decoder.conv_in.bias": torch.zeros(7)}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"^odd\.pt .*decoder\.conv_in\.bias has the shape \[7\]"):
        convert(tiny_ckpt, tmp_path / "y.ckpt", vae=tmp_path / "odd.pt")


def test_values_without_room_are_told_of_both_files(tmp_path, tiny_ckpt, other_state):
    state = {name.removeprefix(VAE): value.float() for name, value in other_state.items()}
    torch.save(state | {"quant_conv.bias": torch.full((8,), 1e6)}, tmp_path / "large.pt")
    with pytest.raises(
        CheckpointError, match=r"^tiny\.ckpt, with large\.pt, holds values .* first_stage_model\.quant_c"
    ):
        convert(tiny_ckpt, tmp_path / "y.ckpt", vae=tmp_path / "large.pt", precision="fp16")
    assert not (tmp_path / "y.ckpt").exists()


def test_neither_of_the_two_sources_is_overwritten(tmp_path, tiny_ckpt, other_state):
    vae = tmp_path / "vae.pt"
    torch.save({name.removeprefix(VAE): value for name, value in other_state.items()}, vae)
    with pytest.raises(TargetError, match="is the source itself"):
        convert(tiny_ckpt, vae, vae=vae, force=True)


@pytest.mark.slow
def test_pictures_are_decoded_by_it_and_can_be_made_again(tmp_path, tiny_ckpt, other, run):
    vae, quick = shutil.copy(other, tmp_path / "other.vae.pt"), ("-m", tiny_ckpt, "-q")
    size = ("x", "-W", 64, "-H", 64, "--steps", 1, "-s", 1)
    assert run("txt2img", *size, *quick, "-o", "plain.png")[0] == 0
    assert run("txt2img", *size, *quick, "-o", "a.png", "--vae", vae)[0] == 0
    assert run("txt2img", "--like", "a.png", *quick, "-o", "again.png") == (0, ["again.png"], "")
    a, again = ((tmp_path / name).read_bytes() for name in ("a.png", "again.png"))
    assert a == again
    with Image.open(tmp_path / "a.png") as picture, Image.open(tmp_path / "plain.png") as without:
        assert picture.tobytes() != without.tobytes()
        noted = json.loads(picture.text["sd"])["model"]["vae"]
        assert f"VAE hash: {noted['sha256'][:10]}, VAE: other.vae.pt" in picture.text["parameters"]
        assert "vae" not in json.loads(without.text["sd"])["model"]
    assert noted == {"name": "other.vae.pt", "sha256": hashlib.sha256(vae.read_bytes()).hexdigest()}
    vae.unlink()
    code, _, err = run("txt2img", "--like", "a.png", *quick, "-o", "other.png")
    assert code == 0
    assert f"a.png was made with the VAE other.vae.pt, {noted['sha256']}: give it with --vae FILE" in err


def test_a_vae_for_pictures_that_does_not_fit_is_refused_by_its_name(tmp_path, tiny_ckpt, run):
    torch.save({"a": torch.ones(2)}, tmp_path / "not.pt")
    refused(run("txt2img", "x", "-m", tiny_ckpt, "--vae", "not.pt"), "not.pt has no VAE")
    refused(run("txt2img", "x", "-m", tiny_ckpt, "--vae", "gone.pt"), "gone.pt")


def test_python_takes_a_vae_a_prediction_and_a_variant(tiny_ckpt, other, tmp_path):
    model = sd.load(tiny_ckpt, precision="fp32", vae=other, prediction="v")
    assert model.config.prediction == "v"
    assert model.source.facts()["vae"]["name"] == other.name
    assert torch.equal(model.vae.quant_conv.bias.half(), torch.load(other)["state_dict"]["quant_conv.bias"])
    with pytest.raises(CheckpointError, match="is a single file, which has no variants"):
        sd.load(tiny_ckpt, variant="fp16")
