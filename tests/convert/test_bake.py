"""Adapters in the weights of a converted model: the sums of an independent formula, and nothing else changed."""

import hashlib
import json

import pytest
import safetensors.torch
import torch
from adapters import FAMILY, lora, lora_shapes
from conftest import refused
from safetensors import safe_open
from weights_of import stored

from convert.actions.bake import Baking, Strengths
from convert.actions.convert import convert
from convert.actions.target import TargetError
from convert.errors import CheckpointError
from convert.layouts.adapter_names import kohya_names, modules
from sd.networks.adapters.weight_change import weight_change

PROJ = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """LoRA of 290 modules, linear and convolutions, of alpha 2 and rank 4."""
    return lora(tmp_path_factory.mktemp("adapters") / "detail.safetensors", lora_shapes(conv=True))


@pytest.fixture(scope="module")
def base(tiny_ckpt):
    return stored(tiny_ckpt)


def expected(base, adapter, unet=1.0, text_encoder=1.0):
    """Each weight that changes, as a sum over the rank in float64."""
    tensors, found = safetensors.torch.load_file(adapter), {}
    for ours, name in kohya_names(FAMILY).items():
        if f"{name}.alpha" not in tensors:
            continue
        down, up = (tensors[f"{name}.lora_{part}.weight"].double() for part in ("down", "up"))
        change = sum(torch.einsum("o,i...->oi...", up[:, r].flatten(), down[r]) for r in range(len(down)))
        strength = unet if ours.startswith("unet") else text_encoder
        weight = base[f"{ours}.weight"].double()
        found[f"{ours}.weight"] = weight + strength * tensors[f"{name}.alpha"].item() / len(down) * change.reshape(
            weight.shape
        )
    return found


def baked(source, target, *adapters, **options):
    adapters = [Strengths(*given) if isinstance(given, tuple) else Strengths(given) for given in adapters]
    options = {"hash_source": False} | options
    convert(source, target, changing=Baking(adapters, weight_change), **options)
    return stored(target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "into"),
    [
        (None, "ours.safetensors"),
        ("sd-zoo", "original.ckpt"),
        pytest.param("original", "diffusers", marks=pytest.mark.slow),
        pytest.param("diffusers", "original.safetensors", marks=pytest.mark.slow),
    ],
)
def test_every_layout_holds_the_sums_and_the_other_bytes(tmp_path, tiny_ckpt, adapter, base, layout, into):
    source = tiny_ckpt
    if layout:
        source = tmp_path / ("source" if layout == "diffusers" else "source.safetensors")
        convert(tiny_ckpt, source, layout=layout, hash_source=False)
    to = {"ours": None, "original": "original", "diffusers": "diffusers"}[into.partition(".")[0]]
    found = baked(source, tmp_path / into, (adapter, 0.5, -1.0), layout=to, verify=into == "original.ckpt")
    wanted = expected(base, adapter, 0.5, -1.0)
    assert len(wanted) == 290
    for name, value in found.items():
        if name in wanted:
            assert (value - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name
        else:
            assert torch.equal(value, base[name]), name


@pytest.mark.slow
def test_merged_weights_are_those_of_peft(tmp_path, tiny_ckpt, adapter, base):
    from peft import LoraConfig, get_peft_model

    found, tensors = baked(tiny_ckpt, tmp_path / "out.safetensors", adapter), safetensors.torch.load_file(adapter)
    linear, conv = "unet.middle_block.attention.blocks.0.cross_attention.k", "unet.input_blocks.4.residual.conv1"
    for ours in (linear, conv):
        weight, name = base[f"{ours}.weight"], kohya_names(FAMILY)[ours]
        inputs, outputs = weight.shape[1], weight.shape[0]
        layer = torch.nn.Linear(inputs, outputs) if weight.ndim == 2 else torch.nn.Conv2d(inputs, outputs, 3)
        layer.weight = torch.nn.Parameter(weight.clone())
        model = get_peft_model(torch.nn.Sequential(layer), LoraConfig(r=4, lora_alpha=2, target_modules=["0"]))
        for part, theirs in (("down", "lora_A"), ("up", "lora_B")):
            factor = getattr(model.base_model.model[0], theirs)["default"]
            factor.weight.data = tensors[f"{name}.lora_{part}.weight"].float()
        merged = model.merge_and_unload()[0].weight
        assert (found[f"{ours}.weight"] - merged).norm() <= 1e-6 * merged.norm()


@pytest.mark.slow
def test_changes_add_up_in_float32_and_are_rounded_once(tmp_path, tiny_ckpt, adapter, base):
    """Three adapters, each below the precision of float16: rounded one by one they would be lost."""
    small = lora(tmp_path / "small.safetensors", lora_shapes(), size=0.002, seed=1)
    half = tmp_path / "half.safetensors"
    convert(tiny_ckpt, half, precision="fp16")
    found = baked(half, tmp_path / "out.safetensors", small, (small, 1.0, 1.0), (adapter, -0.5, -0.5))
    before = {name: value.float() for name, value in stored(half).items()}
    twice = expected(before, small, 2.0, 2.0)
    for name, value in expected(before, adapter, -0.5, -0.5).items():
        value = value + twice[name] - before[name] if name in twice else value
        assert found[name].dtype == torch.float16
        assert (found[name].double() - value).abs().max() <= 2**-11 * value.abs().max(), name


def test_a_strength_of_zero_changes_no_byte(tmp_path, tiny_ckpt, adapter, base):
    found = baked(tiny_ckpt, tmp_path / "out.safetensors", (adapter, 0.0, 1.0), layout="original")
    changed = {name for name, value in found.items() if not torch.equal(value, base[name])}
    assert len(changed) == 12
    assert all(name.startswith("text_encoder.") for name in changed)


@pytest.mark.slow
def test_the_averaged_weights_can_be_chosen_and_those_kept_beside_do_not_change(
    tmp_path, run, tiny_ckpt, adapter, base
):
    averages = stored(tiny_ckpt, weights="ema")
    code, _, err = run("convert", tiny_ckpt, "ema.safetensors", "--weights", "ema", "--lora", adapter)
    assert code == 0
    assert "changed: the UNet's averaged weights (EMA), not its own weights\n" in err
    wanted = expected(averages, adapter)
    found = stored(tmp_path / "ema.safetensors")
    assert all((found[name] - value).norm() <= 1e-6 * value.norm() for name, value in wanted.items())
    code, _, err = run("convert", tiny_ckpt, "all.ckpt", "--keep-all", "--lora", adapter, "--verify")
    assert code == 0
    assert "changed: the UNet's own weights, not its averaged weights (EMA), which are kept unchanged\n" in err
    kept = stored(tmp_path / "all.ckpt", weights="ema")
    assert all(torch.equal(kept[name], value) for name, value in averages.items() if name.startswith("unet."))


@pytest.mark.parametrize("channels", [9])
def test_what_an_inpainting_model_reads_beyond_the_latents_does_not_change(tmp_path, channels):
    import make_checkpoint

    from sd.config import SD_V1_INPAINTING

    config = make_checkpoint.tiny(SD_V1_INPAINTING)
    source = tmp_path / "inpainting.ckpt"
    make_checkpoint.save_original(source, make_checkpoint.made_up_state_dict(config))
    shapes = {"lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3), "lora_unet_conv_in.lora_up.weight": (32, 2, 1, 1)}
    found = baked(source, tmp_path / "out.safetensors", lora(tmp_path / "x.safetensors", shapes))
    before, name = stored(source), "unet.input_blocks.0.conv.weight"
    assert before[name].shape[1] == channels
    assert torch.equal(found[name][:, 4:], before[name][:, 4:])
    assert not torch.equal(found[name][:, :4], before[name][:, :4])


def test_the_new_file_notes_every_adapter_that_is_in_it(tmp_path, tiny_ckpt, adapter):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    baked(tiny_ckpt, first, (adapter, 0.5, 0.25))
    baked(first, second, (adapter, -1.0, -1.0), layout="sd-zoo")
    with safe_open(second, "pt") as file:
        noted = json.loads(file.metadata()["adapters"])
    digest = hashlib.sha256(adapter.read_bytes()).hexdigest()
    rows = [(row["name"], row["strength"], row["text_encoder_strength"], row["sha256"]) for row in noted]
    assert rows == [("detail.safetensors", 0.5, 0.25, digest), ("detail.safetensors", -1.0, -1.0, digest)]


def test_verify_finds_a_change_that_was_not_written(tmp_path, monkeypatch, tiny_ckpt, adapter, run):
    import convert.actions.writing as writing

    monkeypatch.setattr(writing, "_reshaped", lambda change, shape, value: value)  # those stored as convolutions
    code, out, err = run("convert", tiny_ckpt, "x.ckpt", "--lora", adapter, "--verify")
    assert (code, out) == (1, [])
    assert "differs from the source in 32 tensors" in err
    assert not (tmp_path / "x.ckpt").exists()


def test_a_name_is_found_in_the_folder_for_loras(tmp_path, run, monkeypatch, tiny_ckpt, adapter):
    monkeypatch.setenv("SD_MODELS", str(tmp_path / "models"))
    (tmp_path / "models" / "loras").mkdir(parents=True)
    (tmp_path / "models" / "loras" / "detail.safetensors").write_bytes(adapter.read_bytes())
    code, out, err = run("convert", tiny_ckpt, "x.safetensors", "--lora", "detail:0.5")
    assert (code, out) == (0, ["x.safetensors"])
    assert "detail.safetensors: LoRA for 290 modules (278 of the UNet and 12 of the text encoder)" in err
    assert "290 tensors changed at strength 0.5" in err


def test_what_is_not_in_the_new_weights_is_said_even_if_quiet(tmp_path, run, tiny_ckpt):
    outputs, inputs = modules(FAMILY)["unet.middle_block.attention.proj_in"]
    query = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path = lora(
        tmp_path / "x.safetensors",
        {f"{PROJ}.lora_down.weight": (2, inputs), f"{PROJ}.lora_up.weight": (outputs, 2), f"{query}.diff_b": (128,)},
        extra={"lora_unet_mid_blok.alpha": torch.tensor(1.0), "bundle_emb.tree.emb_params": torch.ones(1, 64)},
    )
    code, _, err = run("convert", tiny_ckpt, "y.safetensors", "--lora", path, "-q")
    assert code == 0
    assert "x.safetensors holds 1 tensor of 5 that match no module" in err
    assert f"x.safetensors has a bias for 1 module without one, left out: {query}" in err
    assert "x.safetensors brings 1 word along, which a model cannot store: tree" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lora", "nothere"), "nothere"),
        (("--lora", "DETAIL:1e9"), "has a strength out of range"),
        (("--lora", "DETAIL", "--only", "vae"), "changes nothing in the VAE, the network that --only writes"),
        (("--lora", "BAD"), "bad.safetensors holds NaN or infinite values in 1 tensor"),
        (
            ("--lora", "HUGE:100", "--precision", "fp16"),
            "would hold values that are NaN, infinite or beyond its precision",
        ),
        (("--lora", "TINY.ckpt"), "is not an adapter"),
    ],
)
def test_what_cannot_be_baked_is_refused_and_leaves_no_file(tmp_path, run, tiny_ckpt, adapter, arguments, said):
    shapes = {name: shape for name, shape in lora_shapes().items() if PROJ in name}
    down = f"{PROJ}.lora_down.weight"
    paths = {"DETAIL": adapter, "TINY.ckpt": tiny_ckpt}
    for name, value in (("BAD", float("nan")), ("HUGE", 6e4)):
        extra = {down: torch.full(shapes[down], value, dtype=torch.float16)}
        paths[name] = lora(tmp_path / f"{name.lower()}.safetensors", shapes, extra=extra)
    given = [
        f"{paths[name]}{colon}{rest}" if (name := text.partition(":")[0]) in paths else text
        for text in arguments
        for colon, rest in [text.partition(":")[1:]]
    ]
    refused(run("convert", tiny_ckpt, "out.safetensors", *given), said)
    assert not [*tmp_path.glob("*out*")]


def test_the_target_must_not_be_an_adapter(tmp_path, tiny_ckpt, adapter):
    with pytest.raises(TargetError, match="is the source itself"):
        baked(tiny_ckpt, adapter, adapter, force=True)


def test_an_adapter_of_another_family_is_refused_with_both_named(tmp_path, tiny_ckpt):
    from convert.layouts.adapter_names import FAMILIES

    path = lora(tmp_path / "xl.safetensors", lora_shapes(FAMILIES[2], rank=1))
    with pytest.raises(CheckpointError, match=r"xl.safetensors is an adapter for Stable Diffusion XL; the model is"):
        baked(tiny_ckpt, tmp_path / "x.safetensors", path)


def test_a_network_alone_takes_its_share(tmp_path, run, tiny_ckpt, adapter, base):
    code, _, err = run("convert", tiny_ckpt, "te.safetensors", "--only", "text_encoder", "--lora", adapter)
    assert code == 0
    assert "detail.safetensors also changes 278 modules of networks that are not written" in err
    tensors = safetensors.torch.load_file(tmp_path / "te.safetensors")
    wanted = {name: value for name, value in expected(base, adapter).items() if name.startswith("text_encoder.")}
    assert len(wanted) == 12
    assert all((tensors[name] - value).norm() <= 1e-6 * value.norm() for name, value in wanted.items())
