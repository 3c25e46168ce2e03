"""Tokens that are merged before self-attention, against plain loops over single tokens."""

import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, assemble, fill, final, refused, settings, settings_of
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import sd.runtime.shortcuts.token_merging as module
from sd.config import SD_V1, SD_V1_INPAINTING
from sd.networks.attention import Attention, SpatialTransformer
from sd.networks.build import build_networks
from sd.pipeline.image.tensors import to_tensor
from sd.pipeline.settings import Settings
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.runtime.shortcuts.feature_reuse import ReusedFeatures
from sd.runtime.shortcuts.token_merging import matching, merge, merged_count, merging, partition, tokens_merged, unmerge
from sd.sampling.init_image import InitImage
from sd.study.explain.recording import explain

ROUNDING = 1e-5  # of float32 sums in another order; without merging, what is compared is off by more than 1e-2
LARGEST = ["input_blocks.1", "input_blocks.2", "output_blocks.9", "output_blocks.10", "output_blocks.11"]  # in v1


def relative_error(found, expected):
    return (found - expected).norm() / expected.norm()


def inputs(rows=2, height=8, width=9, context_width=TINY.unet.context_width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(rows, 77, context_width, generator=generator)
    x_t = torch.randn(rows // 2, 4, height, width, generator=generator)
    return torch.cat([x_t, x_t]), torch.tensor(500.0), context


def slow(attention, x, height, width, share):
    """Merged self-attention of one row (T, D), token by token, with NumPy and float64."""
    x = x.double().numpy()
    places = [(i, j) for i in range(height) for j in range(width)]
    destinations = [t for t, (i, j) in enumerate(places) if i % 2 == 0 and j % 2 == 0]
    sources = [t for t in range(len(places)) if t not in destinations]
    found = {}
    for source in sources:
        cosines = [
            x[source] @ x[each] / math.sqrt((x[source] @ x[source]) * (x[each] @ x[each])) for each in destinations
        ]
        found[source] = max(cosines), destinations[cosines.index(max(cosines))]
    count = min(round(share * len(places)), len(sources))
    leaving = sorted(sources, key=lambda source: -found[source][0])[:count]
    groups = [[each, *(source for source in leaving if found[source][1] == each)] for each in destinations]
    groups += [[source] for source in sources if source not in leaving]
    means = [sum(x[t] for t in group) / len(group) for group in groups]
    wq, wk, wv, wo = (getattr(attention, name).weight.double().numpy() for name in ("q", "k", "v", "out"))
    size = len(wq) // attention.heads
    result = np.empty_like(x)
    for group, mean in zip(groups, means, strict=True):
        heads = []
        for head in range(attention.heads):
            own = slice(head * size, (head + 1) * size)
            scores = np.exp([(wq[own] @ mean) @ (wk[own] @ other) / math.sqrt(size) for other in means])
            heads.append(sum(score * (wv[own] @ other) for score, other in zip(scores, means, strict=True)))
            heads[-1] /= scores.sum()
        for t in group:
            result[t] = wo @ np.concatenate(heads) + attention.out.bias.double().numpy()
    return torch.from_numpy(result).float()


@contextmanager
def slowly(unet, share, height, width):
    """The blocks of v1 that have the most tokens, by name, with merged attention token by token in place of theirs."""

    def hook(attention, given, _):
        return torch.stack([slow(attention, row, height, width, share) for row in given[0]])

    attentions = [block.self_attention for name in LARGEST for block in unet.get_submodule(name)["attention"].blocks]
    handles = [attention.register_forward_hook(hook) for attention in attentions]
    yield
    for handle in handles:
        handle.remove()


@pytest.fixture
def seen(model):
    """For each self-attention, by its block: how many tokens the queries were made of, at each call."""
    counts, handles = {}, []
    for name, layer in model.unet.named_modules():
        if isinstance(layer, SpatialTransformer):
            calls = counts.setdefault(name.removesuffix(".attention"), [])
            query = layer.blocks[0].self_attention.q
            handles.append(query.register_forward_pre_hook(lambda _, given, calls=calls: calls.append(given[0].shape)))
    yield counts
    for handle in handles:
        handle.remove()


# ---------- tokens ----------


def test_destinations_are_the_upper_left_places_of_cells():
    sources, destinations = partition(3, 5)
    assert destinations.tolist() == [0, 2, 4, 10, 12, 14]
    assert sources.tolist() == [1, 3, 5, 6, 7, 8, 9, 11, 13]
    assert [part.tolist() for part in partition(1, 1)] == [[], [0]]


def test_a_share_of_all_tokens_is_merged_at_most_all_sources():
    assert merged_count(0.5, 64, 64) == 2048
    assert merged_count(0.75, 64, 64) == 3072
    assert merged_count(0.75, 65, 64) == 65 * 64 - 33 * 32
    assert merged_count(0.01, 8, 8) == 1
    assert merged_count(0.005, 8, 8) == merged_count(0.75, 1, 1) == 0


def test_merging_and_giving_back_by_hand():
    """A grid of 2x4; places 0 and 2 are destinations, and of the others 5, 3 and 4 are most like one, in this order."""
    x = torch.tensor([[[1, 0], [1, 1], [0, 2], [1, 8], [8, 2], [0, 4], [-1, -1], [4, 5]]]).float()
    groups = matching(x, *partition(2, 4), merged=3)
    assert groups.tolist() == [[0, 2, 1, 1, 0, 1, 3, 4]]
    merged = merge(x, groups, 5)
    means = [[(1 + 8) / 2, (0 + 2) / 2], [(0 + 1 + 0) / 3, (2 + 8 + 4) / 3], [1, 1], [-1, -1], [4, 5]]
    assert torch.allclose(merged, torch.tensor([means]))
    back = unmerge(merged, groups)
    assert torch.equal(back[0], merged[0, [0, 2, 1, 1, 0, 1, 3, 4]])


def test_of_equally_similar_tokens_the_first_go():
    groups = matching(torch.ones(2, 8, 3), *partition(2, 4), merged=3)
    assert groups.tolist() == 2 * [[0, 0, 1, 0, 0, 2, 3, 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_matched_in_float32(dtype):
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    groups = matching(x, *partition(8, 8), merged=32)
    assert torch.equal(groups, matching(x.float(), *partition(8, 8), merged=32))
    merged = merge(x, groups, 32)
    assert merged.dtype == dtype
    assert relative_error(merged.float(), merge(x.float(), groups, 32)) < 2 * torch.finfo(dtype).eps


def test_matching_in_parts_is_the_same(monkeypatch):
    x = torch.randn(2, 63, 16, generator=torch.Generator().manual_seed(1))
    whole = matching(x, *partition(7, 9), merged=30)
    for room in (1, 45, 100):
        monkeypatch.setattr(module, "ROOM", room)
        assert torch.equal(matching(x, *partition(7, 9), merged=30), whole)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 4), (5, 7), (1, 9)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_attention_is_that_of_plain_loops(height, width, share):
    attention = Attention(24, 24, 3, bias=False)
    x = torch.randn(3, height * width, 24, generator=torch.Generator().manual_seed(height))
    found = merging(attention, *partition(height, width), merged_count(share, height, width))(x)
    for own, row in zip(found, x, strict=True):
        assert relative_error(own, slow(attention, row, height, width, share)) < ROUNDING
    if share > 0.1:
        assert relative_error(found, attention(x)) > 1e-2


def test_merging_of_equal_tokens_changes_nothing():
    """All of a cell are equal, so each keeps its weight beside the others."""
    attention = Attention(24, 24, 3, bias=False)
    cells = torch.randn(2, 4, 5, 24, generator=torch.Generator().manual_seed(1))
    x = cells.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)
    found = merging(attention, *partition(8, 10), merged_count(0.75, 8, 10))(x)
    assert relative_error(found, attention(x)) < ROUNDING


# ---------- predictions ----------


@pytest.mark.parametrize(
    ("options", "guided", "tile"),
    [
        ({}, False, ""),
        ({}, True, ""),
        ({"low_memory": True}, True, ""),
        ({}, True, "xy"),
        ({"compile": True}, True, ""),
    ],
)
def test_predictions_are_those_with_plain_loops_in_the_largest_blocks(tiny_networks, options, guided, tile):
    """Also where halves are shared, weights are packed, one half comes after the other, or a compiler is there."""
    unet, given = tiny_networks["unet"], inputs()
    plain = Execution().predict(unet, *given, guided=guided, tile=tile)
    with slowly(unet, 0.5, 8, 9):
        expected = Execution().predict(unet, *given, tile=tile)
    execution = Execution(RunOptions(**options), compiler=lambda _: pytest.fail("compiled"))
    found = execution.predict(unet, *given, guided=guided, tile=tile, merge=0.5)
    assert relative_error(found, expected) < ROUNDING
    assert relative_error(found, plain) > 1e-2
    assert not any("forward" in vars(module) for module in unet.modules())


def test_merging_goes_with_features_that_are_reused(tiny_networks):
    unet = tiny_networks["unet"]
    execution, merged, slow_one = Execution(), ReusedFeatures(2), ReusedFeatures(2)
    for seed in range(3):
        found = execution.predict(unet, *inputs(seed=seed), guided=True, reused=merged, merge=0.5)
        with slowly(unet, 0.5, 8, 9):
            expected = execution.predict(unet, *inputs(seed=seed), reused=slow_one)
        assert relative_error(found, expected) < ROUNDING, seed


def test_networks_without_attention_at_full_size_merge_at_the_largest_that_has_some():
    config = replace(TINY, unet=replace(TINY.unet, depths=(0, 2, 1, 0)))
    unet = build_networks(config)["unet"].to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for weight in unet.parameters():
        weight.normal_(0, 0.05, generator=generator)
    counts = []
    for layer in unet.modules():
        if isinstance(layer, Attention):
            layer.q.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1]))
    Execution().predict(unet, *inputs(height=11, width=8), merge=0.5)
    assert len(counts) == 2 * (5 * 2 + 5 * 1 + 1)
    expected = 5 * 2 * [12, 24]  # of 6x4, halved from 11x8 and rounded up; at cross-attention all of them
    assert [count for count in counts if count > 6] == expected


def test_with_share_0_the_prediction_is_the_same_to_the_bit(tiny_networks):
    unet = tiny_networks["unet"]
    expected = Execution().predict(unet, *inputs(), guided=True)
    assert torch.equal(Execution().predict(unet, *inputs(), guided=True, merge=0.0), expected)
    with tokens_merged(unet, 0.0, inputs()[0]):
        assert torch.equal(unet(*inputs()), unet(*inputs()))
        assert not any("forward" in vars(module) for module in unet.modules())


def test_a_prediction_that_failed_leaves_nothing_behind(tiny_networks):
    unet = tiny_networks["unet"]

    def fail(*_):
        raise KeyError

    handle = unet.output_blocks[10].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        Execution().predict(unet, *inputs(), merge=0.5)
    handle.remove()
    assert not any("forward" in vars(module) for module in unet.modules())


# ---------- operations ----------


def test_operations_that_are_left_are_those_that_docs_tell():
    """Of a prediction of the full-size network at 512x512, by PyTorch's own counter and by hand."""
    unet = build_networks(SD_V1)["unet"]
    x_t, timestep, context = (values.to("meta") for values in inputs(height=64, width=64, context_width=768))
    whole = 803_273_441_280  # tests/study/test_architecture.py
    tokens, sources, destinations, width = 4096, 3072, 1024, 320
    for share, saved in ((0.25, 5.1), (0.5, 9.8), (0.75, 12.8)):
        with FlopCounterMode(display=False) as counter, tokens_merged(unet, share, x_t):
            unet(x_t[:1], timestep, context[:1])
        left = round((1 - share) * tokens)
        attention = 4 * (tokens**2 - left**2) * width + 8 * (tokens - left) * width**2
        matched = 2 * sources * destinations * width
        assert counter.get_total_flops() == whole - len(LARGEST) * (attention - matched)
        assert round(100 * (1 - counter.get_total_flops() / whole), 1) == saved


# ---------- pictures ----------


@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 64), (520, 512)])
def test_attention_of_the_largest_blocks_sees_half_of_the_tokens(model, seen, width, height):
    final(model, [settings(width=width, height=height, steps=1, merge_tokens=0.5)])
    tokens, *smaller = (math.ceil(width / scale) * math.ceil(height / scale) for scale in (8, 16, 32, 64))
    assert [name for name, calls in seen.items() if calls[0][1] == tokens - round(0.5 * tokens)] == LARGEST
    assert {calls[0][1] for name, calls in seen.items() if name not in LARGEST} == set(smaller)
    assert {name: calls[0][0] for name, calls in seen.items()} == {name: 1 + (name != LARGEST[0]) for name in seen}


def test_a_picture_with_share_0_is_the_same_to_the_bit(model):
    expected = final(model, [settings()])
    assert torch.equal(final(model, [settings(merge_tokens=0)]), expected)
    assert relative_error(final(model, [settings(merge_tokens=0.5)]), expected) > 1e-3


def test_a_picture_is_the_same_alone_and_in_a_batch_and_again(model):
    """Up to rounding, which decides where two pairs are alike to the last digits: one picture of six at most."""
    batch = [settings(seed=seed, prompt=f"a {seed}", merge_tokens=0.5) for seed in (1, 2, 3, 4, 5, 6)]
    together = final(model, batch)
    assert torch.equal(final(model, batch), together)
    alone = (final(model, [own])[0] for own in batch)
    *errors, largest = sorted(relative_error(*pair).item() for pair in zip(together, alone, strict=True))
    assert max(errors) < 1e-4
    assert largest < 0.05


def test_pictures_with_other_shares_do_not_go_together():
    assert settings(merge_tokens=0.5).goes_with(settings(seed=2, merge_tokens=0.5))
    assert not settings(merge_tokens=0.5).goes_with(settings(merge_tokens=0.25))


def test_each_of_two_passes_merges(model, seen):
    model.make([settings(hires=1.5, hires_steps=1, steps=1, merge_tokens=0.5)])
    assert [shape[1] for shape in seen[LARGEST[0]]] == [32, 72]


@pytest.mark.parametrize("masked", [False, True])
def test_pictures_from_pictures_can_be_made(model, seen, masked):
    image = to_tensor(Image.effect_noise((64, 64), 60).convert("RGB"))
    mask, latent_mask = torch.ones(1, 1, 64, 64), torch.ones(1, 1, 8, 8)
    start = InitImage(image=image, mask=mask, latent_mask=latent_mask) if masked else InitImage(image=image)
    *_, latents = model.sample([settings(strength=0.5, merge_tokens=0.5)], start)
    assert [shape[1] for shape in seen[LARGEST[0]]] == [32, 32]
    assert latents.isfinite().all()


def test_inpainting_networks_merge_too():
    config = replace(SD_V1_INPAINTING, text_encoder=TINY.text_encoder, vae=TINY.vae)
    config = replace(config, unet=replace(SD_V1_INPAINTING.unet, width=32, context_width=64))
    model = assemble(config, fill(config))
    image, mask = torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    start = InitImage(image=image, mask=mask, latent_mask=torch.ones(1, 1, 8, 8))
    *_, merged = model.sample([settings(steps=2, merge_tokens=0.5)], start)
    *_, plain = model.sample([settings(steps=2)], start)
    assert merged.isfinite().all()
    assert relative_error(merged, plain) > 1e-3


def test_the_explained_run_is_the_same_to_the_bit_and_its_maps_show_all_places(model):
    asked = settings(steps=2, merge_tokens=0.5)
    run = explain(model, asked)
    assert run.picture.tobytes() == model.make([asked])[0].tobytes()
    largest = run.steps[1].heats[0]
    assert (largest.height, largest.width, largest.layers) == (8, 8, 5)


def test_a_picture_does_not_note_a_compiler_that_was_not_asked():
    model = assemble(TINY, fill(TINY))
    model.runner = Execution(RunOptions(compile=True), compiler=lambda _: pytest.fail("compiled"))
    final(model, [settings(steps=1, merge_tokens=0.5)])
    assert '"run"' not in model.texts(settings(merge_tokens=0.5))["sd"]
    assert '"run"' in model.texts(settings())["sd"]


# ---------- commands ----------


@pytest.mark.parametrize("share", ["-0.1", "0.76", "1", "nan", "inf"])
def test_shares_out_of_range_are_refused(run, tiny_ckpt, share):
    code_out_err = run("txt2img", "a", "-m", tiny_ckpt, f"--merge-tokens={share}")
    sentence = f"--merge-tokens {float(share)} is out of range: 0 (off: attention sees all tokens) to 0.75 ("
    assert len(refused(code_out_err, sentence).splitlines()) == 1


def test_what_is_no_number_is_refused(run, tiny_ckpt, tmp_path):
    refused(run("txt2img", "a", "-m", tiny_ckpt, "--merge-tokens", "half"), "--merge-tokens", "half")
    (tmp_path / "lines.txt").write_text('{"prompt": "a", "merge-tokens": true}')
    refused(run("txt2img", "--from-file", "lines.txt", "-m", tiny_ckpt), "merge-tokens cannot be true")


def test_the_share_is_stored_read_back_and_may_stand_in_a_line(run, tiny_ckpt, tmp_path):
    common = ["-m", tiny_ckpt, "-W", 64, "-H", 64, "--steps", 2, "--seed", 5]
    _, (first,), _ = run("txt2img", "a cat", *common, "--merge-tokens", 0.5)
    assert settings_of(first)["merge_tokens"] == 0.5
    assert ", Token merging ratio: 0.5, " in Image.open(first).text["parameters"]
    _, (again,), err = run("txt2img", "--like", first, "-m", tiny_ckpt)
    assert "could not use" not in err
    assert Image.open(again).tobytes() == Image.open(first).tobytes()
    lines = ['{"prompt": "a cat", "seed": 6, "merge-tokens": 0.25}', '{"prompt": "a cat", "seed": 6}']
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    _, (with_it, without), _ = run("txt2img", "--from-file", "lines.txt", *common)
    assert [settings_of(path)["merge_tokens"] for path in (with_it, without)] == [0.25, 0]
    assert Image.open(with_it).tobytes() != Image.open(without).tobytes()
    assert "Token" not in Image.open(without).text["parameters"]


def test_pictures_without_the_share_were_made_without_it():
    stored = settings().to_dict()
    del stored["merge_tokens"]
    assert Settings(**stored) == settings()
