"""The noise of a picture depends on its seed alone."""

import math

import pytest
import torch

from sd.sampling.noise import PictureNoise, slerp


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


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_outside_the_generators_range_are_refused(seed):
    with pytest.raises(ValueError, match="a seed must be 0 to 9223372036854775807"):
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
