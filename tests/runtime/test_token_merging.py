"""Tokens that are merged before self-attention, against plain loops over single tokens."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import TINY, assemble, fill, final, settings
from predictions import guided_inputs, is_patched, relative_error, unet_with_attention_at
from torch.utils.flop_counter import FlopCounterMode

import sd.runtime.shortcuts.token_merging as module
from sd.config import SD_V1
from sd.networks.attention import Attention, SpatialTransformer
from sd.networks.build import build_networks
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.runtime.shortcuts.feature_reuse import ReusedFeatures
from sd.runtime.shortcuts.token_merging import matching, merge, merged_count, merging, partition, tokens_merged, unmerge
from sd.study.explain.recording import explain

ROUNDING = 1e-5  # of float32 sums in another order; without merging, what is compared is off by more than 1e-2
LARGEST = ["input_blocks.1", "input_blocks.2", "output_blocks.9", "output_blocks.10", "output_blocks.11"]  # in v1


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


# ---------- predictions ----------


@pytest.mark.slow
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
    unet, given = tiny_networks["unet"], guided_inputs()
    plain = Execution().predict(unet, *given, predictions=1 + guided, tile=tile)
    with slowly(unet, 0.5, 8, 9):
        expected = Execution().predict(unet, *given, tile=tile)
    execution = Execution(RunOptions(**options), compiler=lambda _: pytest.fail("compiled"))
    found = execution.predict(unet, *given, predictions=1 + guided, tile=tile, merge=0.5)
    assert relative_error(found, expected) < ROUNDING
    assert relative_error(found, plain) > 1e-2
    assert not is_patched(unet)


@pytest.mark.slow
def test_merging_goes_with_features_that_are_reused(tiny_networks):
    unet = tiny_networks["unet"]
    execution, merged, slow_one = Execution(), ReusedFeatures(2), ReusedFeatures(2)
    for number in range(3):
        given = guided_inputs(number)
        found = execution.predict(unet, *given, predictions=2, reused=merged, merge=0.5)
        with slowly(unet, 0.5, 8, 9):
            expected = execution.predict(unet, *given, reused=slow_one)
        assert relative_error(found, expected) < ROUNDING, number


def test_networks_without_attention_at_full_size_merge_at_the_largest_that_has_some():
    unet, counts = unet_with_attention_at(0, 2, 1, 0), []
    for layer in unet.modules():
        if isinstance(layer, Attention):
            layer.q.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1]))
    Execution().predict(unet, *guided_inputs(height=11, width=8), merge=0.5)
    assert len(counts) == 2 * (5 * 2 + 5 * 1 + 1)
    expected = 5 * 2 * [12, 24]  # of 6x4, halved from 11x8 and rounded up; at cross-attention all of them
    assert [count for count in counts if count > 6] == expected


# ---------- operations ----------


@pytest.mark.slow
def test_operations_that_are_left_are_those_that_docs_tell():
    """Of a prediction of the full-size network at 512x512, by PyTorch's own counter and by hand."""
    unet = build_networks(SD_V1)["unet"]
    x_t, timestep, context = (values.to("meta") for values in guided_inputs(height=64, width=64, context_width=768))
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


@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 72)])
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
    batch = [settings(seed=seed, prompt=f"a {seed}", merge_tokens=0.5, steps=2) for seed in range(6)]
    together = final(model, batch)
    assert torch.equal(final(model, batch), together)
    alone = (final(model, [own])[0] for own in batch)
    *errors, largest = sorted(relative_error(*pair) for pair in zip(together, alone, strict=True))
    assert max(errors) < 1e-4
    assert largest < 0.05


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
