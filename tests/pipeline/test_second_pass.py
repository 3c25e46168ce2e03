"""Two passes: their sizes, their steps, and that the second is image to image on what the first made."""

import pytest
import torch
import torch.nn.functional as F
from conftest import final, refused, settings, settings_of
from PIL import Image

from sd.pipeline.second_pass import first_size, second_size, steps_run
from sd.pipeline.settings import SettingError, Settings
from sd.pipeline.upscaling import linear_weights, upscale_latents, upscale_picture
from sd.sampling.init_image import InitImage

GOOD = {"prompt": "", "width": 512, "height": 512, "seed": 1}


@pytest.mark.parametrize(("before", "after"), [((8, 8), (16, 16)), ((8, 6), (13, 9)), ((5, 7), (5, 8))])
def test_latents_are_enlarged_as_torch_does(before, after):
    latents = torch.randn(2, 4, *before, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(latents, size=after, mode="bilinear", align_corners=False)
    assert torch.allclose(upscale_latents(latents, after), expected, atol=1e-6)


def test_enlarging_what_wraps_knows_no_edge():
    latents = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    wide = F.interpolate(latents.repeat(1, 1, 3, 3), size=(36, 48), mode="bilinear")[..., 12:24, 16:32]
    assert torch.allclose(upscale_latents(latents, (12, 16), "xy"), wide, atol=1e-6)
    assert not torch.allclose(upscale_latents(latents, (12, 16)), wide, atol=1e-2)
    assert linear_weights(4, 8, wraps=True).sum(1).tolist() == pytest.approx([1] * 8)
    picture = Image.effect_noise((24, 16), 60).convert("RGB")
    tiled = Image.new("RGB", (72, 48))
    for left in (0, 24, 48):
        for top in (0, 16, 32):
            tiled.paste(picture, (left, top))
    expected = tiled.resize((144, 96), Image.Resampling.LANCZOS).crop((48, 32, 96, 64))
    assert upscale_picture(picture, (48, 32), "xy").tobytes() == expected.tobytes()


def test_sizes_of_both_passes():
    assert second_size(2, 512, 384) == (1024, 768)
    assert second_size("1.3x", 512, 512) == (664, 664)
    assert second_size("1024x768", 592, 440) == (1024, 768)
    assert first_size("1024x768", 512) == (592, 440)  # 262,144 pixels would be 591.2 x 443.4
    assert first_size(2, 512) == first_size(None, 512) == (512, 512)


def test_steps_of_the_second_pass_are_those_that_are_run():
    first, second = Settings(**GOOD, hires=2, steps=30).passes()
    assert (first.hires, first.strength, first.steps, first.size) == (None, 1, 30, (512, 512))
    assert (second.size, second.steps, second.strength) == ((1024, 1024), 30, 0.7)
    chosen = Settings(**GOOD, hires=2, hires_steps=10, hires_strength=0.5)
    assert (chosen.hires_steps, chosen.passes()[1].steps) == (10, 20)
    assert Settings(**GOOD, steps=30, hires=2, hires_strength=0.5).hires_steps == 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hires": 1}, "hires 1 is out of range: a factor above 1"),
        ({"hires": 9}, "hires would be 4608x4608; the largest side is 4096."),
        ({"hires": "big"}, "hires big is neither a factor such as 2 nor a size such as 1024x768."),
        ({"hires": "1024x512"}, "hires 1024x512 has another shape than the first pass, 512x512."),
        ({"hires": "1000x1001"}, "hires 1000x1001 has a side that is not a multiple of 8. Nearest: 1000x1000."),
        ({"hires": "256x256"}, "hires 256x256 is not larger than the first pass, 512x512."),
        ({"hires": 2, "strength": 0.5}, "hires works only without an input image"),
        ({"hires_steps": 4}, "hires_steps 4 does nothing without a second pass"),
        (
            {"hires": 2, "hires_steps": 800},
            "hires_steps 800 is out of range: at least 1, and at this strength up to 700",
        ),
        ({"hires": 2, "hires_strength": 0}, "hires_strength 0 is out of range: above 0, up to 1"),
        ({"hires": 2, "hires_upscale": "imag"}, "hires_upscale imag does not exist. Did you mean image?"),
        ({"hires": True}, "hires cannot be True"),
    ],
)
def test_second_passes_that_cannot_be_are_refused(change, message):
    with pytest.raises(SettingError) as caught:
        Settings(**GOOD, **change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),  # steps of each word in the first pass, and in the second
    [
        ("[cat:dog:0.5]", {"steps": 20}, [["cat"] * 10 + ["dog"] * 10, ["dog"] * 14]),
        ("[cat:dog:1.5]", {"steps": 20}, [["cat"] * 20, ["cat"] * 7 + ["dog"] * 7]),
        ("[cat:dog:12]", {"steps": 20}, [["cat"] * 12 + ["dog"] * 8, ["dog"] * 14]),
        ("[cat:dog:25]", {"steps": 20}, [["cat"] * 20, ["cat"] * 5 + ["dog"] * 9]),
        ("[cat|dog]", {"steps": 3}, [["cat", "dog", "cat"], ["cat", "dog"]]),
        ("[cat:dog:1.5]", {"steps": 4, "hires_steps": 10}, [["cat"] * 4, ["cat"] * 5 + ["dog"] * 5]),
        ("[cat:dog:7]", {"steps": 4, "hires_steps": 10}, [["cat"] * 4, ["cat"] * 3 + ["dog"] * 7]),
        ("[cat:dog:1.5]", {"sigmas": [14, 7, 3, 1], "hires_strength": 0.5}, [["cat"] * 4, ["cat", "dog"]]),
        ("[cat:dog:0.5]", {"steps": 2, "plain_prompts": True}, [["[cat:dog:0.5]"] * 2, ["[cat:dog:0.5]"]]),
    ],
)
def test_words_that_change_go_on_in_the_second_pass(prompt, options, expected):
    """A share of 0 to 1 is of the first pass, 1 to 2 of the second; counts go through both, as in the web UI."""
    job = Settings(**{**GOOD, "prompt": prompt, "negative_prompt": prompt, "hires": 2, **options})
    found = []
    for each in job.passes():
        run = steps_run(each.steps, each.strength)
        texts, negative = each.texts_by_step()
        assert texts == negative
        found.append(list(texts[:run]))
    assert found == expected


def test_enlarging_the_image_is_image_to_image_on_the_enlarged_picture(model):
    common = {"seed": 3, "guidance_scale": 2.0, "sampler": "euler_a"}
    (made,) = model.txt2img("a cat", width=64, height=64, steps=4, hires=2, hires_upscale="image", **common)
    (small,) = model.txt2img("a cat", width=64, height=64, steps=4, **common)
    large = small.resize((128, 128), Image.Resampling.LANCZOS)
    # two steps are run: int(4 * 0.7); the shortest schedule of which int(n * 0.7) are two has three
    (expected,) = model.img2img("a cat", large, strength=0.7, steps=3, size=(128, 128), **common)
    assert made.tobytes() == expected.tobytes()


def test_enlarging_latents_begins_the_second_pass_with_them(model):
    job = settings(hires="96x96", hires_strength=0.5, steps=4)
    larger = F.interpolate(final(model, [job]), size=(12, 12), mode="bilinear")
    second = settings(width=96, height=96, steps=4, strength=0.5)
    *_, expected = model.sample([second], InitImage(latents=larger))
    (made,) = model.make([job])
    (expected_picture,) = model.decode(expected)
    # torch sums the two neighbours in float32 and in another order
    assert max(abs(a - b) for a, b in zip(made.tobytes(), expected_picture.tobytes(), strict=True)) <= 1


def test_two_passes_are_the_same_alone_and_in_a_batch(model):
    jobs = [settings(seed=seed, steps=2, hires=1.5, hires_upscale=kind) for kind in ("latent",) for seed in (1, 2)]
    for picture, job in zip(model.make(jobs), jobs, strict=True):
        (alone,) = model.make([job])
        assert max(abs(a - b) for a, b in zip(picture.tobytes(), alone.tobytes(), strict=True)) <= 1


def test_the_command_writes_what_other_tools_write(run, tiny_ckpt):
    common = ["txt2img", "a", "-m", tiny_ckpt, "-s", 1, "--steps", 2]
    code, (path,), _ = run(*common, "-W", 64, "-H", 64, "--hires", "1.5", "--hires-strength", 0.5)
    assert (code, Image.open(path).size) == (0, (96, 96))
    line = Image.open(path).text["parameters"].split("\n")[1]
    assert "Size: 64x64, " in line
    assert "Denoising strength: 0.5, Hires upscale: 1.5, Hires steps: 1, Hires upscaler: Latent, " in line
    assert settings_of(path)["hires"] == [96, 96]
    refused(run(*common, "--hires", "0.5"), "--hires 0.5 is out of range: a factor above 1, up to 16.")
    refused(run(*common, "--strength", 0.5), "--strength is not a flag of sd txt2img")
