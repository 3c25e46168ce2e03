"""Reading adapters: every spelling of every module, what does not match, and files of other families."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from adapters import FAMILY, lora, lora_shapes
from conftest import TINY

from convert.adapters.adapter import open_adapter, read_adapter
from convert.errors import CheckpointError
from convert.layouts.adapter_names import (
    FAMILIES,
    diffusers_names,
    kohya_names,
    module_names,
    modules,
    with_unused_layer,
)
from sd.config import SD_V1, SD_V2

V1, V2, XL, REFINER = FAMILIES


def read(path, config=TINY):
    with open_adapter(path) as file:
        return read_adapter(file, config)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_name_means_two_modules(family):
    spelled = module_names(family)
    assert set(spelled.values()) == set(modules(family)) == set(diffusers_names(family)) == set(kohya_names(family))
    assert all(spelled[name] == ours for ours, name in kohya_names(family).items())
    assert all(spelled[name] == ours for ours, name in diffusers_names(family).items())


@pytest.mark.parametrize(
    ("family", "conv", "unet", "text"),
    [(V1, False, 192, 72), (V1, True, 278, 72), (V2, False, 192, 138), (XL, False, 722, 72 + 192)],
)
def test_every_module_of_a_full_size_file_is_found(tmp_path, family, conv, unet, text):
    """The shapes of kohya's files at rank 4."""
    shapes = lora_shapes(family, rank=4, conv=conv)
    found = read(lora(tmp_path / "full.safetensors", shapes), None)
    counts = {
        part: sum(change.target.startswith(part) for change in found.changes) for part in ("unet", "text_encoder")
    }
    assert counts == {"unet": unet, "text_encoder": text}
    assert (found.family, found.unknown, found.incomplete) == (family.name, (), ())


SPELLINGS = {  # of one projection and one layer of the text encoder
    "kohya": ("lora_unet_mid_block_attentions_0_proj_in", ".lora_down.weight", ".lora_up.weight"),
    "kohya, original names": ("lora_unet_middle_block_1_proj_in", ".lora_down.weight", ".lora_up.weight"),
    "kohya, one of two encoders": (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        ".lora_down.weight",
        ".lora_up.weight",
    ),
    "lycoris": ("lycoris_mid_block_attentions_0_proj_in", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": ("unet.mid_block.attentions.0.proj_in", ".lora_A.weight", ".lora_B.weight"),
    "diffusers, no component": ("mid_block.attentions.0.proj_in", ".lora_A.weight", ".lora_B.weight"),
    "diffusers, older": ("unet.mid_block.attentions.0.proj_in", ".lora.down.weight", ".lora.up.weight"),
    "diffusers, processors": (
        "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "_lora.down.weight",
        "_lora.up.weight",
    ),
    "diffusers, processors of out": (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out",
        "_lora.down.weight",
        "_lora.up.weight",
    ),
    "diffusers, text": (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
    "diffusers, older text": (
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out",
        "_lora.down.weight",
        "_lora.up.weight",
    ),
    "PEFT": ("base_model.model.mid_block.attentions.0.proj_in", ".lora_A.weight", ".lora_B.weight"),
    "PEFT, named": (
        "base_model.model.mid_block.attentions.0.proj_in",
        ".lora_A.default.weight",
        ".lora_B.default.weight",
    ),
    "PEFT, text": ("base_model.model.text_model.encoder.layers.0.mlp.fc2", ".lora_A.weight", ".lora_B.weight"),
    "transformers 5": ("text_encoder.encoder.layers.0.mlp.fc2", ".lora_A.weight", ".lora_B.weight"),
    "weights' names": ("diffusion_model.middle_block.1.proj_in", ".lora_up.weight", ".lora_down.weight"),
}


@pytest.mark.parametrize(("module", "down", "up"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_a_module_is_known(tmp_path, module, down, up):
    ours = module_names(FAMILY)[module]
    outputs, inputs = modules(FAMILY)[ours][:2]
    down, up = (up, down) if "up" in down else (down, up)
    path = lora(tmp_path / "one.safetensors", {module + down: (2, inputs), module + up: (outputs, 2)})
    (change,) = read(path).changes
    assert (change.target, change.kind, change.rank, change.scale) == (ours, "lora", 2, 1.0)


def test_one_wrong_letter_is_named(tmp_path):
    shapes = lora_shapes(V1, rank=1)
    shapes = {name.replace("mid_block_attentions_0_proj_in.lora_up", "mid_block_attention_0_proj_in.lora_up"): shape
              for name, shape in shapes.items()}  # fmt: skip
    found = read(lora(tmp_path / "v1.safetensors", shapes), SD_V1)
    assert found.unknown == ("lora_unet_mid_block_attention_0_proj_in.lora_up.weight",)
    assert found.incomplete == ("lora_unet_mid_block_attentions_0_proj_in (only alpha, down)",)
    assert len(found.changes) == 263
    assert "1 tensor of 792 that match no module" in found.problems[0].replace("matches", "match")


def narrow(tmp_path, metadata=None, suffix=".safetensors", **extra):
    """A LoRA of two modules, rank 2."""
    shapes = {}
    for name in ("lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"):
        outputs, inputs = modules(FAMILY)[module_names(FAMILY)[name]]
        shapes |= {f"{name}.lora_down.weight": (2, inputs), f"{name}.lora_up.weight": (outputs, 2)}
    return lora(tmp_path / f"narrow{suffix}", shapes, metadata, **extra)


@pytest.mark.parametrize(
    ("alpha", "scale"), [(None, 1.0), (1.0, 0.5), (torch.tensor(4, dtype=torch.bfloat16), 2.0), (0.0, 1.0)]
)
def test_alpha_is_divided_by_the_rank(tmp_path, alpha, scale):
    extra = {} if alpha is None else {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.as_tensor(alpha)}
    found = read(narrow(tmp_path, **{"extra": extra}))
    by_target = {change.target: change for change in found.changes}
    assert by_target["unet.middle_block.attention.proj_in"].scale == scale
    assert ("alpha 0 in 1 module" in "".join(found.notes)) == (alpha == 0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_pickles_and_safetensors_read_alike(tmp_path, suffix):
    assert len(read(narrow(tmp_path, suffix=suffix)).changes) == 2


@pytest.mark.parametrize(("settings", "scale"), [({"alpha": 6, "r": 4}, 1.5), ({"alpha": 6}, 1.0), ({}, 1.0)])
def test_peft_divides_by_a_rank_that_whole_factors_do_not_show(tmp_path, settings, scale):
    name = "mid_block.attentions.0.proj_in"
    outputs, inputs = modules(FAMILY)[module_names(FAMILY)[name]]
    shapes = {
        f"base_model.model.{name}.lokr_w1": (2, 2),
        f"base_model.model.{name}.lokr_w2": (outputs // 2, inputs // 2),
    }
    lora(tmp_path / "adapter_model.safetensors", shapes)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", **settings}))
    assert [change.scale for change in read(tmp_path).changes] == [scale]


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"lora_alpha": 1}, {0.5}),
        ({"lora_alpha": 4, "use_rslora": True}, {4 / 2**0.5}),
        ({"lora_alpha": 1, "alpha_pattern": {"mid_block.attentions.0.proj_in": 6}}, {3.0}),
        ({"lora_alpha": 1, "alpha_pattern": {"proj_out": 6}}, {0.5}),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_alpha_in_the_settings(tmp_path, settings, scales, beside):
    """In PEFT's file beside the weights, and in the metadata of diffusers' files."""
    name = "mid_block.attentions.0.proj_in"
    tensors = {
        f"base_model.model.{name}.lora_A.weight": torch.ones(2, 64),
        f"base_model.model.{name}.lora_B.weight": None,
    }
    outputs, inputs = modules(FAMILY)[module_names(FAMILY)[name]]
    shapes = dict(zip(tensors, ((2, inputs), (outputs, 2)), strict=True))
    if beside:
        lora(tmp_path / "adapter_model.safetensors", shapes)
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        path = tmp_path
    else:
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}
        path = lora(tmp_path / "x.safetensors", shapes, metadata)
    assert {change.scale for change in read(path).changes} == scales


def test_adapters_of_other_families_are_refused_with_both_named(tmp_path):
    path = lora(tmp_path / "v2.safetensors", lora_shapes(V2, rank=1))
    with pytest.raises(CheckpointError, match=r"v2.safetensors is an adapter for Stable Diffusion 2; the model is"):
        read(path, SD_V1)
    path = lora(tmp_path / "xl.safetensors", lora_shapes(XL, rank=1))
    with pytest.raises(CheckpointError, match="adapter for Stable Diffusion XL; the model is Stable Diffusion 1"):
        read(path, SD_V1)


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 8)}, "is an adapter for FLUX"),
        ({"transformer.x.lora_A.weight": (2, 8)}, "is an adapter for a transformer of another kind"),
        ({"lora_unet_nothing.lora_down.weight": (2, 8)}, "its one tensor does not belong to a module"),
        ({"emb_params": (2, 768)}, "is not an adapter: it holds .*textual inversion"),
        ({"*": (2, 768)}, "is not an adapter: it holds textual inversion. An embedding is given with --embeddings"),
        ({"blorb": (2,)}, "is not an adapter: it holds 1 tensor, none with a known name; the first is blorb"),
        (
            {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 8)},
            "changes nothing: it lacks tensors of 1 module",
        ),
    ],
)
def test_what_is_no_adapter_of_stable_diffusion_is_named(tmp_path, shapes, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        read(lora(tmp_path / "x.safetensors", shapes), SD_V1)


def test_a_checkpoint_is_no_adapter(tiny_ckpt):
    with pytest.raises(CheckpointError, match=r"is not an adapter: it holds .* A checkpoint is given with --model"):
        read(tiny_ckpt)


def test_wrong_shapes_are_named(tmp_path):
    path = lora(
        tmp_path / "x.safetensors",
        {f"lora_unet_mid_block_attentions_0_proj_in.lora_{part}.weight": (2, 2) for part in ("up", "down")},
    )
    with pytest.raises(CheckpointError, match=r"other shapes .* in 1 module: lora_unet_mid_block_attentions_0_proj_in"):
        read(path)


def test_a_module_twice_is_refused(tmp_path):
    shapes = {
        f"lora_unet_{module}_proj_in.lora_{part}.weight": (2, 2)
        for module in ("mid_block_attentions_0", "middle_block_1")
        for part in ("up", "down")
    }
    with pytest.raises(CheckpointError, match="holds one module twice"):
        read(lora(tmp_path / "x.safetensors", shapes))


def test_bundled_embeddings_are_found(tmp_path):
    path = narrow(
        tmp_path, extra={"bundle_emb.a.b.string_to_param.*": torch.ones(2, 8), "bundle_emb.c.clip_l": torch.ones(1, 8)}
    )
    found = read(path)
    assert {name: set(parts) for name, parts in found.words.items()} == {"a.b": {"string_to_param"}, "c": {"clip_l"}}
    assert found.unknown == ()


def test_an_empty_folder_and_a_folder_of_settings_only(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no adapter: none of adapter_model\.safetensors"):
        open_adapter(tmp_path)


def test_names_and_shapes_are_those_of_a_published_list():
    """Made by the program that writes such files, at rank 4, with convolutions."""
    listed = (Path(__file__).parents[1] / "golden" / "lora-kohya-v1.txt").read_text().splitlines()
    published = {name: tuple(map(int, shape)) for name, *shape in map(str.split, listed)}
    assert lora_shapes(V1, rank=4, conv=True) == published


@pytest.mark.parametrize(
    ("conv", "digest"),
    [
        (False, "5374640e7c006cd05db9887323a4b8f5c5bd74f8841a408d0c0c4e61d6eb8a0f"),
        (True, "eadb03bbbdc2f597d17f993df4d0e801944e0caaf6f12cd62301875f54d6dcf7"),
    ],
)
def test_those_of_xl_are_too(conv, digest):
    """2958 and 3156 tensors of the same program, sorted, a line each; the UNet's have the original names."""
    shapes = lora_shapes(XL, rank=4, conv=conv)
    lines = "".join(sorted(f"{name} {list(shape)}\n" for name, shape in shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


def test_a_layer_that_is_never_run_is_told_apart(tmp_path):
    """Version 2 stops before the last layer of its text encoder."""
    shapes = {name: shape for name, shape in lora_shapes(with_unused_layer(V2), rank=1).items() if "layers_2" in name}
    found = read(lora(tmp_path / "v2.safetensors", shapes), SD_V2)
    assert (found.unknown, len(found.changes)) == ((), 4 * 6)
    assert "never runs: 18 tensors not applied" in found.notes[0]
