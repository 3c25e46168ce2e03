"""The noise of a picture depends on its seed alone."""

import math

import pytest
import torch

from sd.sampling.noise import PictureNoise, slerp
from sd.sampling.philox import PhiloxGenerator, philox


def test_a_picture_gets_the_same_noise_alone_and_in_a_batch():
    together = PictureNoise([7, 8, 9, 10], (4, 8, 8))
    alone = PictureNoise([9], (4, 8, 8))
    for _ in range(3):
        assert torch.equal(together()[2], alone()[0])


def test_noise_comes_from_a_fresh_cpu_generator():
    expected = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(42))
    assert torch.equal(PictureNoise([42], (4, 8, 8))()[0], expected)


def test_every_draw_is_new():
    noise = PictureNoise([1], (4, 8, 8))
    assert not torch.equal(noise(), noise())


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_outside_the_generators_range_are_refused(seed):
    with pytest.raises(ValueError, match="a seed must be 0 to 18446744073709551615"):
        PictureNoise([seed], (4, 8, 8))


def test_spherical_interpolation_rotates_in_the_plane_of_the_two():
    """By hand: 30 degrees from (1, 0) to (0, 1) is (cos 30, sin 30); and a third of the way over 120 degrees is 40."""
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert slerp(x, y, 1 / 3).tolist() == pytest.approx([math.sqrt(3) / 2, 0.5])
    far = torch.tensor([math.cos(math.radians(120)), math.sin(math.radians(120))])
    turned = [math.cos(math.radians(40)), math.sin(math.radians(40))]
    assert slerp(x, far, 1 / 3).tolist() == pytest.approx(turned, abs=1e-6)
    assert torch.equal(slerp(x, x, 0.5), x)


def test_the_ends_of_a_variation_are_the_two_seeds_to_the_bit():
    shape = (4, 8, 8)
    first, second = PictureNoise([3], shape), PictureNoise([9], shape)
    at_0, at_1 = PictureNoise([3], shape, [(9, 0.0)]), PictureNoise([3], shape, [(9, 1.0)])
    for _ in range(3):  # the noise that samplers add on the way, too
        assert torch.equal(at_0(), first())
        assert torch.equal(at_1(), second())


def test_noise_between_two_seeds_is_as_strong_as_theirs():
    noise = PictureNoise([3, 3, 5], (4, 64, 64), [(9, 0.5), (9, 0.1), None])()
    assert noise.std(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=0.02)
    plain = PictureNoise([3], (4, 64, 64))()[0]
    cosines = [(row * plain).sum() / (row.norm() * plain.norm()) for row in noise]
    # the noises of two seeds are at right angles up to chance (1 / sqrt(16384)), so a tenth of the way is 9 degrees
    assert [float(cosine) for cosine in cosines[:2]] == pytest.approx(
        [math.cos(math.pi / 4), math.cos(math.pi / 20)], abs=0.02
    )
    assert torch.equal(noise[2], PictureNoise([5], (4, 64, 64))()[0])
    assert torch.equal(noise[1], PictureNoise([3], (4, 64, 64), [(9, 0.1)])()[0])


@pytest.mark.parametrize(
    ("counter", "key", "words"),  # the known answers that Random123 is published with
    [
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words_for_numbers_and_for_tensors(counter, key, words):
    assert [f"{word:08x}" for word in philox(counter, key)] == words.split()
    assert [f"{word.item():08x}" for word in philox([torch.tensor([word]) for word in counter], key)] == words.split()


def test_normal_numbers_are_those_published_with_the_web_ui():
    """It prints them for seed 0, as of a GPU."""
    expected = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564]
    expected += [-0.62285122, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497]
    assert PhiloxGenerator(0).randn((3, 4)).flatten().tolist() == pytest.approx(expected, abs=2e-7)


def words_by_hand(counter, key):
    """Ten rounds in Python's whole numbers."""
    for i in range(10):
        keys = [(key + i * 0x9E3779B9) % 2**32, ((key >> 32) + i * 0xBB67AE85) % 2**32]
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second >> 32 ^ counter[1] ^ keys[0],
            second % 2**32,
            first >> 32 ^ counter[3] ^ keys[1],
            first % 2**32,
        ]
    return counter


@pytest.mark.parametrize("seed", [7, 2**32 + 5, 2**64 - 1])
def test_draw_n_of_number_i_has_the_counter_n_0_i_0_and_the_whole_seed_as_key(seed):
    noise = PictureNoise([3, seed], (2, 3, 4), rng="philox")
    for draw in range(3):
        found = noise()[1].flatten().tolist()
        for i in (0, 1, 23):
            x, y, _, _ = words_by_hand([draw, 0, i, 0], seed)
            u, v = (x + 0.5) / 2**32, (y + 0.5) / 2**32 * 2 * math.pi
            assert found[i] == pytest.approx(math.sqrt(-2 * math.log(u)) * math.sin(v), rel=1e-5)


def test_philox_noise_is_normal_and_the_same_in_every_batch():
    noise = PictureNoise([3, 4], (4, 64, 64), rng="philox")()
    assert [noise.mean().item(), noise.std().item()] == pytest.approx([0, 1], abs=0.02)
    assert torch.equal(PictureNoise([4], (4, 64, 64), rng="philox")()[0], noise[1])
    with pytest.raises(ValueError, match="rng must be one of cpu, philox, got 'gpu'"):
        PictureNoise([1], (4, 8, 8), rng="gpu")


def test_a_philox_variation_is_the_web_uis_by_columns_and_in_the_first_noise_only():
    shape = (2, 5, 3)
    noise, plain = PictureNoise([3], shape, [(9, 0.25)], rng="philox"), PictureNoise([3], shape, rng="philox")
    p, q = plain()[0], PictureNoise([9], shape, rng="philox")()[0]
    varied = noise()[0]
    for channel in range(2):
        for column in range(3):
            ours = slerp(p[channel, :, column], q[channel, :, column], 0.25)
            assert torch.allclose(varied[channel, :, column], ours, atol=1e-6)
    assert torch.equal(noise(), plain())
    assert torch.equal(PictureNoise([3], shape, [(3, 0.5)], rng="philox")()[0], p)  # the same seed twice


@pytest.mark.parametrize("rng", ["cpu", "philox"])
@pytest.mark.parametrize(("delta", "other"), [(31337, 31340), (-3, 0), (2**64 - 1, 2)])
def test_a_seed_delta_is_added_after_the_first_noise(rng, delta, other):
    noise = PictureNoise([3], (4, 8, 8), rng=rng, seed_delta=delta)
    assert torch.equal(noise(), PictureNoise([3], (4, 8, 8), rng=rng)())
    added = PictureNoise([other], (4, 8, 8), rng=rng)
    assert all(torch.equal(noise(), added()) for _ in range(2))
