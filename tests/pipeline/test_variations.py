"""Variations of a picture: from the noise of its seed towards that of another one."""

import pytest
import torch
from conftest import final, refused, settings, settings_of
from PIL import Image

from sd.pipeline.settings import SettingError, Settings

SMALL = ["-W", "64", "-H", "64", "--steps", "1", "-s", "3"]


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_no_variation_is_the_seeds_picture_and_a_whole_one_the_other_seeds(model, sampler):
    first, second = (final(model, [settings(sampler=sampler, steps=2, seed=seed)]) for seed in (3, 9))
    ends = [final(model, [settings(sampler=sampler, steps=2, seed=3, vary=x, vary_seed=9)]) for x in (0, 1)]
    assert torch.equal(ends[0], first)
    assert torch.equal(ends[1], second)
    between = final(model, [settings(sampler=sampler, steps=2, seed=3, vary=0.2, vary_seed=9)])
    assert (between - first).norm() < (between - second).norm()
    assert not torch.equal(between, first)


def test_variations_are_the_same_alone_and_in_a_batch(model):
    batch = [settings(steps=2, seed=3, vary=x, vary_seed=n) for x, n in ((0.1, 9), (0.5, 10), (0, None))]
    for latents, job in zip(final(model, batch), batch, strict=True):
        alone = final(model, [job])[0]
        assert (latents - alone).norm() < 1e-5 * alone.norm()


def test_seeds_of_variations_count_on_and_are_written_as_other_tools_do(run, tiny_ckpt):
    code, out, _ = run("txt2img", "a", "-m", tiny_ckpt, *SMALL, "--vary", 0.25, "--vary-seed", 9, "--count", 2,
                       "-o", "{seed}-{vary_seed}.png")  # fmt: skip
    assert (code, out) == (0, ["3-9.png", "3-10.png"])
    assert [settings_of(path)["vary_seed"] for path in out] == [9, 10]
    assert "Size: 64x64, Variation seed: 9, Variation seed strength: 0.25, " in Image.open(out[0]).text["parameters"]
    _, (path,), err = run("txt2img", "a", "-m", tiny_ckpt, *SMALL, "--vary", 0.25, "-o", "drawn.png")
    assert f"variation seed {settings_of(path)['vary_seed']}" in err


def test_variations_that_cannot_be_are_refused(run, tiny_ckpt):
    refused(run("txt2img", "a", "-m", tiny_ckpt, "--vary", "2"), "--vary 2.0 is out of range: 0 (the seed's picture)")
    refused(run("txt2img", "a", "-m", tiny_ckpt, "--vary-seed", "2"), "--vary-seed does nothing without --vary")
    with pytest.raises(SettingError, match=r"vary 0\.5 needs a variation seed"):
        Settings(prompt="", width=64, height=64, seed=1, vary=0.5)
    with pytest.raises(SettingError, match="vary_seed -1 is out of range"):
        Settings(prompt="", width=64, height=64, seed=1, vary=0.5, vary_seed=-1)
    assert Settings(prompt="", width=64, height=64, seed=1, vary=0, vary_seed=5).vary_seed is None
