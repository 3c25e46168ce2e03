"""The difference of two models as a LoRA: added to the first it gives the second, and its error is the stated one."""

import json
import math
from dataclasses import replace

import make_checkpoint
import pytest
import safetensors.torch
import torch
from adapters import FAMILY, lora, lora_shapes
from conftest import TINY, refused
from safetensors import safe_open
from safetensors.torch import save_file
from weights_of import stored

from convert.actions.bake import Baking, Strengths
from convert.actions.convert import convert
from convert.actions.extract import _kind, extract, nearest_of_rank
from convert.adapters.adapter import open_adapter, read_adapter
from convert.adapters.hashes import autov3
from convert.adapters.model_metadata import model_metadata
from convert.layouts.adapter_names import kohya_names, modules
from sd.config import SD_V1_INPAINTING, SD_V2
from sd.networks.adapters.weight_change import weight_change

NORM = "unet.middle_block.residual1.norm1.weight"
ORIGINAL = {
    "norm": "model.diffusion_model.middle_block.0.in_layers.0.weight",
    "bias": "model.diffusion_model.time_embed.0.bias",
    "conv": "model.diffusion_model.input_blocks.3.0.op.weight",
    "linear": "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    "embedding": "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    "vae": "first_stage_model.quant_conv.bias",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model narrower than the others, so that decompositions are quick."""
    path = tmp_path_factory.mktemp("models") / "base.safetensors"
    save_file(make_checkpoint.made_up_state_dict(TINY), path)
    return path


@pytest.fixture(scope="module")
def tuned(base):
    """Every weight of the UNet and the text encoder differs."""
    state = safetensors.torch.load_file(base)
    generator = torch.Generator().manual_seed(1)
    for name, value in state.items():
        if name.startswith(("model.", "cond")) and value.is_floating_point() and "ema" not in name:
            state[name] = value + 0.1 * value.std().nan_to_num(1) * torch.randn(value.shape, generator=generator)
    save_file(state, base.with_name("tuned.safetensors"))
    return base.with_name("tuned.safetensors")


@pytest.fixture
def differing(tmp_path, base):
    """A model that differs in the tensors that are given."""

    def differing(**changes):
        state = safetensors.torch.load_file(base)
        for name, factor in changes.items():
            state[ORIGINAL[name]] = state[ORIGINAL[name]] * factor
        save_file(state, tmp_path / "b.safetensors")
        return tmp_path / "b.safetensors"

    return differing


def applied(base, adapter, target):
    convert(base, target, changing=Baking([Strengths(adapter)], weight_change), hash_source=False)
    return stored(target)


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-6), pytest.param("fp16", 1e-3, marks=pytest.mark.slow)])
def test_all_of_it_gives_the_second_model_back(tmp_path, base, tuned, precision, most):
    """At the full rank of every layer, with biases and norms."""
    found = extract(base, tuned, tmp_path / "x.safetensors", rank=10_000, full=True, precision=precision)
    wanted, got = stored(tuned), applied(base, tmp_path / "x.safetensors", tmp_path / "back.safetensors")
    for name, value in wanted.items():
        if not name.endswith("embedding.weight"):
            assert (got[name] - value).norm() <= most * value.norm(), name
    assert found.held.error <= most * 10
    assert found.not_held.keys() == {"embedding"}


@pytest.mark.slow
def test_stated_errors_are_those_of_the_written_file(tmp_path, call, base, tuned):
    code, out, _ = call("extract", base, tuned, "-o", "x.safetensors", "--rank", "3", "--conv-rank", "2", "--json")
    assert code == 0
    stated = json.loads(out)
    a, b, got = stored(base), stored(tuned), applied(base, tmp_path / "x.safetensors", tmp_path / "back.safetensors")
    weights = {f"{target}.weight" for target, shape in modules(FAMILY).items() if len(shape) > 1}

    def error(names):
        left, change = (
            math.sqrt(sum(float((b[name].double() - side[name].double()).square().sum()) for name in names))
            for side in (got, a)
        )
        return left / change

    assert stated["together"]["error"] == pytest.approx(error(weights), rel=1e-4)
    by_block = {(row["part"], row["name"]): row["error"] for row in stated["blocks"]}
    down = {name for name in weights if name.startswith("unet.input_blocks.4.")}
    assert by_block["unet", "input_blocks.4"] == pytest.approx(error(down), rel=1e-4)
    text = {name for name in weights if name.startswith("text_encoder.layers.1.")}
    assert by_block["text_encoder", "encoder.layers.1"] == pytest.approx(error(text), rel=1e-4)
    everything = {name for name in b if not name.startswith("vae.")}
    assert stated["with_not_held"]["error"] == pytest.approx(error(everything), rel=1e-4)


def test_a_lora_is_found_again_in_the_weights_that_it_is_in(tmp_path, base):
    adapter = lora(tmp_path / "l.safetensors", lora_shapes(rank=2), dtype=torch.float32)
    convert(base, tmp_path / "b.safetensors", changing=Baking([Strengths(adapter)], weight_change), hash_source=False)
    found = extract(base, tmp_path / "b.safetensors", tmp_path / "x.safetensors", rank=2, precision="fp32")
    assert found.held.error < 1e-4
    assert found.not_held == {}
    original, again = safetensors.torch.load_file(adapter), safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert again.keys() == original.keys()
    assert {name: value.shape for name, value in again.items()} == {
        name: value.shape for name, value in original.items()
    }


@pytest.mark.parametrize("shape", [(400, 500), (300, 900), (700, 320)])
def test_large_matrices_come_within_a_percent_of_the_smallest_error(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    up, down = nearest_of_rank(matrix, 4)
    smallest = torch.linalg.svdvals(matrix)[4:].norm()
    assert (up.shape, down.shape) == ((shape[0], 4), (4, shape[1]))
    assert smallest <= (matrix - up @ down).norm() <= 1.01 * smallest


def test_what_does_not_differ_is_left_out_and_what_no_lora_holds_is_said(tmp_path, run, base, differing):
    other = differing(linear=1.1, conv=1.1, bias=2, norm=2, embedding=2, vae=2)
    code, out, err = run("extract", base, other, "-o", "x.safetensors")
    assert (code, out) == (0, ["x.safetensors"])
    assert "not in the LoRA, though they differ: 1 bias, 1 norm and 1 embedding; --full" in err
    assert "--full writes biases and norms" in err
    assert "the VAE differs, too, in 1 tensor" in err
    names = kohya_names(FAMILY)
    conv, linear = names["unet.input_blocks.3.downsample.conv"], names["text_encoder.layers.0.feed_forward.proj_in"]
    wanted = {f"{name}.{part}" for name in (conv, linear) for part in ("alpha", "lora_down.weight", "lora_up.weight")}
    assert safetensors.torch.load_file(tmp_path / "x.safetensors").keys() == wanted
    code, _, err = run("extract", base, other, "-o", "y.safetensors", "--conv-rank", "0", "--full")
    assert code == 0
    assert "not in the LoRA, though they differ: 1 convolution and 1 embedding\n" in err
    found = safetensors.torch.load_file(tmp_path / "y.safetensors").keys()
    assert found == {name for name in wanted if linear in name} | {
        f"{names['unet.time_embed.linear1']}.diff_b",
        f"{names['unet.middle_block.residual1.norm1']}.w_norm",
    }


def test_models_that_differ_by_rounding_only_are_the_same(tmp_path, run, base):
    convert(base, tmp_path / "half.safetensors", precision="fp16", hash_source=False)
    for first, second in ((base, "half.safetensors"), ("half.safetensors", base), (base, base)):
        code, out, err = run("extract", first, second, "-o", "x.safetensors")
        assert (code, out) == (1, [])
        assert "do not differ: nothing is written." in err
        assert ("970 tensors differ by their precision only" in err) == (first != second)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.slow
def test_the_average_over_the_training_can_be_taken(tmp_path, run, base):
    """The plain weights are those of the first model, the averaged ones are not."""
    save_file(make_checkpoint.made_up_state_dict(TINY, ema=True), tmp_path / "both.safetensors")
    assert run("extract", base, "both.safetensors", "-o", "x.safetensors")[0] == 1
    assert run("extract", base, "both.safetensors", "-o", "y.safetensors", "--weights", "ema")[0] == 0
    assert {name.partition("_")[0] for name in safetensors.torch.load_file(tmp_path / "y.safetensors")} == {"lora"}


def test_a_difference_that_no_lora_holds_writes_nothing(tmp_path, run, base, differing):
    code, out, err = run("extract", base, differing(embedding=2), "-o", "x.safetensors")
    assert (code, out) == (1, [])
    assert "differ in no layer that a LoRA could hold: nothing is written." in err


def test_the_file_is_one_of_kohyas(tmp_path, base, differing):
    extract(base, differing(linear=1.1), tmp_path / "my.safetensors", rank=8, conv_rank=4)
    with safe_open(tmp_path / "my.safetensors", "pt") as file:
        metadata = file.metadata()
        assert {file.get_tensor(name).dtype for name in list(file.keys())} == {torch.float16}
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "8.0")
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "4"}
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["sshs_model_hash"] == autov3(tmp_path / "my.safetensors")


@pytest.mark.parametrize(
    ("config", "version", "architecture", "predicted"),
    [
        (SD_V1_INPAINTING, "sd_v1", "stable-diffusion-v1/lora", "epsilon"),
        (SD_V2, "sd_v2_v", "stable-diffusion-v2-768-v/lora", "v"),
        (replace(SD_V2, prediction="eps"), "sd_v2", "stable-diffusion-v2-512/lora", "epsilon"),
    ],
)
def test_metadata_name_the_model_as_kohya_does(config, version, architecture, predicted):
    told = model_metadata(config, "lora")
    assert (told["ss_base_model_version"], told["ss_v2"]) == (version, str("v2" in version))
    assert (told["modelspec.architecture"], told["modelspec.prediction_type"]) == (architecture, predicted)


@pytest.mark.parametrize("spelling", ["diffusers", "peft"])
def test_other_spellings_hold_the_same(tmp_path, run, base, differing, spelling):
    target = "x" if spelling == "peft" else "x.safetensors"
    assert run("extract", base, differing(linear=1.1, conv=1.1), "-o", target, "--spelling", spelling)[0] == 0
    with open_adapter(tmp_path / target) as file:
        found = read_adapter(file, TINY)
    assert [change.rank for change in found.changes] == [change.alpha for change in found.changes] == [16, 16]


def test_the_first_convolution_of_an_inpainting_model_is_left_alone(tmp_path, base, differing):
    wide = make_checkpoint.tiny(SD_V1_INPAINTING)
    state = safetensors.torch.load_file(differing(linear=1.1))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state[name] = torch.cat([state[name], torch.ones(32, 5, 3, 3)], dim=1)
    save_file(state, tmp_path / "wide.safetensors")
    assert wide.unet.in_channels == state[name].shape[1]
    found = extract(base, tmp_path / "wide.safetensors", tmp_path / "x.safetensors")
    assert found.held.tensors == 1
    assert found.not_held.keys() == {"tensor of another shape"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("A nothere -o x.safetensors", "nothere does not exist"),
        ("A A -o x.ckpt", "x.ckpt must end in .safetensors"),
        ("A B -o B --force", "is the source itself, which would be lost"),
        ("A B -o x.safetensors --rank 0", "--rank 0 is out of range"),
        ("A B -o x --spelling peft --full", "the spelling of peft has no names for biases and norms"),
        ("A N -o x.safetensors", "narrow.safetensors is not built like base.safetensors: 16 weights of another shape"),
        ("A NAN -o x.safetensors", "differs by NaN or infinity in text_encoder.layers.0.feed_forward.proj_in.weight"),
        ("A HUGE -o x.safetensors --rank 1", "differs too much for the precision"),
    ],
)
def test_what_cannot_be_extracted_is_refused_and_leaves_no_file(tmp_path, run, base, differing, arguments, said):
    paths = {"A": base, "B": tmp_path / "b.safetensors", "N": tmp_path / "narrow.safetensors"}
    narrow = replace(TINY, text_encoder=replace(TINY.text_encoder, layers=1))
    if " N " in arguments:
        save_file(make_checkpoint.made_up_state_dict(narrow), paths["N"])
    factor = {"NAN": float("nan"), "HUGE": 1e14}.get(arguments.split()[1], 1.1)
    paths["NAN"] = paths["HUGE"] = differing(linear=factor)
    refused(run("extract", *[paths.get(word, word) for word in arguments.split()]), said)
    assert not [*tmp_path.glob("*x*")]


def test_what_a_lora_does_not_hold_is_named_by_its_kind():
    weight = torch.zeros(2, 2, 3, 3)
    names = {
        "depth_network.head.conv3.weight": "weight of the depth network",
        "text_encoder.positions.weight": "embedding",
    }
    assert {name: _kind(name, None, weight) for name in names} == names
