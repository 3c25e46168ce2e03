"""Adapters and learned words of Stable Diffusion XL, in both text encoders: against diffusers, which uses PEFT."""

import copy

import make_checkpoint
import pytest
import torch
from adapters import lora, lora_shapes
from conftest import TINY, assemble, fill, rest_slow
from diffusers import DDIMScheduler
from embeddings import made_up
from oracles import diffusers_xl_pipeline, relative_error
from safetensors.torch import load_file, save_file

from convert.actions.respell import respell
from convert.adapters.adapter import open_adapter, read_adapter
from convert.errors import CheckpointError
from convert.layouts.adapter_names import adapted_family, kohya_names, modules
from sd.config import SDXL, SDXL_INPAINTING, SDXL_REFINER
from sd.runtime.loading import load

CONFIG, REFINER, INPAINTING = (make_checkpoint.tiny(each) for each in (SDXL, SDXL_REFINER, SDXL_INPAINTING))
FAMILY = adapted_family(CONFIG)
PARTS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "xl.safetensors"
    save_file({name: value.contiguous() for name, value in make_checkpoint.made_up_state_dict(CONFIG).items()}, path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Linear layers and convolutions of all networks."""
    path = tmp_path_factory.mktemp("adapters") / "detail.safetensors"
    return lora(path, lora_shapes(FAMILY, rank=3, conv=True), dtype=torch.float32, size=0.2)


@pytest.fixture(scope="module")
def pipeline(adapter):
    pipeline = diffusers_xl_pipeline(CONFIG, fill(CONFIG), DDIMScheduler())  # not shared: merging writes into it
    pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name, adapter_name="detail")
    return pipeline


def weights(model):
    return {part: copy.deepcopy(getattr(model, part).state_dict()) for part in PARTS}


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, pytest.param(-0.5, marks=pytest.mark.slow)])
def test_networks_compute_what_those_of_diffusers_compute_with_merged_weights(xl, adapter, pipeline, strength):
    model = load(xl, device="cpu", precision="fp32")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(49406, (2, 77), generator=generator)
    tokens[:, -1] = 49407
    model.apply([(adapter, strength)])
    pipeline.set_adapters("detail", strength)
    pipeline.fuse_lora(adapter_names=["detail"])
    try:
        contexts = []
        for part in PARTS[1:]:
            ours, pooled = copy.deepcopy(getattr(model, part)).double().encode(tokens)
            theirs = copy.deepcopy(getattr(pipeline, part)).double()(tokens, output_hidden_states=True)
            assert relative_error(ours, theirs.hidden_states[-2]) < 1e-6
            contexts.append(ours)
        assert relative_error(pooled, theirs.text_embeds) < 1e-6
        x_t, numbers = torch.randn(2, 4, 8, 8, generator=generator).double(), torch.full((2, 6), 64.0).double()
        context, timestep = torch.cat(contexts, -1), torch.tensor(321)
        added = {"text_embeds": pooled, "time_ids": numbers}
        unet = copy.deepcopy(pipeline.unet).double()
        expected = unet(x_t, timestep, context, added_cond_kwargs=added).sample
        sizes = unet.add_time_proj(numbers.flatten()).reshape(2, -1).double()
        found = copy.deepcopy(model.unet).double()(x_t, timestep, context, torch.cat([pooled, sizes], -1))
        assert relative_error(found, expected) < 1e-6
    finally:
        pipeline.unfuse_lora()


def test_every_network_changes_by_the_product_and_back_to_the_bit(xl, adapter):
    """The change itself, as a sum over the rank in float64."""
    model, tensors = load(xl, device="cpu", precision="fp32"), load_file(adapter)
    before = weights(model)
    model.apply([(adapter, 0.5, -2.0)])
    (applied,) = model.adapters
    assert applied.changes.keys() == set(PARTS)
    after, changed = weights(model), 0
    for ours, name in kohya_names(FAMILY).items():
        part, _, module = ours.partition(".")
        base = before[part][f"{module}.weight"]
        change = after[part][f"{module}.weight"].double() - base
        if f"{name}.alpha" not in tensors:
            assert not change.any(), ours
            continue
        down, up = (tensors[f"{name}.lora_{side}.weight"].double().flatten(1) for side in ("down", "up"))
        wanted = (0.5 if part == "unet" else -2.0) * 0.5 * up @ down
        rounding = torch.finfo(torch.float32).eps * base.norm()
        assert (change.flatten(1) - wanted).norm() <= 1e-6 * wanted.norm() + rounding, ours
        changed += 1
    assert changed == len(read_adapter(open_adapter(adapter), CONFIG).changes)
    model.apply([])
    assert all(torch.equal(value, before[part][name]) for part in PARTS for name, value in weights(model)[part].items())


@pytest.mark.slow
@pytest.mark.parametrize("spelling", rest_slow(["diffusers", "peft"]))
def test_other_spellings_do_the_same(xl, adapter, tmp_path, spelling):
    model = load(xl, device="cpu", precision="fp32")
    model.apply([adapter])
    wanted = weights(model)
    other = tmp_path / ("other" if spelling == "peft" else "other.safetensors")
    respell(adapter, other, spelling)
    model.apply([other])
    for part in PARTS:
        assert all(torch.equal(value, wanted[part][name]) for name, value in weights(model)[part].items())


NAMED = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.layers.0.feed_forward.proj_in",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": "text_encoder.layers.0.feed_forward.proj_in",
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": "text_encoder_2.layers.0.attention.q",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.to_q_lora": "text_encoder_2.layers.0.attention.q",
    "clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj": "text_encoder_2.layers.0.attention.q",
    "lora_te2_text_projection": "text_encoder_2.projection",  # as OneTrainer trains it
    "text_encoder_2.text_projection": "text_encoder_2.projection",
    "lora_unet_label_emb_0_0": "unet.label_emb.linear1",
    "lora_unet_add_embedding_linear_1": "unet.label_emb.linear1",
    "lora_unet_input_blocks_4_0_in_layers_2": "unet.input_blocks.4.residual.conv1",
    "unet.down_blocks.1.resnets.0.conv1": "unet.input_blocks.4.residual.conv1",
}


@pytest.mark.parametrize("module", NAMED)
def test_names_of_every_program_mean_the_module(tmp_path, module):
    outputs, inputs, *kernel = modules(FAMILY)[NAMED[module]]
    up, down = ("up", "down") if module.endswith("_lora") else ("lora_up", "lora_down")
    shapes = {
        f"{module}.{up}.weight": (outputs, 2, *(1 for _ in kernel)),
        f"{module}.{down}.weight": (2, inputs, *kernel),
    }
    with open_adapter(lora(tmp_path / "one.safetensors", shapes)) as file:
        found = read_adapter(file, CONFIG)
    assert [change.target for change in found.changes] == [NAMED[module]]
    assert not found.problems


OF_OTHERS = [(CONFIG, TINY), (TINY, CONFIG), (CONFIG, REFINER), (REFINER, CONFIG)]


@pytest.mark.parametrize(("config", "other"), OF_OTHERS, ids=lambda config: config.family)
def test_adapters_of_other_families_are_refused_by_name(tmp_path, config, other):
    family = adapted_family(other)
    shapes = {name: shape for name, shape in lora_shapes(family).items() if name.startswith("lora_unet_")}
    with open_adapter(lora(tmp_path / "other.safetensors", shapes)) as file, pytest.raises(CheckpointError) as error:
        read_adapter(file, config)
    assert f"for {family.title}; the model is {adapted_family(config).title}." in str(error.value)


def test_an_adapter_of_the_base_model_fits_inpainting(adapter):
    """But for the layer that reads the mask, too, it is the same UNet."""
    with open_adapter(adapter) as file:
        assert not read_adapter(file, INPAINTING).problems


# Words


@pytest.fixture
def model():
    return assemble(CONFIG, fill(CONFIG))


def word(folder, name="easy", first=64, second=64, count=2):
    path = folder / f"{name}.safetensors"
    save_file({"clip_g": made_up(count, second, seed=2), "clip_l": made_up(count, first, seed=1)}, path)
    return path


@pytest.mark.slow
def test_both_encoders_learn_a_word_and_forget_it(model, tmp_path):
    """What each reads is diffusers' context with its vectors in the rows of new tokens."""
    plain = model.encode_texts(["a easy cat"])
    model.learn([word(tmp_path)])
    context, pooled = model.encode_texts(["a (easy:1) cat"])
    pipeline = diffusers_xl_pipeline(CONFIG, fill(CONFIG), DDIMScheduler())
    for key, tokenizer, encoder in (
        ("clip_l", pipeline.tokenizer, pipeline.text_encoder),
        ("clip_g", pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        vectors = load_file(tmp_path / "easy.safetensors")[key]
        pipeline.load_textual_inversion(vectors, token="<easy>", tokenizer=tokenizer, text_encoder=encoder)
    expected, _, expected_pooled, _ = pipeline.encode_prompt("a <easy> cat", do_classifier_free_guidance=False)
    assert relative_error(context, expected) < 1e-6
    assert relative_error(pooled, expected_pooled) < 1e-6
    model.learn([])
    assert all(torch.equal(now, before) for now, before in zip(model.encode_texts(["a easy cat"]), plain, strict=True))


def test_the_refiner_reads_the_vectors_of_its_encoder(tmp_path):
    refiner = assemble(REFINER, fill(REFINER))
    path = word(tmp_path, first=32)
    refiner.learn([path])
    assert torch.equal(refiner.text_encoder.token_embedding.rows, load_file(path)["clip_g"])


REFUSED = {  # vectors -> what is said of them
    "version 1": (
        {"emb_params": (2, 768)},
        "is for Stable Diffusion 1 (vectors of 768 numbers); this model is sdxl (64",
    ),
    "one half": ({"clip_g": (2, 1280)}, "is for Stable Diffusion XL refiner (vectors of 1280 numbers); this model"),
    "other widths": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "vectors of 768 and 1280 numbers); this model is"),
    "other counts": ({"clip_l": (2, 64), "clip_g": (3, 64)}, "has 2 and 3 vectors for the two text encoders"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_words_of_other_models_are_refused(model, tmp_path, name):
    shapes, said = REFUSED[name]
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "easy.safetensors")
    with pytest.raises(CheckpointError) as error:
        model.learn([tmp_path / "easy.safetensors"])
    assert said in str(error.value)
    assert model.words == ()


def test_words_of_xl_are_not_for_version_1(tmp_path):
    with pytest.raises(CheckpointError, match="this model is sd-v1"):
        assemble(TINY, fill(TINY)).learn([word(tmp_path)])


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_words_in_an_adapter_go_to_both_encoders(xl, tmp_path, names):
    model, plain = load(xl, device="cpu", precision="fp32"), None
    plain = model.encode_texts(["mine"])[0]
    vectors = [made_up(2, 64, seed=seed) for seed in (1, 2)]
    extra = {f"bundle_emb.mine.{name}": rows for name, rows in zip(names, vectors, strict=True)}
    model.apply([lora(tmp_path / "lora.safetensors", lora_shapes(FAMILY, rank=1), extra=extra)])
    found = [getattr(model, part).token_embedding.rows for part in PARTS[1:]]
    assert all(torch.equal(*pair) for pair in zip(found, vectors, strict=True))
    model.apply([])
    assert torch.equal(model.encode_texts(["mine"])[0], plain)
