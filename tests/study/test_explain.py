"""The record of a run: it changes nothing, and it says what happened."""

import base64
import io
import json
from dataclasses import replace

import make_checkpoint
import numpy as np
import pytest
import torch
from browser import data_of
from conftest import TINY, assemble, fill
from PIL import Image

from sd.config import SD_V1_DEPTH, SD_V1_EDIT
from sd.networks.attention import Attention, SpatialTransformer
from sd.pipeline.settings import Settings
from sd.sampling.denoiser import Denoiser
from sd.sampling.init_image import InitImage
from sd.study.explain.attention import ROOM, AttentionWatch, attention_weights, map_side
from sd.study.explain.page import page
from sd.study.explain.recording import explain
from sd.study.explain.report import LARGE, LARGEST_PNG, SMALL, Comparison, data_uri, preview_count, report, shares
from sd.study.explain.text import token_strip
from sd.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
NOUNS = {  # prompts as people type them, and the word that is chosen first
    "a red circle to the left of a white star on a blue background": "circle",
    "a photograph of an astronaut riding a horse": "astronaut",
    "an astronaut riding a horse on mars": "astronaut",
    "an oil painting of a castle": "castle",
    "a beautiful oil painting": "painting",
    "cat, red": "cat",
    "make it snow": "snow",
    "turn the sky purple": "sky",
    "change his hair to blonde": "hair",
    "add a hat to the man": "hat",
    "what would it look like in winter": "winter",
    "replace the dog with a cat": "dog",
    "masterpiece, best quality, 1girl, solo, long hair": "girl",
    "cinematic photo of a cat, 35mm, bokeh": "cat",
    "portrait of a woman with red hair, highly detailed, artstation": "woman",
    "beautiful sunset over the ocean": "sunset",
    "highly detailed digital painting of a dragon": "dragon",
    "two dogs playing in the snow": "dogs",
    "a cute corgi wearing sunglasses": "corgi",
    "a red swimming pool": "pool",
    "a stone building on a hill": "building",
    "a man sits on a bench": "man",
    "cyberpunk city at night, neon lights": "city",
    "emma watson as hermione": "watson",
    "the eiffel tower made of cheese": "tower",
    "a bowl of fruit on a table": "bowl",
    "a cat and a dog": "cat",
    "close-up of an eye": "eye",
    "8k, ultra detailed, a knight in shining armor": "knight",
    "a sci-fi city": "city",
    "a t-shirt with a logo": "shirt",
    "a cat - digital art": "cat",
    "concept art, a floating castle in the clouds": "castle",
    "a red and blue striped ball": "ball",
    "three red apples on a plate": "apples",
    "a very old man": "man",
    "an extremely tall tower": "tower",
    "golden retriever puppy": "puppy",
    "an orange on a table": "orange",
    "a pencil on a desk": "pencil",
    "a house surrounded by trees": "house",
    "a fox jumping over a fence": "fox",
    "pixel art of a spaceship": "spaceship",
    "isometric render of a tiny living room": "room",
    "a lighthouse at dusk": "lighthouse",
    "a marble statue": "statue",
    "a large green heart on a white background": "heart",
    "a yellow star on a purple background": "star",
    "a butterfly on a flower": "butterfly",
    "the king of spain": "king",
    "low poly fox": "fox",
    "photorealistic image of a wooden chair": "chair",
    "studio photo of a burger, professional lighting": "burger",
    "a woman sitting at a table": "woman",
    "a street in tokyo": "street",
    "a bird with colorful feathers": "bird",
    "kids running through a field of sunflowers": "kids",
    "a glass of water": "glass",
    "steampunk airship above london": "airship",
    "a girl with a pearl earring": "girl",
    "a smiling old woman": "woman",
    "make the car red": "car",
    "a beautiful landscape, trending on artstation": "landscape",
    "a small house by a lake": "house",
    "a teddy bear on a skateboard in times square": "bear",
    "an armchair in the shape of an avocado": "armchair",
    "ultra realistic portrait of an elderly man": "man",
    "a majestic lion standing on a cliff at sunrise": "lion",
    "watercolor illustration of a hummingbird": "hummingbird",
    "a futuristic train station, volumetric fog": "station",
    "medieval castle under siege, dramatic clouds": "castle",
    "pikachu eating pizza in paris": "pikachu",
    "a wizard casting a spell": "wizard",
    "old wooden bridge across a foggy river, autumn": "bridge",
    "a close up photo of a bee on a sunflower": "bee",
    "young girl reading a book by candlelight": "girl",
    "an abandoned amusement park overgrown with ivy": "park",
    "logo for a coffee shop": "shop",
    "a robot made of broccoli": "robot",
    "aerial view of a tropical island": "island",
    "a plate of sushi, food photography": "plate",
    "black cat sleeping on a windowsill": "cat",
    "samurai with a katana, ukiyo-e style": "samurai",
    "a vintage car driving down route 66": "car",
    "spaceship landing on an alien planet, 4k": "spaceship",
    "a group of penguins on ice": "group",
    "a viking warrior portrait": "warrior",
    "the moon reflected in a lake": "moon",
    "mountains, river, trees, sunset": "mountains",
    "a panda drinking coffee": "panda",
    "a blue sports car parked in front of a house": "car",
    "give him a moustache": "moustache",
    "a monkey wearing a spacesuit, portrait, oil on canvas": "monkey",
    "queen elizabeth as a zombie": "elizabeth",
    "a (red:1.2) Hokusai": "hokusai",
    "(masterpiece:1.2), [a cat], 4k": "cat",
    "red": "red",
    "the": "the",
    "": "",
}


def settings(**changed):
    given = {"prompt": "a (red:1.2) Hokusai", "width": 72, "height": 64, "seed": 5, "steps": 3}
    return Settings(**{**given, **changed})


@pytest.fixture(scope="module")
def run(model):
    return explain(model, settings())


@pytest.fixture(scope="module")
def told(model, run):
    other = explain(model, settings(guidance_scale=1), attention=False)
    return report(model, run, [Comparison(name="guidance", labels=("7.5", "1"), runs=(run, other))])


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim", "plms", "heun", "dpmpp_sde"])
def test_recording_does_not_change_the_picture_or_leave_hooks(model, sampler):
    asked = settings(sampler=sampler, steps=2)
    assert explain(model, asked).picture.tobytes() == model.make([asked])[0].tobytes()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.unet.modules())


def test_latents_of_the_record_are_those_of_the_run(model, run):
    latents = list(model.sample([run.settings]))
    assert all(torch.equal(step.after, x) for step, x in zip(run.steps, latents, strict=True))
    assert torch.equal(run.steps[0].x_t[0], torch.randn(4, 8, 9, generator=torch.Generator().manual_seed(5)))
    assert all(torch.equal(later.x_t, step.after) for step, later in zip(run.steps, run.steps[1:], strict=False))
    for step in run.steps:
        mixed = step.alpha_bar**0.5 * step.x_0 + (1 - step.alpha_bar) ** 0.5 * step.guided
        assert torch.allclose(mixed, step.x_t, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("guidance", [{}, {"guidance_rescale": 0.7}, {"guidance_interval": (0.5, 5)}])
def test_guided_noise_is_what_the_sampler_was_given(tiny_networks, monkeypatch, prediction, guidance):
    model = assemble(replace(TINY, prediction=prediction), tiny_networks)
    given, call = [], Denoiser.__call__
    monkeypatch.setattr(Denoiser, "__call__", lambda *arguments: given.append(call(*arguments)) or given[-1])
    list(model.sample([settings(**guidance)]))
    expected, given[:] = list(given), []
    run = explain(model, settings(**guidance), attention=False)
    assert all(torch.equal(step.guided, eps) for step, eps in zip(run.steps, expected, strict=True))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_halves_combine_to_the_guided_noise(tiny_networks, prediction):
    model = assemble(replace(TINY, prediction=prediction), tiny_networks)
    for step in explain(model, settings(guidance_scale=3.0), attention=False).steps:
        combined = step.without_prompt + 3 * step.difference
        assert torch.allclose(step.guided, combined, atol=1e-4)
        assert step.difference.norm() > 0


def test_without_guidance_and_outside_its_interval_there_is_one_prediction(model):
    run = explain(model, settings(guidance_interval=(0.5, 5)))
    halves = [step.without_prompt is not None for step in run.steps]
    sigmas = [((1 - step.alpha_bar) / step.alpha_bar) ** 0.5 for step in run.steps]
    assert halves == [0.5 <= sigma <= 5 for sigma in sigmas]
    assert len(set(halves)) == 2
    assert all(step.heats for step in run.steps)
    for step in explain(model, settings(guidance_scale=1.0), attention=False).steps:
        assert step.without_prompt is None
        assert step.difference is None
        assert torch.equal(step.guided, step.with_prompt)


@pytest.mark.slow
def test_steps_that_are_run_again_in_float32_are_recorded_once():
    half = assemble(TINY, fill(TINY, dtype=torch.float16))
    weight = half.unet.time_embed.linear2.weight
    weight.mul_(60_000 / weight.abs().max().item())  # overflows in fp16 only
    messages = []
    run = explain(half, settings(steps=2), on_retry=messages.append)
    assert "the UNet gave NaN or infinite values in fp16" in messages[0]
    assert [step.number for step in run.steps] == [1, 2]
    assert half.dtypes["unet"] == torch.float32
    assert run.picture.tobytes() == half.make([settings(steps=2)])[0].tobytes()
    assert torch.equal(run.steps[0].x_t[0], torch.randn(4, 8, 9, generator=torch.Generator().manual_seed(5)))


def test_attention_weights_reproduce_the_networks_attention():
    torch.manual_seed(0)
    attention = Attention(32, 48, 4, bias=False)
    x, context = torch.randn(1, 20, 32), torch.randn(1, 77, 48)
    weights = attention_weights(attention.q(x)[0], attention.k(context)[0], 4)
    values = attention.v(context)[0].unflatten(-1, (4, -1)).transpose(0, 1)
    assert torch.allclose(
        attention.out((weights @ values).transpose(0, 1).flatten(1)), attention(x, context)[0], atol=1e-5
    )


def test_maps_of_all_tokens_sum_to_one_at_every_place(run):
    sizes = [(8, 9, 5), (4, 5, 5), (2, 3, 5), (1, 2, 1)]
    for step in run.steps:
        assert [(heat.height, heat.width, heat.layers) for heat in step.heats] == sizes
        for heat in step.heats:
            assert heat.weights.shape == (8, len(run.strips[0].columns), heat.height, heat.width)
            assert torch.allclose(heat.weights.sum(dim=1), torch.ones(()), atol=1e-5)


def test_small_maps_are_means_over_places_and_heads(model):
    context, x = torch.randn(1, 77, 64), torch.randn(1, 4, 16, 16)
    found = []
    for options in ({}, {"side": 4, "heads_apart": False}):
        with AttentionWatch(model.unet, **options).watching() as watch:
            watch.expect([0, *[1] * 76])
            model.unet(x, torch.tensor(500.0), context)
            found.append(watch.take()[0].weights)
    large, small = found
    assert small.shape == (1, 2, 4, 4)
    expected = large.unflatten(-1, (4, 4)).unflatten(-3, (4, 4)).mean(dim=(0, -1, -3))
    assert torch.allclose(small[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "options"), [("ddim", {}), ("ddim", {"reuse_features": 3}), ("heun", {"reuse_features": 3})]
)
def test_maps_are_means_over_the_layers_of_the_half_with_the_prompt(model, sampler, options):
    """Computed from the attention's inputs. Layers that a step skips keep the maps of the features that it reuses.

    With Heun, every second prediction is the second one of its step.
    """
    asked = settings(sampler=sampler, steps=5, **options)
    seen, kept = {}, []
    layers = [m.blocks[0].cross_attention for m in model.unet.modules() if isinstance(m, SpatialTransformer)]

    def keep(attention, arguments):
        x, context = (values[-1] for values in arguments)
        seen[attention] = attention_weights(attention.q(x), attention.k(context), attention.heads)

    def prediction(*_):
        kept.append(dict(seen))  # what every layer saw last

    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    handles.append(model.unet.register_forward_hook(prediction))
    run = explain(model, asked)
    for handle in handles:
        handle.remove()
    assert run.picture.tobytes() == model.make([asked])[0].tobytes()
    firsts = kept[:: 2 if sampler == "heun" else 1]
    column_of = torch.tensor(run.strips[0].column_of)
    for step, weights in zip(run.steps, firsts, strict=True):
        assert [heat.layers for heat in step.heats] == [5, 5, 5, 1]
        for heat in step.heats:
            places = heat.height * heat.width
            mean = torch.stack([each for each in weights.values() if each.shape[1] == places]).mean(dim=0)
            for column in range(len(run.strips[0].columns)):
                expected = mean[..., column_of == column].sum(dim=-1).unflatten(-1, (heat.height, heat.width))
                assert torch.allclose(heat.weights[:, column], expected, atol=1e-5)


def test_long_prompts_and_many_steps_get_smaller_maps():
    unet = TINY.unet
    assert map_side(unet, (16, 16), 12, 30) == (32, True)
    assert map_side(unet, (64, 64), 12, 30) == (16, True)
    assert map_side(unet, (64, 64), 150, 100) == (8, False)
    largest, heads_apart = map_side(unet, (64, 64), 77, 30)
    kept = sum(min(largest, side) ** 2 * (8 if heads_apart else 1) for side in (64, 32, 16, 8))
    assert kept * 77 * 30 <= ROOM


def test_the_word_that_names_what_is_shown_is_chosen_first():
    wrong = {}
    for prompt, noun in NOUNS.items():
        strip = token_strip(prompt, TOKENIZER)
        chosen = "".join(strip.columns[i].text for i in strip.words[strip.noun]).strip()
        if chosen != noun:
            wrong[prompt] = chosen
    assert wrong == {}


def test_pictures_of_vectors_and_latents_have_a_pixel_for_each_number(run, told):
    vectors, latents = (
        Image.open(io.BytesIO(base64.b64decode(told[name].partition(",")[2]))) for name in ("vectors", "latents")
    )
    assert vectors.size == (64, 7)  # start, five tokens and end
    assert run.context.shape == (77, told["vector_width"]) == (77, 64)
    assert latents.size == (2 * 9, 2 * 8)
    mean = [run.steps[-1].after[0, i].mean() / run.steps[-1].after[0, i].std() for i in range(4)]
    levels = np.asarray(latents.convert("L"), dtype=float)
    quarters = [levels[:8, :9], levels[:8, 9:], levels[8:, :9], levels[8:, 9:]]
    assert np.argsort([quarter.mean() for quarter in quarters]).tolist() == np.argsort(mean).tolist()


def test_strip_has_all_tokens_words_and_weights():
    strip = token_strip("a (red:1.2) Hokusai", TOKENIZER)
    assert [(column.kind, column.text, column.id, column.count) for column in strip.columns] == [
        ("start", "", 49406, 1),
        ("token", "a ", 320, 1),
        ("token", "red ", 736, 1),
        ("token", "ho", 606, 1),
        ("token", "ku", 1836, 1),
        ("token", "sai ", 10886, 1),
        ("end", "", 49407, 1),
        ("padding", "", 49407, 70),
    ]
    assert [column.weight for column in strip.columns] == [1, 1, 1.2, 1, 1, 1, 1, 1]
    assert strip.words == ((0,), (1,), (2,), (3, 4, 5), (6,), (7,))
    assert strip.column_of == (0, 1, 2, 3, 4, 5, 6, *[7] * 70)
    assert (strip.rows, strip.cut, strip.cut_tokens) == (1, "", 0)


def test_strip_shows_what_programs_with_one_row_would_cut():
    strip = token_strip("a " * 75 + "blue horse", TOKENIZER)
    assert (strip.rows, strip.cut, strip.cut_tokens) == (2, "blue horse", 2)
    assert len(strip.column_of) == 2 * 77
    assert sum(column.count for column in strip.columns) == 2 * 77
    assert token_strip("a", TOKENIZER, rows=3).rows == 3


def test_words_that_change_have_a_strip_for_each_text(model):
    run = explain(model, settings(prompt="a [cat:red dog:2] " + "b " * 80))
    assert [strip.text.split(" b")[0] for strip in run.strips] == ["a cat", "a red dog"]
    assert [step.text for step in run.steps] == [0, 0, 1]
    for step in run.steps:
        assert step.heats[0].weights.shape[1] == len(run.strips[step.text].columns)
        assert torch.allclose(step.heats[0].weights.sum(dim=1), torch.ones(()), atol=1e-5)


def picture_of(uri):
    head, _, body = uri.partition(",")
    assert head.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_json_in_the_page_is_the_report_and_holds_the_numbers_of_the_run(run, told):
    data = data_of(page(told))
    assert data == json.loads(json.dumps(told))
    assert data["settings"]["prompt"] == run.settings.prompt
    assert data["milliseconds"] == run.milliseconds
    for step, known in zip(data["steps"], run.steps, strict=True):
        assert (step["timestep"], step["alpha_bar"]) == (known.timestep, known.alpha_bar)
        assert step["sigma"] == pytest.approx(((1 - known.alpha_bar) / known.alpha_bar) ** 0.5)
        assert step["signal_to_noise"] == pytest.approx(known.alpha_bar / (1 - known.alpha_bar))
        assert step["norms"]["x_t"] == pytest.approx(known.x_t.square().sum().sqrt().item(), rel=1e-5)
        apart = (known.with_prompt - known.without_prompt).square().sum().sqrt().item()
        assert step["norms"]["difference"] == pytest.approx(apart, rel=1e-5)
        assert step["difference_enlarged"] * apart == pytest.approx(data["noise_norm"], rel=1e-4)
        assert step["milliseconds"] == known.milliseconds > 0
    assert data["noise_norm"] == pytest.approx((4 * 8 * 9) ** 0.5)


def test_the_page_says_that_features_were_reused_and_tokens_merged(told):
    settings = {**told["settings"], "reuse_features": 3, "merge_tokens": 0.5}
    text = page({**told, "settings": settings})
    assert "<dd>in at least one of 3 predictions</dd>" in text
    assert "<dd>50 % at the largest resolution</dd>" in text
    assert "at least one of" not in page(told)
    assert "tokens merged" not in page(told)


def test_finished_picture_in_the_page_is_the_picture_with_its_settings(model, run, told):
    picture = picture_of(told["picture"]["uri"])
    assert picture.format == "PNG"
    assert picture.tobytes() == run.picture.tobytes()
    assert picture.text == model.texts(run.settings)
    previews = []
    report(model, run, on_preview=lambda: previews.append(1))
    assert len(previews) == preview_count(3, 2, []) == 15


def test_previews_show_what_they_are_called(model, run, told):
    (expected,) = model.decode(run.steps[1].x_0)
    shown = picture_of(told["steps"][1]["pictures"]["x_0"]).convert("RGB")
    assert shown.size == expected.size == (72, 64)
    apart = [abs(a - b) for a, b in zip(shown.tobytes(), expected.tobytes(), strict=True)]
    other = [abs(a - b) for a, b in zip(shown.tobytes(), run.picture.tobytes(), strict=True)]
    assert sum(apart) < sum(other)
    compared = told["comparisons"][0]["runs"]
    assert [one["label"] for one in compared] == ["7.5", "1"]
    assert [len(one["steps"]) for one in compared] == [3, 3]
    assert compared[0]["steps"][0]["picture"] != compared[1]["steps"][0]["picture"]


def test_shares_of_all_words_sum_to_one_and_the_last_row_weighs_layers(run, told):
    words = run.strips[0].words
    for step in told["steps"]:
        assert len(step["shares"]) == 5
        for row in step["shares"]:
            assert len(row) == len(words)
            assert sum(row) == pytest.approx(1, abs=1e-5)
        layers = [5, 5, 5, 1]
        mean = [sum(n * row[i] for n, row in zip(layers, step["shares"], strict=False)) / 16 for i in range(len(words))]
        assert step["shares"][4] == pytest.approx(mean, abs=1e-6)
    first = [step["shares"][0][1] for step in told["steps"]]
    assert told["shares"][0][0][1] == pytest.approx(sum(first) / 3)
    assert shares((), words) == []


def test_packed_maps_are_the_recorded_ones(run, told):
    """Unpacked as the page's script does it."""
    columns = len(run.strips[0].columns)
    for step, known in zip(told["steps"], run.steps, strict=True):
        raw, start = base64.b64decode(step["maps"]), 0
        for level, heat, peaks in zip(told["resolutions"], known.heats, step["peaks"], strict=True):
            height, width = level["stored"]
            size = level["heads"] * columns * height * width
            values = torch.tensor(list(raw[start : start + size])).reshape(level["heads"], columns, height, width)
            restored = values / 255 * torch.tensor(peaks)[:, None, None]
            assert (restored - heat.weights).abs().max() <= max(peaks) / 255
            start += size
        assert start == len(raw)


def test_a_page_of_30_steps_stays_below_6_megabytes(told):
    """With the largest maps and picture, and noise in all previews."""
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    decoded = Image.fromarray(noise.numpy()).resize((512, 512), Image.Resampling.BICUBIC)
    previews = len(data_uri(decoded, LARGE)) + 4 * len(data_uri(decoded, SMALL))
    step = {**told["steps"][0], "maps": "", "pictures": {"x_t": ""}}
    rest = len(page({**told, "steps": [step] * 30, "comparisons": []}))
    assert 30 * previews + (ROOM + LARGEST_PNG) * 4 / 3 + rest < 6_000_000


def picture():
    return InitImage(image=torch.rand((1, 3, 64, 72), generator=torch.Generator().manual_seed(3)) * 2 - 1)


@pytest.fixture(scope="module")
def editor():
    config = make_checkpoint.tiny(SD_V1_EDIT)
    return assemble(config, fill(config))


@pytest.mark.slow
def test_three_predictions_of_an_edit_combine_to_the_guided_noise(editor):
    """Brooks et al. (2023), eq. 3"""
    asked = settings(guidance_scale=4.0, image_guidance=1.5)
    run = explain(editor, asked, picture())
    assert run.picture.tobytes() == editor.make([asked], picture())[0].tobytes()
    assert all(step.heats for step in run.steps)
    for step in run.steps:
        by_picture = 1.5 * (step.without_prompt - step.without_picture)
        assert by_picture.norm() > 0
        assert torch.allclose(step.guided, step.without_picture + by_picture + 4 * step.difference, atol=1e-4)
    previews = []
    told = report(editor, run, on_preview=lambda: previews.append(1))
    assert len(previews) == preview_count(3, 3, []) == sum(len(step["pictures"]) for step in told["steps"])
    assert [given["name"] for given in told["given"]] == ["the picture to edit"]
    assert "image guidance" in page(told)
    two = explain(editor, settings(image_guidance=1.0), picture(), attention=False).steps
    assert all(step.without_picture is None and step.without_prompt is not None for step in two)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_run_that_begins_with_a_picture_and_its_depth_is_recorded(prediction):
    """Its first latents are the noisy picture, and the depth is what the UNet sees."""
    config = replace(make_checkpoint.tiny(SD_V1_DEPTH), prediction=prediction)
    model, seen = assemble(config, fill(config)), []
    start = replace(picture(), depth=torch.arange(64.0 * 72).reshape(1, 1, 64, 72))
    asked = settings(strength=0.7)
    handle = model.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    run = explain(model, asked, start, attention=False)
    handle.remove()
    assert run.picture.tobytes() == model.make([asked], start)[0].tobytes()
    assert len(run.steps) == len(run.plan) == 2
    assert all(torch.equal(step.x_t[0], x[-1, :4]) for step, x in zip(run.steps, seen, strict=True))
    assert torch.equal(run.depth[0], seen[0][-1, 4:])
    for step in run.steps:
        mixed = step.alpha_bar**0.5 * step.x_0 + (1 - step.alpha_bar) ** 0.5 * step.guided
        assert torch.allclose(mixed, step.x_t, atol=1e-4)
    told = report(model, run)
    assert [given["name"] for given in told["given"]][1] == "its depth as the network reads it: near is bright"
    assert "0.7: 2 of 3 steps run" in page(told)


def test_what_cannot_be_explained_is_refused(model):
    mask = torch.ones(1, 1, 64, 72)
    with pytest.raises(ValueError, match="inpainting cannot be explained"):
        explain(model, settings(), replace(picture(), mask=mask, latent_mask=mask[..., ::8, ::8]))
    with pytest.raises(ValueError, match="no step runs"):
        explain(model, settings(strength=0.2), picture())
