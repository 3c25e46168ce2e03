"""The noise of a picture depends on its seed alone."""

import pytest
import torch

from sd.noise import PictureNoise


def test_a_picture_gets_the_same_noise_alone_and_in_a_batch():
    together = PictureNoise([7, 8, 9, 10], (4, 8, 8))
    alone = PictureNoise([9], (4, 8, 8))
    for _ in range(3):
        assert torch.equal(together()[2], alone()[0])


def test_noise_is_that_of_a_fresh_cpu_generator():
    expected = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(42))
    assert torch.equal(PictureNoise([42], (4, 8, 8))()[0], expected)


def test_every_draw_is_new():
    noise = PictureNoise([1], (4, 8, 8))
    assert not torch.equal(noise(), noise())


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_no_generator_takes_are_refused(seed):
    with pytest.raises(ValueError, match="a seed must be 0 to 9223372036854775807"):
        PictureNoise([seed], (4, 8, 8))
