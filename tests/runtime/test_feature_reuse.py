"""Inner blocks that run at every N-th prediction only, against predictions with the blocks called one by one."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, assemble, fill, final, settings
from predictions import guided_inputs, is_patched, relative_error, unet_with_attention_at
from torch.utils.flop_counter import FlopCounterMode

from sd.app.jobs.plan import group
from sd.config import SD_V1
from sd.networks.build import build_networks
from sd.networks.unet import timestep_embedding
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.runtime.seamless import seamless
from sd.runtime.shortcuts.feature_reuse import OUTER, ReusedFeatures
from sd.sampling.init_image import InitImage
from sd.study.architecture.calls import Watcher

ROUNDING = 1e-5  # of float32 sums in another order; features of another prediction are off by more than 1e-3
OFTEN = 1000  # more predictions than any run here has


def by_hand(unet, x_t, timestep, context, features=None, outer=OUTER):
    """The prediction, with the blocks called one by one, and what the inner ones give; or with features given."""
    time = unet.time_embed(timestep_embedding(timestep, unet.width).to(x_t.dtype))
    made = [unet.input_blocks[0](x_t, time, context)]
    for i in range(1, outer):
        made.append(unet.input_blocks[i](made[-1], time, context))
    first_outer = len(unet.output_blocks) - outer
    if features is None:
        x, skips = made[-1], []
        for i in range(outer, len(unet.input_blocks)):
            x = unet.input_blocks[i](x, time, context)
            skips.append(x)
        x = unet.middle_block(x, time, context)
        for i in range(first_outer):
            beside = skips[-2 - i] if i + 2 <= len(skips) else made[-1]
            x = unet.output_blocks[i](torch.cat([x, skips[-1 - i]], dim=1), time, context, size=beside.shape[-2:])
        features = x
    x = features
    for i in range(outer):
        size = made[-2 - i].shape[-2:] if i + 2 <= len(made) else None
        x = unet.output_blocks[first_outer + i](torch.cat([x, made[-1 - i]], dim=1), time, context, size=size)
    return unet.out(x), features


@pytest.fixture
def seen(model):
    """Of every call of the UNet: how many rows it was for, and whether its inner blocks ran."""
    calls = []

    def whole(*_):
        calls[-1] = calls[-1][0], True

    handles = [
        model.unet.register_forward_pre_hook(lambda _, given: calls.append((len(given[0]), False))),
        model.unet.middle_block["residual1"].register_forward_pre_hook(whole),
    ]
    yield calls
    for handle in handles:
        handle.remove()


# ---------- predictions ----------


def test_with_its_own_features_the_prediction_by_hand_is_the_networks(tiny_networks):
    """So that what follows is compared with something right."""
    for outer in (1, 2, 3, 4, 7, 11):
        predicted, _ = by_hand(tiny_networks["unet"], *guided_inputs(0), outer=outer)
        assert relative_error(predicted, tiny_networks["unet"](*guided_inputs(0))) < ROUNDING


@pytest.mark.parametrize("outer", [1, 3, 4])
def test_every_third_prediction_is_whole_and_the_others_take_its_features(tiny_networks, outer):
    unet, reused = tiny_networks["unet"], ReusedFeatures(3, outer)
    for number in range(7):
        x_t, timestep, context = guided_inputs(number)
        reused.begin(x_t, context)
        with reused.applied(unet):
            found = unet(x_t, timestep, context)
        if number % 3 == 0:
            expected, features = by_hand(unet, x_t, timestep, context, outer=outer)
        else:
            expected, _ = by_hand(unet, x_t, timestep, context, features, outer)
            assert relative_error(expected, unet(x_t, timestep, context)) > 1e-3
        assert relative_error(found, expected) < ROUNDING, number
    assert not is_patched(unet)


def test_an_independent_network_with_the_same_features_predicts_the_same(tiny_networks):
    """diffusers' runs whole; of what its last residual block is given, the first part is that of the step before."""
    from oracles import diffusers_unet

    unet, theirs = tiny_networks["unet"], diffusers_unet(TINY, tiny_networks)
    kept = []

    def put_in(_, given):
        joined, *others = given
        kept.append(joined[:, : -TINY.unet.width])  # what comes from input_blocks.0 stands last
        return torch.cat([kept[0], joined[:, -TINY.unet.width :]], dim=1), *others

    theirs.up_blocks[-1].resnets[-1].register_forward_pre_hook(put_in)
    reused = ReusedFeatures(2)
    for number in range(2):
        x_t, timestep, context = guided_inputs(number, height=8, width=16)
        reused.begin(x_t, context)
        with reused.applied(unet):
            found = unet(x_t, timestep, context)
        assert relative_error(found, theirs(x_t, timestep, context).sample) < ROUNDING
    assert relative_error(kept[1], kept[0]) > 1e-3


@pytest.mark.parametrize("tile", ["", "x"])
@pytest.mark.parametrize(("low_memory", "guided"), [(False, True), (True, True), (False, False)])
def test_it_goes_with_shared_halves_packed_convolutions_low_memory_and_seamless_pictures(
    tiny_networks, low_memory, guided, tile
):
    unet, execution = tiny_networks["unet"], Execution(RunOptions(low_memory=low_memory))
    reused, features = ReusedFeatures(2), None
    for number in range(3):
        given = guided_inputs(number, rows=4)
        found = execution.predict(unet, *given, predictions=1 + guided, tile=tile, reused=reused)
        with seamless(unet, tile):
            expected, features = by_hand(unet, *given, features if number == 1 else None)
        assert relative_error(found, expected) < ROUNDING, number


def test_where_attention_begins_in_the_inner_blocks_halves_are_shared_up_to_there():
    unet, reused = unet_with_attention_at(0, 2, 1, 0), ReusedFeatures(2)
    _, features = by_hand(unet, *guided_inputs(0))
    for number in range(2):
        found = Execution().predict(unet, *guided_inputs(number), predictions=2, reused=reused)
    assert relative_error(found, by_hand(unet, *guided_inputs(1), features)[0]) < ROUNDING


@pytest.mark.parametrize("change", [{"rows": 4}, {"width": 8}])
def test_after_another_number_of_rows_or_size_nothing_is_taken_over(tiny_networks, change):
    """Neither by the prediction that differs, nor by the next one that does not."""
    unet, execution, reused = tiny_networks["unet"], Execution(), ReusedFeatures(OFTEN)
    for number, options in enumerate(({}, change, {})):
        found = execution.predict(unet, *guided_inputs(number, **options), reused=reused)
        assert torch.equal(found, execution.predict(unet, *guided_inputs(number, **options)))


def test_a_prediction_that_failed_leaves_nothing_behind(tiny_networks):
    unet, reused = tiny_networks["unet"], ReusedFeatures(2)

    def fail(*_):
        raise KeyError

    handle = unet.output_blocks[5].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        Execution().predict(unet, *guided_inputs(0), reused=reused)
    handle.remove()
    assert not is_patched(unet)
    found = Execution().predict(unet, *guided_inputs(1), reused=reused)
    assert relative_error(found, unet(*guided_inputs(1))) < ROUNDING


# ---------- operations ----------


@pytest.mark.slow
def test_operations_that_are_left_are_those_that_docs_tell():
    """Of a prediction of the full-size network at 512x512; PyTorch's own counter sees the blocks called by hand."""
    unet = build_networks(SD_V1)["unet"]
    given = [values.to("meta") for values in guided_inputs(0, height=64, width=64, context_width=768)]
    features = torch.empty(2, 640, 64, 64, device="meta")
    whole = 2 * 803_273_441_280  # tests/study/test_architecture.py
    for outer, share in ((1, 7.9), (2, 22.4), (3, 38.0)):
        reused = ReusedFeatures(2, outer)
        for _ in range(2):
            reused.begin(given[0], given[2])
            with Watcher({"unet": unet}) as watcher, reused.applied(unet):
                unet(*given)
        left = sum(call.operations for call in watcher.calls.values())
        with FlopCounterMode(display=False) as counter:
            by_hand(unet, *given, features if outer == 3 else features[:, :320], outer)
        assert left == counter.get_total_flops()
        assert round(100 * left / whole, 1) == share
    assert OUTER == 1


# ---------- pictures ----------


@pytest.mark.parametrize(("sampler", "predictions"), [("dpmpp_2m", 4), ("heun", 7)])
@pytest.mark.parametrize("every", [1, 2, 3, OFTEN])
def test_the_first_of_every_n_predictions_is_whole(model, seen, sampler, predictions, every):
    final(model, [settings(sampler=sampler, reuse_features=every)])
    assert len(seen) == predictions
    assert [whole for _, whole in seen] == [number % every == 0 for number in range(len(seen))]


def test_with_more_predictions_than_steps_the_first_one_leads_the_way_alone(model):
    """A DDIM run by hand: guidance, and the step from one noise level to the next, as the papers have them."""
    from sd.pipeline.latent_diffusion import table_and_steps

    asked = settings(reuse_features=OFTEN, guidance_scale=3.0)
    context = torch.cat([model.encode_prompts([text]) for text in ("", asked.prompt)])
    x, features = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(asked.seed)), None
    for step in table_and_steps(TINY.schedule, asked)[1]:
        predicted, features = by_hand(model.unet, torch.cat([x, x]), step.timestep, context, features)
        negative, positive = predicted.chunk(2)
        eps = negative + 3 * (positive - negative)
        x_0 = (x - (1 - step.alpha_bar).sqrt() * eps) / step.alpha_bar.sqrt()
        x = step.alpha_bar_prev.sqrt() * x_0 + (1 - step.alpha_bar_prev).sqrt() * eps
    found = final(model, [asked])
    assert relative_error(found, x.float()) < 1e-4
    assert relative_error(found, final(model, [replace(asked, reuse_features=1)])) > 1e-3


def test_at_the_ends_of_the_guidance_interval_the_whole_network_runs(model, seen):
    final(model, [settings(sampler="euler", steps=6, guidance_interval=(0.5, 5), reuse_features=OFTEN)])
    rows = [count for count, _ in seen]
    assert set(rows) == {1, 2}
    assert [whole for _, whole in seen] == [i == 0 or rows[i] != rows[i - 1] for i in range(6)]


def test_where_the_words_change_the_whole_network_runs(model, seen):
    final(model, [settings(prompt="a [cat:red dog:2]", reuse_features=OFTEN)])
    assert [whole for _, whole in seen] == [True, False, True, False]
    changing = settings(prompt="a [cat|dog]", reuse_features=OFTEN)  # at every step: nothing is ever taken over
    assert torch.equal(final(model, [changing]), final(model, [replace(changing, reuse_features=1)]))


def test_a_picture_is_the_same_alone_and_in_a_batch(model):
    batch = [settings(seed=seed, prompt=f"a {seed}", reuse_features=3) for seed in (1, 2, 3)]
    together = final(model, batch)
    for own, latents in zip(batch, together, strict=True):
        assert relative_error(latents, final(model, [own])[0]) < 1e-4


def test_pictures_whose_words_change_at_other_steps_do_not_go_together(model):
    """The whole network would otherwise run for one picture because of the words of another."""
    texts = ["a [b:c:2]", "a [b:c:2] d", "a [b:c:0.5]", "a [b:c:1]", "a"]
    batch = [settings(prompt=text, reuse_features=2) for text in texts]
    assert [len(found) for found in group(batch, 8, lambda _: None)] == [3, 1, 1]
    assert len(list(group([replace(job, reuse_features=1) for job in batch], 8, lambda _: None))) == 1
    second = [settings(prompt=text, reuse_features=2, hires=2, hires_steps=6)  # 4 steps, then 6
              for text in ("a [b:c:6]", "a [b:c:1.5]", "a [b:c:7]", "a [b:c:4]", "a")]  # fmt: skip
    assert [len(found) for found in group(second, 8, lambda _: None)] == [1, 2, 2]
    with pytest.raises(ValueError, match="their words must change at the same steps"):
        final(model, batch)


def test_runs_side_by_side_take_nothing_from_each_other(model):
    asked = [
        [settings(reuse_features=2)],
        [settings(seed=2, prompt="a cat", reuse_features=3)],
        [settings(seed=seed, reuse_features=OFTEN) for seed in (3, 4)],
        [settings(width=72, reuse_features=2)],
        [settings()],
    ]
    alone = [final(model, batch) for batch in asked]
    runs = [model.sample(batch) for batch in asked]
    for _ in range(settings().steps):
        together = [next(run) for run in runs]
    for found, expected in zip(together, alone, strict=True):
        assert torch.equal(found, expected)


def test_a_run_that_was_left_in_the_middle_changes_nothing_for_the_next(model):
    asked = [settings(reuse_features=3)]
    expected = final(model, asked)
    run = model.sample(asked)
    next(run), next(run)
    run.close()
    assert torch.equal(final(model, asked), expected)
    assert not is_patched(model.unet)


def test_each_pass_and_a_run_from_an_init_image_begin_with_the_whole_network(model, seen):
    model.make([settings(hires=1.5, hires_steps=3, reuse_features=OFTEN)])
    assert [whole for _, whole in seen] == [True, False, False, False, True, False, False]
    seen.clear()
    asked = settings(strength=0.75, reuse_features=2)
    final_latents = [*model.sample([asked], InitImage(latents=torch.zeros(1, 4, 8, 8)))][-1]
    assert [whole for _, whole in seen] == [True, False, True]
    assert final_latents.isfinite().all()


@pytest.mark.slow
def test_a_run_that_is_done_again_in_float32_takes_nothing_from_the_one_that_failed():
    half = assemble(TINY, fill(TINY, dtype=torch.float16))
    weight = half.unet.time_embed.linear2.weight
    weight.mul_(60_000 / weight.abs().max().item())  # overflows in fp16 only
    asked = [settings(steps=3, reuse_features=2)]
    messages = []
    (made,) = half.make(asked, on_retry=messages.append)
    assert "the UNet gave NaN or infinite values in fp16" in messages[0]
    assert made.tobytes() == half.make(asked)[0].tobytes()
