"""An adapter with the names of another program: the same tensors there and back, and the other program reads them."""

import copy
import json

import pytest
import safetensors.torch
import torch
from adapters import FAMILY, lora, lora_shapes
from conftest import refused
from safetensors import safe_open
from test_bake import expected
from weights_of import stored

from convert.actions.respell import respell
from convert.adapters.adapter import open_adapter, read_adapter
from convert.adapters.hashes import autov3
from convert.layouts.adapter_names import FAMILIES, diffusers_names, module_names, modules

METADATA = {"ss_network_module": "networks.lora", "ss_tag_frequency": '{"a": {"tree": 3}}', "sshs_model_hash": "0" * 64}
PROJ = "lora_unet_mid_block_attentions_0_proj_in"
CONV = "lora_unet_mid_block_resnets_0_conv1"
LINEAR = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def same(first, second):
    a, b = safetensors.torch.load_file(first), safetensors.torch.load_file(second)
    assert {name: (value.dtype, value.shape) for name, value in a.items()} == {
        name: (value.dtype, value.shape) for name, value in b.items()
    }
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def weight(name):
    return modules(FAMILY)[module_names(FAMILY)[name]]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_module_of_every_family_comes_back_from_diffusers_and_peft(tmp_path, family):
    """With alphas that differ between modules."""
    shapes = lora_shapes(family, rank=1, conv=True)
    one, other = (next(name for name in shapes if kind in name and "alpha" in name) for kind in ("_te", "_unet"))
    alphas = {one: torch.tensor(0.3), other: torch.tensor(8.0, dtype=torch.float16)}
    first = lora(tmp_path / "first.safetensors", shapes, METADATA, extra=alphas)
    respell(first, tmp_path / "diffusers.safetensors", "diffusers")
    respell(tmp_path / "diffusers.safetensors", tmp_path / "peft", "peft")
    respell(tmp_path / "peft", tmp_path / "last.safetensors", "kohya")
    same(first, tmp_path / "last.safetensors")
    new = {"format": "pt", "sshs_model_hash": autov3(tmp_path / "last.safetensors")}
    assert metadata_of(tmp_path / "last.safetensors") == {**METADATA, **new}


def test_one_network_is_one_folder_and_a_pickle_is_read(tmp_path):
    shapes = {name: shape for name, shape in lora_shapes().items() if name.startswith("lora_unet_")}
    first = lora(tmp_path / "first.safetensors", shapes)
    pickled = tmp_path / "first.pt"
    torch.save(safetensors.torch.load_file(first), pickled)
    respell(pickled, tmp_path / "peft", "peft")
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    respell(tmp_path / "peft", tmp_path / "last.safetensors", "kohya")
    same(first, tmp_path / "last.safetensors")


KINDS = {
    "lora, Tucker": {f"{CONV}.lora_down.weight": (2, 128, 1, 1), f"{CONV}.lora_mid.weight": (2, 2, 3, 3)}
    | {f"{CONV}.lora_up.weight": (128, 2, 1, 1), f"{CONV}.alpha": ()},
    "loha": {f"{LINEAR}.hada_w{n}_{part}": shape for n in (1, 2) for part, shape in (("a", (256, 2)), ("b", (2, 64)))},
    "lokr": {f"{LINEAR}.lokr_w1": (4, 4), f"{LINEAR}.lokr_w2_a": (64, 2), f"{LINEAR}.lokr_w2_b": (2, 16)},
    "glora": {
        f"{LINEAR}.{part}.weight": shape
        for part, shape in (("a1", (64, 2)), ("a2", (2, 64)), ("b1", (256, 2)), ("b2", (2, 64)))
    },
    "oft": {f"{LINEAR}.oft_blocks": (48, 64, 64), f"{LINEAR}.alpha": (), f"{LINEAR}.rescale": (3072, 1)},
    "full": {f"{CONV}.diff": (128, 128, 3, 3), f"{CONV}.diff_b": (128,)},
    "norms": {f"lora_unet_mid_block_resnets_0_norm1.{part}_norm": (128,) for part in "wb"},
    "set": {f"{LINEAR}.set_weight": (256, 64)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_keep_their_names_in_kohyas_spelling_and_have_none_in_others(tmp_path, run, kind):
    first = lora(tmp_path / "first.safetensors", KINDS[kind])
    respell(first, tmp_path / "last.safetensors", "kohya")
    same(first, tmp_path / "last.safetensors")
    for spelling in ("diffusers", "peft"):
        out = f"x.{'safetensors' if spelling == 'diffusers' else 'folder'}"
        err = refused(run("convert", first, out, "--spelling", spelling), f"the spelling of {spelling} cannot hold")
        assert "of 1 module. Use --spelling kohya." in err
        assert not [*tmp_path.glob("*x.*")]


def test_the_scaling_of_ia3_keeps_what_it_multiplies(tmp_path):
    extra = {f"{LINEAR}.on_input": torch.tensor(1)}
    first = lora(tmp_path / "first.safetensors", {f"{LINEAR}.weight": (1, 64)}, extra=extra)
    respell(first, tmp_path / "last.safetensors", "kohya")
    same(first, tmp_path / "last.safetensors")


@pytest.mark.parametrize(("name", "lengths"), [(LINEAR, (256, 1)), (CONV, (128, 1, 1, 1))])
def test_lengths_of_dora_come_back(tmp_path, run, name, lengths):
    kernel = weight(name)[2:]
    shapes = {
        f"{name}.lora_down.weight": (2, weight(name)[1], *kernel),
        f"{name}.lora_up.weight": (weight(name)[0], 2, *(1 for _ in kernel)),
        f"{name}.alpha": (),
        f"{name}.dora_scale": lengths,
    }
    first = lora(tmp_path / "first.safetensors", shapes)
    respell(first, tmp_path / "d.safetensors", "diffusers")
    respell(tmp_path / "d.safetensors", tmp_path / "p", "peft")
    respell(tmp_path / "p", tmp_path / "last.safetensors", "kohya")
    same(first, tmp_path / "last.safetensors")
    shapes[f"{name}.dora_scale"] = (1, weight(name)[1], *(1 for _ in kernel))
    inputs = lora(tmp_path / "inputs.safetensors", shapes)
    refused(run("convert", inputs, "x.safetensors", "--spelling", "diffusers"), "DoRA lengths per input of 1 module")


def test_scales_that_are_not_alpha_by_rank_become_alphas(tmp_path):
    """PEFT's rank-stabilised ones, and a stated .scale."""
    path = module_names(FAMILY)[PROJ]
    outputs, inputs = modules(FAMILY)[path]
    folder = tmp_path / "peft"
    folder.mkdir()
    name = "base_model.model.mid_block.attentions.0.proj_in"
    shapes = {f"{name}.lora_A.weight": (4, inputs, 1, 1), f"{name}.lora_B.weight": (outputs, 4, 1, 1)}
    lora(folder / "adapter_model.safetensors", shapes)
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "use_rslora": True}))
    respell(folder, tmp_path / "stable.safetensors", "kohya")
    assert safetensors.torch.load_file(tmp_path / "stable.safetensors")[f"{PROJ}.alpha"] == 8.0
    shapes = {f"{PROJ}.lora_down.weight": (4, inputs, 1, 1), f"{PROJ}.lora_up.weight": (outputs, 4, 1, 1)}
    scaled = lora(tmp_path / "scaled.safetensors", shapes, extra={f"{PROJ}.scale": torch.tensor(0.25)})
    respell(scaled, tmp_path / "d.safetensors", "diffusers")
    with open_adapter(tmp_path / "d.safetensors") as file:
        (change,) = read_adapter(file).changes
    assert (change.alpha, change.scale) == (1.0, 0.25)


def test_matrices_become_what_their_module_is(tmp_path):
    """diffusers reads convolutions for the projections of the first version, and matrices elsewhere."""
    query = PROJ.replace("proj_in", "transformer_blocks_0_attn1_to_q")
    shapes = {
        f"{PROJ}.lora_down.weight": (2, 128),
        f"{PROJ}.lora_up.weight": (128, 2),
        f"{query}.lora_down.weight": (2, 128, 1, 1),
        f"{query}.lora_up.weight": (128, 2, 1, 1),
    }
    respell(lora(tmp_path / "x.safetensors", shapes), tmp_path / "y.safetensors", "diffusers")
    found = safetensors.torch.load_file(tmp_path / "y.safetensors")
    path = "unet.mid_block.attentions.0"
    assert found[f"{path}.proj_in.lora_A.weight"].shape == (2, 128, 1, 1)
    assert found[f"{path}.transformer_blocks.0.attn1.to_q.lora_A.weight"].shape == (2, 128)


def test_bundled_embeddings_are_kept_where_there_is_a_place(tmp_path, run):
    words = {"bundle_emb.a.b.string_to_param.*": torch.ones(2, 8), "bundle_emb.c.clip_l": torch.ones(1, 8)}
    shapes = {name: shape for name, shape in lora_shapes().items() if PROJ in name}
    first = lora(tmp_path / "first.safetensors", shapes, extra=words)
    respell(first, tmp_path / "d.safetensors", "diffusers")
    respell(tmp_path / "d.safetensors", tmp_path / "last.safetensors", "kohya")
    same(first, tmp_path / "last.safetensors")
    refused(
        run("convert", first, "p", "--spelling", "peft"), "cannot hold embeddings (bundle_emb.a.b.string_to_param.*,"
    )


def test_what_is_not_written_is_said(tmp_path, run):
    shapes = {name: shape for name, shape in lora_shapes().items() if PROJ in name} | {"lora_unet_x.alpha": ()}
    lora(tmp_path / "x.safetensors", shapes)
    code, out, err = run("convert", "x.safetensors", "y.safetensors", "--spelling", "diffusers", "-q")
    assert (code, out) == (0, ["y.safetensors"])
    assert "x.safetensors holds 1 tensor of 4 that match no module of Stable Diffusion 1: lora_unet_x.alpha" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("y.pt", "--spelling", "kohya"), "y.pt must end in .safetensors"),
        (("y.safetensors", "--spelling", "peft"), "PEFT's spelling is a folder"),
        (("x.safetensors", "--spelling", "kohya", "--force"), "is the source itself, which would be lost"),
        (("there.safetensors", "--spelling", "kohya"), "there.safetensors exists already"),
        (("folder", "--spelling", "peft", "--force"), "is not a folder with an adapter, so it is not replaced"),
        (("nowhere/y.safetensors", "--spelling", "kohya"), "the folder of nowhere/y.safetensors does not exist"),
        (("y.safetensors", "--spelling", "kohya", "--precision", "fp16"), "leave out --precision"),
        (("y.safetensors", "--spelling", "kohya", "--lora", "z"), "leave out --lora"),
    ],
)
def test_targets_that_cannot_be_written_are_refused(tmp_path, run, arguments, said):
    lora(tmp_path / "x.safetensors", {name: shape for name, shape in lora_shapes().items() if PROJ in name})
    (tmp_path / "there.safetensors").touch()
    (tmp_path / "folder").mkdir()
    refused(run("convert", "x.safetensors", *arguments), said)


def test_a_folder_with_an_adapter_is_replaced_if_forced(tmp_path):
    shapes = {name: shape for name, shape in lora_shapes().items() if PROJ in name}
    first = lora(tmp_path / "x.safetensors", shapes)
    respell(first, tmp_path / "p", "peft")
    with pytest.raises(FileExistsError):
        respell(first, tmp_path / "p", "peft")
    respell(first, tmp_path / "p", "peft", force=True)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["diffusers", "peft"])
def test_the_other_program_makes_the_same_weights_of_it(tmp_path, theirs, tiny_ckpt, spelling):
    """With ranks and alphas that differ between modules."""
    shapes = lora_shapes(rank=2, conv=True) | lora_shapes(rank=4)
    alphas = {name: torch.tensor(3.0) for name in shapes if name.endswith(("to_q.alpha", "mlp_fc1.alpha"))}
    first = lora(tmp_path / "first.safetensors", shapes, extra=alphas, dtype=torch.float32)
    wanted = expected(stored(tiny_ckpt), first)
    target = tmp_path / ("p" if spelling == "peft" else "d.safetensors")
    respell(first, target, spelling)
    pipeline = copy.deepcopy(theirs)
    unet, text = pipeline.unet, pipeline.text_encoder
    if spelling == "peft":
        from peft import PeftModel

        old = torch.nn.Module()  # transformers 5 has no such level, files and older versions have
        old.text_model = text
        PeftModel.from_pretrained(unet, target / "unet").merge_and_unload()
        PeftModel.from_pretrained(old, target / "text_encoder").merge_and_unload()
    else:
        pipeline.load_lora_weights(str(tmp_path), weight_name="d.safetensors")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    paths = diffusers_names(FAMILY)
    for name, value in wanted.items():
        component, _, path = paths[name.removesuffix(".weight")].partition(".")
        network = {"unet": unet, "text_encoder": text}[component]
        merged = network.get_submodule(path.removeprefix("text_model.")).weight
        assert (merged.reshape(value.shape) - value).norm() <= 1e-6 * value.norm(), name
