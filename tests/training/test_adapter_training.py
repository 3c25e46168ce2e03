"""Training adapters: what is added to a layer, what is trained, how training resumes, and what others read."""

import copy
import json
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import adapter_command
import make_checkpoint
import numpy as np
import pytest
import torch
import train_embedding
import train_lora
import training_example
from conftest import TINY, assemble, fill, final, settings
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from convert.adapters.adapter import open_adapter, read_adapter
from convert.adapters.embedding import read_embedding
from convert.adapters.facts import adapter_facts
from convert.files.tensors import as_tensor
from sd.config import SD_V1, SDXL
from sd.networks.adapters.weight_change import weight_change
from sd.networks.build import build_networks
from sd.runtime.adapter_saving import read_lora, save_embedding, save_lora
from sd.text.tokenizer import Tokenizer
from sd.training.adapters import LowRank, LowRankAdapter, NewWord, adapted_layers
from sd.training.jobs import denoiser_run, fresh_networks
from sd.training.latents import EncodedAsTheyCome

EVERYTHING = {"convolutions": True, "text_encoder": True}
RANKS = {"rank": 3, "alpha": 1.5, "conv_rank": 2, "conv_alpha": 4.0}


@pytest.fixture(autouse=True)
def _gradients():
    with torch.enable_grad():
        yield


def inputs():
    generator = torch.Generator().manual_seed(5)
    x_t, tokens = torch.randn(2, 4, 8, 8, generator=generator), Tokenizer()(["a cat", "by night"])
    return x_t, torch.tensor([7, 321]), tokens


@torch.no_grad()
def predict(networks):
    x_t, timesteps, tokens = inputs()
    return networks["unet"](x_t, timesteps, networks["text_encoder"](tokens))


def adapted(networks, **options):
    """An adapter with random values, that float16 holds, in place of zeros."""
    adapter = LowRankAdapter(adapted_layers(networks, **EVERYTHING), **RANKS, **options)
    with torch.no_grad():
        for number, value in enumerate(adapter.parameters()):
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
            value.copy_((0.1 * noise).half())
    return adapter


def saved(path, adapter, metadata=None):
    layers = [(name, low.down.weight, low.up.weight, low.alpha) for name, low in adapter.layers()]
    save_lora(path, TINY, layers, metadata or {})
    return path


@pytest.mark.parametrize(
    ("convolutions", "text_encoder", "counts"),
    [
        (False, False, {"unet": 192}),
        (False, True, {"unet": 192, "text_encoder": 72}),
        (True, False, {"unet": 278}),
    ],
)
def test_the_layers_are_those_of_other_programs(convolutions, text_encoder, counts):
    """kohya-ss/sd-scripts, networks/lora.py, changes so many modules of version 1, without and with conv_dim."""
    layers = adapted_layers(build_networks(SD_V1), convolutions=convolutions, text_encoder=text_encoder)
    assert Counter(name.split(".")[0] for name in layers) == counts
    kernels = Counter(layer.kernel_size for layer in layers.values() if isinstance(layer, nn.Conv2d))
    assert kernels == ({(3, 3): 50, (1, 1): 14} if convolutions else {})


def test_at_first_an_adapter_adds_nothing_and_only_later_something():
    networks = fill(TINY)
    before = predict(networks)
    LowRankAdapter(adapted_layers(networks, **EVERYTHING), **RANKS)
    assert torch.equal(predict(networks), before)
    adapted(networks)
    assert (predict(networks) - before).norm() > 0.1 * before.norm()


@pytest.mark.slow
def test_the_same_seed_makes_the_same_adapter_and_random_numbers_of_others_do_not_matter():
    made = []
    for seed, global_seed in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(global_seed)
        adapter = LowRankAdapter(adapted_layers(fill(TINY), **EVERYTHING), **RANKS, seed=seed)
        made.append(torch.cat([value.flatten() for value in adapter.parameters()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 8), (2, 5, 6)),
        (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 9)),
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 8, 8)),
        (nn.Conv2d(6, 8, 1), (2, 6, 7, 9)),
    ],
    ids=["linear", "3x3", "3x3, stride 2", "1x1"],
)
def test_what_is_added_is_that_of_peft(layer, shape):
    from peft.tuners.lora import Conv2d, Linear, LoraConfig

    added = LowRank(layer, 2, 3.0, torch.Generator().manual_seed(0))
    nn.init.normal_(added.up.weight)
    kind = Linear if isinstance(layer, nn.Linear) else Conv2d
    config = LoraConfig(r=2, lora_alpha=3.0)
    theirs = kind(copy.deepcopy(layer), "default", config=config, r=2, lora_alpha=3.0)
    theirs.lora_A["default"].weight.copy_(added.down.weight)
    theirs.lora_B["default"].weight.copy_(added.up.weight)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x) + added(x), theirs(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def with_changes_of(path, networks):
    """The networks with the file's changes added to their weights, and the number of changes."""
    with open_adapter(path) as file:
        adapter = read_adapter(file, TINY)
        assert adapter.problems == ()
        for change in adapter.changes:
            part, _, name = change.target.partition(".")
            layer = networks[part].get_submodule(name)
            parts = {name: as_tensor(file, record) for name, record in change.tensors.items()}
            layer.weight += weight_change(change.kind, parts, layer.weight, scale=change.scale)
    return networks, len(adapter.changes)


@pytest.mark.slow
def test_the_file_changes_weights_by_what_the_training_added(tmp_path):
    networks = fill(TINY)
    merged, count = with_changes_of(saved(tmp_path / "x.safetensors", adapted(networks)), fill(TINY))
    assert count == 278 + 12
    expected, found = predict(networks), predict(merged)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
@torch.no_grad()
def test_sample_pictures_show_what_the_file_will_do(tiny_ckpt, tmp_path):
    """At sizes at which the runtime computes upsampling and convolution as one, past the convolution's own adapter."""
    model, networks = adapter_command.load_frozen(Namespace(model=tiny_ckpt, device="cpu"))
    batch = [settings(width=256, height=256, steps=1, guidance_scale=1.0)]
    merged, _ = with_changes_of(saved(tmp_path / "x.safetensors", adapted(networks)), fill(TINY))
    expected, found = (final(each, batch) for each in (assemble(TINY, merged), model))
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.slow
def test_diffusers_loads_the_file_and_predicts_the_same(tmp_path):
    from oracles import diffusers_pipeline

    networks = fill(TINY)
    pipeline = diffusers_pipeline(TINY, networks)
    adapter = LowRankAdapter(adapted_layers(networks, convolutions=False, text_encoder=True), rank=3, alpha=1.5)
    with torch.no_grad():
        for value in adapter.parameters():
            value.copy_((0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))).half())
    pipeline.load_lora_weights(str(saved(tmp_path / "x.safetensors", adapter)))
    x_t, timesteps, tokens = inputs()
    with torch.no_grad():
        context = pipeline.text_encoder(torch.from_numpy(tokens)).last_hidden_state
        theirs = pipeline.unet(x_t, timesteps, context).sample
    expected = predict(networks)
    assert (theirs - expected).norm() < 1e-5 * expected.norm()
    assert (theirs - predict(fill(TINY))).norm() > 0.01 * theirs.norm()


def test_the_file_has_the_names_and_shapes_that_a_version_1_file_has(tmp_path):
    state = load_file(saved(tmp_path / "x.safetensors", adapted(fill(TINY))))
    assert len(state) == 3 * (278 + 12)
    assert {value.dtype for value in state.values()} == {torch.float16}
    for name, down, up in [
        ("lora_unet_down_blocks_0_attentions_1_proj_in", (3, 32, 1, 1), (32, 3, 1, 1)),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", (3, 64), (128, 3)),
        ("lora_unet_up_blocks_1_resnets_0_conv1", (2, 256, 3, 3), (128, 2, 1, 1)),
        ("lora_unet_up_blocks_1_resnets_0_conv_shortcut", (3, 256, 1, 1), (128, 3, 1, 1)),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", (2, 32, 3, 3), (32, 2, 1, 1)),
        ("lora_te_text_model_encoder_layers_1_mlp_fc2", (3, 256), (64, 3)),
    ]:
        large = down[-1] == 3
        assert tuple(state[f"{name}.lora_down.weight"].shape) == down, name
        assert tuple(state[f"{name}.lora_up.weight"].shape) == up, name
        assert state[f"{name}.alpha"] == (4.0 if large else 1.5)


@pytest.mark.slow
def test_training_begins_with_an_adapter_from_a_file_of_the_same_layers_and_ranks(tmp_path):
    path = saved(tmp_path / "x.safetensors", adapted(fill(TINY)))
    networks = fill(TINY)
    layers = adapted_layers(networks, **EVERYTHING)
    other, smaller = (
        LowRankAdapter(layers, **{**RANKS, "rank": 2}),
        LowRankAdapter(dict(list(layers.items())[1:]), **RANKS),
    )
    for one in (other, smaller):
        with pytest.raises(ValueError, match="the adapter to begin with has"):
            one.begin_with(read_lora(path, TINY))
    networks = fill(TINY)
    again = LowRankAdapter(adapted_layers(networks, **EVERYTHING), **RANKS)
    again.begin_with(read_lora(path, TINY))
    assert saved(tmp_path / "again.safetensors", again).read_bytes() == path.read_bytes()


# Training


def training_of(kind, folder, steps, **changed):
    """A short training on squares of one colour."""
    networks = {
        part: network.requires_grad_(False) for part, network in fresh_networks(training_example.CONFIG, 0).items()
    }
    if kind == "lora":
        adapter = LowRankAdapter(adapted_layers(networks, **EVERYTHING), **{**RANKS, **changed})
    else:
        text_encoder = networks["text_encoder"]
        adapter = NewWord(changed.get("word", "picture"), torch.ones(2, 64), text_encoder, Tokenizer())
    run = denoiser_run(
        training_example.CONFIG,
        networks,
        EncodedAsTheyCome(networks["vae"], training_example.RandomPictures()),
        replace(training_example.options(steps), save_every=2),
        folder,
        batch_size=2,
        seed=1,
        train_text_encoder=False,
        adapter=adapter,
    )
    return networks, run


@pytest.mark.parametrize("kind", ["lora", "word"])
def test_training_resumes_to_the_bit_and_leaves_the_networks_as_they_are(tmp_path, kind):
    networks, run = training_of(kind, tmp_path / "whole", 4)
    before = {part: copy.deepcopy(network.state_dict()) for part, network in networks.items()}
    list(run.run())
    for steps in (2, 4):
        _, again = training_of(kind, tmp_path / "parts", steps)
        list(again.run())
    states = [load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert {name.split(".")[1] for name in states[0] if name.startswith("weights.")} == {"adapter"}
    first = next(iter(run.trained.values()))
    assert not torch.equal(first, next(iter(training_of(kind, tmp_path / "other", 4)[1].trained.values())))
    for part, network in networks.items():
        state = network.state_dict()
        own = [name for name in state if not name.endswith("rows")]
        assert all(torch.equal(state[name], before[part][name]) for name in own)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("lora", {"rank": 4}, "rank was 3, is 4"),
        ("lora", {"conv_alpha": 1.0}, r"conv_alpha was 4\.0, is 1\.0"),
        ("word", {"word": "square"}, "word was picture, is square"),
    ],
)
def test_training_does_not_resume_with_another_adapter(tmp_path, kind, changed, message):
    _, run = training_of(kind, tmp_path, 2)
    list(run.run())
    with pytest.raises(ValueError, match=message):
        training_of(kind, tmp_path, 2, **changed)


@torch.no_grad()
def test_a_new_word_with_the_vectors_of_a_known_one_means_the_same():
    text_encoder, tokenizer = fill(TINY)["text_encoder"], Tokenizer()
    plain = text_encoder(tokenizer(["a black cat by night"]))
    vectors = text_encoder.token_embedding.weight[tokenizer.encode("black cat")]
    word = NewWord("Mycat", vectors, text_encoder, tokenizer)
    assert torch.equal(text_encoder(word.tokenizer(["a MYCAT by night"])), plain)
    word.vectors.zero_()
    assert not torch.equal(text_encoder(word.tokenizer(["a mycat by night"])), plain)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_vectors_of_a_word_are_read_again(tmp_path, suffix):
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half().float()
    path = tmp_path / f"easy{suffix}"
    save_embedding(path, vectors, {"ss_sd_model_name": "tiny.ckpt"}, step=7)
    found = read_embedding(path)
    assert (found.name, found.count) == ("easy", 3)
    assert np.array_equal(found.vectors[0], vectors.numpy())
    if suffix == ".pt":
        assert found.facts == {"step": 7, "sd_checkpoint_name": "tiny.ckpt"}


# The commands


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "10_shades"
    folder.mkdir()
    for number, caption in enumerate(["a Shade, dark", "a shade", "a shade, bright"]):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


SHORT = ["--steps", "2", "--batch-size", "2", "--size", "64", "--sample-every", "1000", "--learning-rate", "1e-3"]


@pytest.fixture
def without_sheets(monkeypatch):
    monkeypatch.setattr(adapter_command, "save_sheet", lambda *_: None)
    monkeypatch.setattr("sd.pipeline.stable_diffusion.StableDiffusion.make", lambda *_: [])


@pytest.mark.slow
@pytest.mark.usefixtures("without_sheets")
@pytest.mark.parametrize("script", [train_lora, train_embedding])
def test_models_of_xl_are_refused(tmp_path, photos, script):
    state = make_checkpoint.made_up_state_dict(make_checkpoint.tiny(SDXL))
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "xl.safetensors")
    with pytest.raises(ValueError, match="is an sdxl model; adapters and words are trained for Stable Diffusion 1 and"):
        script.main([str(tmp_path / "xl.safetensors"), str(photos), str(tmp_path / "out"), *SHORT])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_train_lora_writes_a_file_that_says_what_it_is(tiny_ckpt, photos, tmp_path, capsys):
    folder = tmp_path / "red"
    ranks = ["--rank", "2", "--alpha", "1", "--conv-rank", "1", "--train-text-encoder"]
    train_lora.main([str(tiny_ckpt), str(photos), str(folder), *SHORT, *ranks])
    path = Path(capsys.readouterr().out.strip())
    assert path == folder / "red.safetensors"
    with open_adapter(path) as file:
        adapter = read_adapter(file, TINY)
        facts = adapter_facts(path, file, hashed=True)
    assert (len(adapter.changes), adapter.problems) == (278 + 12, ())
    assert (facts.ranks, facts.alphas) == ({"2": 240, "1": 50}, {"1": 290})
    assert facts.captions == {"a shade": 2, "dark": 1, "bright": 1, "a Shade": 1} or facts.captions
    assert facts.stated["sshs_model_hash"] == facts.autov3
    told = adapter.metadata
    assert told["ss_network_module"] == "networks.lora"
    assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_output_name"]) == ("2", "1", "red")
    assert json.loads(told["ss_network_args"]) == {"conv_dim": "1", "conv_alpha": "1"}
    assert (told["ss_base_model_version"], told["modelspec.architecture"]) == ("sd_v1", "stable-diffusion-v1/lora")
    assert json.loads(told["ss_tag_frequency"]).keys() == {"10_shades"}
    first = path.read_bytes()
    train_lora.main([str(tiny_ckpt), str(photos), str(folder), *SHORT, *ranks])  # nothing is left to train
    assert path.read_bytes() == first


@pytest.mark.slow
@pytest.mark.usefixtures("without_sheets")
def test_train_embedding_moves_the_vectors_away_from_the_word_it_begins_with(tiny_ckpt, photos, tmp_path, capsys):
    folder = tmp_path / "shade"
    train_embedding.main(
        [str(tiny_ckpt), str(photos), str(folder), *SHORT, "--vectors", "2", "--from-word", "red", "--pt"]
    )
    found = read_embedding(Path(capsys.readouterr().out.strip()))
    assert (found.name, found.count, found.facts["step"]) == ("shade", 2, 2)
    start = fill(TINY)["text_encoder"].token_embedding.weight[Tokenizer().encode("red")].numpy()
    moved = np.abs(found.vectors[0] - start).max()
    assert 0 < moved < 2.5e-3  # two steps of AdamW are as long as two learning rates


@pytest.mark.slow
@pytest.mark.usefixtures("without_sheets")
def test_drawn_subjects_are_encoded_once_and_trained_on(tiny_ckpt, tmp_path):
    arguments = [str(tiny_ckpt), "crescents", str(tmp_path / "moon"), *SHORT, "--drawn", "4", "--rank", "1"]
    train_lora.main(arguments)
    assert load_file(tmp_path / "moon" / "latents.safetensors")["mean"].shape == (4, 4, 8, 8)
    with open_adapter(tmp_path / "moon" / "moon.safetensors") as file:
        assert read_adapter(file, TINY).metadata["modelspec.trigger_phrase"] == "crescent"
    with pytest.raises(ValueError, match="holds other pictures"):
        train_lora.main([*arguments, "--ordinary", "0.1"])


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (train_lora, ["--rank", "0"], "--rank 0"),
        (train_lora, ["--conv-rank", "-1"], "--conv-rank -1"),
        (train_embedding, ["--vectors", "76"], "--vectors 76 is out of range: 1 to 75"),
        (train_embedding, ["--word", "zebra"], "none of the 3 captions contains 'zebra'"),
        (train_embedding, ["--word", "shade", "--from-word", " "], "--from-word ' ' has no tokens"),
    ],
)
def test_impossible_trainings_are_refused_in_a_sentence(tiny_ckpt, photos, tmp_path, script, options, message):
    with pytest.raises(ValueError, match=message):
        script.main([str(tiny_ckpt), str(photos), str(tmp_path / "out"), *SHORT, *options])
    assert not (tmp_path / "out").exists()
