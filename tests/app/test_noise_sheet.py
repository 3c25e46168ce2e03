"""`sd noise`: the forward process and the round trip through the VAE, in numbers and on a sheet."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sd.study.forward_process import channel_pictures, forward_process, psnr, round_trip
from sd.study.noise_sheet import arithmetic, sheet


@pytest.fixture(scope="module")
def picture():
    ramp = np.add.outer(np.arange(64), np.arange(72)) * 255 // 134
    return Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def trip(model, picture):
    with torch.no_grad():
        return round_trip(model, picture)


@pytest.fixture(scope="module")
def levels(model, trip):
    with torch.no_grad():
        return forward_process(model, trip.latents, (0, 500, 999), seed=3)


def test_signal_falls_as_the_published_table_says(levels):
    assert [level.timestep for level in levels] == [None, 0, 500, 999]
    first, last = 0.00085**0.5, 0.012**0.5  # roots of the published betas
    kept = [math.prod(1 - (first + (last - first) * i / 999) ** 2 for i in range(t + 1)) for t in (0, 500, 999)]
    assert [level.alpha_bar for level in levels] == pytest.approx([1, *kept], rel=1e-5)
    assert levels[0].signal_to_noise == math.inf
    assert levels[3].signal_to_noise == pytest.approx(1 / 14.6146**2, rel=1e-4)  # sigma_max of Stable Diffusion


def test_noisy_latents_are_a_mixture_with_one_noise(trip, levels):
    noise = torch.randn(4, 8, 9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(levels[0].latents, trip.latents)
    for level in levels[1:]:
        expected = level.alpha_bar**0.5 * trip.latents[0] + (1 - level.alpha_bar) ** 0.5 * noise
        assert torch.allclose(level.latents[0], expected, atol=1e-5)


def test_round_trip_counts_and_compares(model, picture, trip):
    assert trip.numbers == (64 * 72 * 3, 4 * 8 * 9)
    assert trip.positions == (64 * 72, 8 * 9)
    (decoded,) = model.decode(trip.latents)
    assert decoded.tobytes() == trip.reconstruction.tobytes()
    error = np.square(np.asarray(picture, float) - np.asarray(decoded, float)).mean()
    assert trip.psnr == pytest.approx(20 * math.log10(255 / math.sqrt(error)))


def test_psnr_by_hand():
    black, grey = Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), (51, 51, 51))
    assert psnr(black, grey) == pytest.approx(20 * math.log10(5))
    assert psnr(black, black) == math.inf


def test_arithmetic_of_the_paper():
    class Large:
        picture, latents = Image.new("RGB", (512, 512)), torch.zeros(1, 4, 64, 64)
        numbers, positions = (786_432, 16_384), (262_144, 4_096)

    said = arithmetic(Large())
    assert said == (
        "512 x 512 x 3 = 786,432 numbers become 64 x 64 x 4 = 16,384: 48 times fewer; 64 times fewer positions."
    )


def test_channels_are_grey_with_zero_in_the_middle():
    latents = torch.tensor([-9.0, -3, 0, 3]).reshape(1, 1, 2, 2)
    (grey,) = channel_pictures(latents)
    assert list(grey.tobytes()) == [0, 0, 128, 255]


def test_sheet_shows_the_strip_and_the_round_trip(levels, trip):
    drawn = sheet(levels, trip)
    assert drawn.width > 6 * 176
    x_0 = levels[0].picture.resize((176, 156), Image.Resampling.LANCZOS)
    pixels = np.asarray(drawn)
    assert any(np.array_equal(pixels[y : y + 156, 24 : 24 + 176], np.asarray(x_0)) for y in range(30, 120))


@pytest.mark.slow
def test_command_writes_a_sheet_and_tells_its_numbers(run, tiny_ckpt, picture, tmp_path):
    picture.save(tmp_path / "ramp.png")
    options = ["-m", tiny_ckpt, "-W", 72, "-H", 64, "--timesteps", "10,999"]
    code, lines, _ = run("noise", "ramp.png", *options)
    assert (code, lines[-1]) == (0, "outputs/ramp-noise.png")
    assert lines[0].split() == ["timestep", "alpha_bar", "signal", "to", "noise"]
    assert [line.split()[0] for line in lines[1:4]] == ["x_0", "10", "999"]
    assert Image.open("outputs/ramp-noise.png").format == "PNG"
    code, (line,), _ = run("noise", "ramp.png", *options, "--json", "-o", "other.png")
    told = json.loads(line)
    assert (told["event"], told["path"], told["size"], told["latents"]) == ("noise", "other.png", [72, 64], [4, 8, 9])
    assert (told["numbers"], told["positions"]) == ([13_824, 288], [4_608, 72])
    assert told["levels"][0] == {"timestep": None, "alpha_bar": 1.0, "signal_to_noise": None}
    assert told["levels"][2]["signal_to_noise"] == pytest.approx(0.004682, rel=1e-3)
