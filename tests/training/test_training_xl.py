"""Training a small XL: how it begins, what its UNet reads, and the script."""

import copy
from dataclasses import replace

import finetune
import make_checkpoint
import pytest
import torch
import train_inpainting
import train_xl
from conftest import TINY, assemble, fill
from oracles import relative_error
from PIL import Image

import sd
from convert.actions.convert import convert
from sd.config import SD_V1_INPAINTING, SDXL_INPAINTING, SDXL_REFINER
from sd.networks.attention import SpatialTransformer
from sd.pipeline.settings import Settings
from sd.pipeline.vector import vectors_for
from sd.runtime.saving import save_model
from sd.training.small_xl import networks_from, xl_config
from sd.training.xl import Conditions

BASE = replace(TINY, unet=replace(TINY.unet, width=64, multipliers=(1, 1, 1, 1)), prediction="v", native_size=64)
CONFIG = xl_config(BASE)
PROMPTS = ["a red circle on a blue background", "", "a star to the left of a ring, dots! and a green background"]


@pytest.fixture(scope="module")
def base():
    return assemble(BASE, fill(BASE))


@pytest.fixture(scope="module")
def networks(base):
    return networks_from(base, CONFIG, seed=0)


@pytest.fixture(scope="module")
def tokens(base):
    return torch.from_numpy(base.tokenizer(PROMPTS))


def test_the_config_is_an_xl_of_three_levels_with_heads_of_64_channels():
    assert (CONFIG.family, CONFIG.prediction, CONFIG.native_size) == ("sdxl", "v", 64)
    assert (CONFIG.unet.depths, CONFIG.unet.heads, CONFIG.unet.context_width) == ((0, 1, 2), (1, 1, 1), 128)
    assert CONFIG.unet.vector_width == 64 + 6 * 256


@pytest.mark.parametrize("other", [CONFIG, replace(BASE, family=SD_V1_INPAINTING.family), TINY], ids=["xl", "9", "32"])
def test_other_models_cannot_become_a_small_xl(other):
    with pytest.raises(ValueError, match=f"multiple of 64 wide; this is {other.family}, {other.unet.width} wide"):
        xl_config(other)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_each_text_encoder_begins_with_the_context_that_the_unet_knows(base, networks, tokens, part):
    """In proportion: the residual stream beside the normed copy, and gelu for quick_gelu, change it by a tenth."""
    padding, end = getattr(CONFIG, part).pad_token, BASE.text_encoder.pad_token
    mine = tokens.masked_fill((tokens == end).cumsum(1) > 1, padding)
    with torch.no_grad():
        wanted, (found, pooled) = base.text_encoder(tokens), networks[part].encode(mine)
    scale = (found * wanted).sum() / wanted.square().sum()
    assert relative_error(found / scale, wanted) < 0.15
    assert (pooled is not None) == (part == "text_encoder_2")


def test_the_latents_have_the_scale_of_xl_and_the_pictures_stay_the_same(base, networks):
    image, latents = torch.rand(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    old, new = BASE.vae.latent_scale, CONFIG.vae.latent_scale
    with torch.no_grad():
        (mean, logvar), (new_mean, new_logvar) = base.vae.encode(image), networks["vae"].encode(image)
        assert relative_error(new * new_mean, old * mean) < 1e-5
        assert relative_error(new * (new_logvar / 2).exp(), old * (logvar / 2).exp()) < 1e-5
        assert relative_error(networks["vae"].decode(latents / new), base.vae.decode(latents / old)) < 1e-5


def test_the_unet_begins_with_the_blocks_of_the_first_three_levels(base, networks):
    old, new = base.unet, networks["unet"]
    for name, theirs in (("input_blocks.7", "input_blocks.7"), ("output_blocks.2", "output_blocks.5")):
        found, known = new.get_submodule(name), old.get_submodule(theirs)
        assert torch.equal(found["residual"].conv1.weight, known["residual"].conv1.weight)
        found, known = found["attention"].blocks[0], known["attention"].blocks[0]
        assert torch.equal(found.self_attention.q.weight, known.self_attention.q.weight)
        for which in ("k", "v"):
            first, second = getattr(found.cross_attention, which).weight.chunk(2, dim=1)
            wanted = getattr(known.cross_attention, which).weight
            assert torch.equal(first, second)
            assert relative_error(first * wanted.norm() / first.norm(), wanted) < 1e-6
    assert torch.equal(new.out.conv.weight, old.out.conv.weight)


def test_what_the_old_unet_did_not_have_changes_nothing_at_first(networks):
    """The vector, and the second transformer blocks of the last level and the middle."""
    unet = copy.deepcopy(networks["unet"])
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 77, 128)
    with torch.no_grad():
        before = unet(*inputs, torch.randn(2, CONFIG.unet.vector_width))
        deep = [
            module for module in unet.modules() if isinstance(module, SpatialTransformer) and len(module.blocks) > 1
        ]
        assert len(deep) == 6
        for module in deep:
            del module.blocks[1]
        assert torch.equal(unet(*inputs, torch.randn(2, CONFIG.unet.vector_width)), before)


def test_training_gives_the_unet_what_the_pipeline_does(networks, tokens):
    """Of an empty prompt, the zeros that the pipeline takes for an empty negative prompt."""
    settings = Settings(prompt="", seed=0, width=64, height=64)
    encoded, pooled = assemble(CONFIG, networks).encode_texts(PROMPTS, plain=True)
    expected = vectors_for(CONFIG, settings, PROMPTS, encoded, pooled, negative=True)
    with torch.no_grad():
        given = Conditions(CONFIG, [networks["text_encoder"], networks["text_encoder_2"]])(tokens)
    assert [tuple(each.shape) for each in given] == [(3, 77, 128), (3, 64 + 6 * 256)]
    assert [relative_error(*pair) < 1e-6 for pair in zip(given, expected, strict=True)] == [True, True]
    assert not given[0][1].any()


@pytest.mark.slow
def test_a_small_xl_is_made_trained_and_draws_and_goes_on(base, networks, tmp_path, capsys):
    start, folder = tmp_path / "base.ckpt", tmp_path / "xl"
    save_model(start, BASE, fill(BASE), {}, step=0, dtype=torch.float32, merge=True)
    with torch.enable_grad():
        train_xl.main(
            [str(folder), "--model", str(start), "--pictures", "4", "--batch-size", "2", "--steps", "2", "--seed", "0"]
        )
    path = folder / "model.ckpt"
    assert capsys.readouterr().out.strip() == str(path)
    model = sd.load(path, precision="fp32")
    assert model.config == CONFIG
    change = {part: relative_error(values_of(getattr(model, part)), values_of(networks[part])) for part in networks}
    assert change.pop("unet") > 1e-3
    assert max(change.values()) < 5e-4  # float16
    assert model.unet.label_emb.linear2.weight.any()
    (picture,) = model.txt2img("a red circle", steps=2, seed=1)
    assert picture.size == (64, 64)
    convert(path, tmp_path / "diffusers", layout="diffusers")
    convert(tmp_path / "diffusers", tmp_path / "again.safetensors")
    again = sd.load(tmp_path / "again.safetensors", precision="fp32")
    assert torch.equal(values_of(again.unet), values_of(model.unet))

    with torch.enable_grad():
        short = ["--pictures", "2", "--batch-size", "2", "--steps", "1", "--scenes", "all"]
        train_xl.main([str(tmp_path / "more"), "--model", str(path), *short])
    more = sd.load(tmp_path / "more" / "model.ckpt", precision="fp32")
    change = {
        part: relative_error(values_of(getattr(more, part)), values_of(getattr(model, part))) for part in networks
    }
    assert 1e-4 < change.pop("unet") < 1e-2
    assert max(change.values()) == 0
    with torch.enable_grad():
        train_inpainting.main([str(tmp_path / "holes"), "--model", str(path), *short[:-2]])
    holes = sd.load(tmp_path / "holes" / "model.ckpt", precision="fp32")
    assert (holes.config.family, holes.config.unet.in_channels) == ("sdxl-inpainting", 9)
    assert torch.equal(values_of(holes.text_encoder_2), values_of(model.text_encoder_2))

    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (64, 64), "red").save(photos / "red.png")
    (photos / "red.txt").write_text("nothing but red")
    options = ["--steps", "1", "--batch-size", "1", "--learning-rate", "1e-3", "--train-text-encoder"]
    with torch.enable_grad():
        finetune.main([str(path), str(photos), str(tmp_path / "tuned"), *options])
    tuned = sd.load(tmp_path / "tuned" / "model.ckpt", precision="fp32", weights="model")
    change = {
        part: relative_error(values_of(getattr(tuned, part)), values_of(getattr(model, part))) for part in networks
    }
    assert change.pop("vae") == 0
    assert min(change.values()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", [SDXL_REFINER, SDXL_INPAINTING, SD_V1_INPAINTING], ids=lambda each: each.family)
def test_only_models_that_make_pictures_from_text_alone_are_finetuned(family, tmp_path):
    config = make_checkpoint.tiny(family)
    save_model(tmp_path / "other.ckpt", config, fill(config), {}, step=0, dtype=torch.float16, merge=True)
    with pytest.raises(ValueError, match=f"other.ckpt is {family.family}; only models that make pictures from text"):
        finetune.main([str(tmp_path / "other.ckpt"), str(tmp_path), str(tmp_path / "tuned")])


def values_of(network):
    """All values of a network in a row."""
    return torch.cat([values.flatten() for values in network.state_dict().values()])
