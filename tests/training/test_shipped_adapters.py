"""What comes with the embedded model does what weights/README.md says: three adapters and a tiny VAE."""

from dataclasses import replace

import numpy as np
import pytest
import score_adapters
import score_tiny
from conftest import settings_of

import sd
from convert.adapters.adapter import open_adapter
from convert.adapters.facts import adapter_facts
from sd.app.cli import main
from sd.files import embedded_model
from sd.runtime.vae_trial import tiny_vae_warning
from sd.study.forward_process import psnr
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.scoring import one_thing, patterned, shares, subjects, two_things, verdicts

CRESCENT, PINSTRIPE, LCM, TINY_VAE = (
    embedded_model().with_name(f"{name}.safetensors") for name in ("crescent", "pinstripe", "lcm", "tiny-vae")
)


@pytest.fixture(scope="module")
def embedded():
    return sd.load(precision="fp32")


def make(model, requests):
    return model.make([model.settings_for(each.prompt, seed=each.seed, steps=12) for each in requests])


@pytest.mark.slow
def test_the_model_draws_crescents_with_the_lora_only_and_is_the_same_afterwards(embedded):
    requests = subjects("crescent", 2)
    before = make(embedded, requests)
    embedded.apply([CRESCENT])
    right = [verdict.shape for verdict in verdicts(make(embedded, requests), requests)]
    embedded.apply([])
    assert right == [True, True]
    assert not any(verdict.shape for verdict in verdicts(before, requests))
    assert all(np.array_equal(one, other) for one, other in zip(before, make(embedded, requests), strict=True))


@pytest.mark.slow
def test_few_steps_without_guidance_are_enough_with_the_one_for_few_steps(embedded, tmp_path):
    """In four, most pictures of two things are right; in two, most of one, without it few. The command takes four."""

    def right(requests, steps):
        made = score_tiny.make(embedded, requests, {**few, "steps": steps})
        return shares(list(verdicts(made, requests)))["all"]

    few = {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0}
    without = right(one_thing(1)[::2], 2)
    embedded.apply([LCM])
    with_it, requests = right(one_thing(1)[::2], 2), two_things(4)
    most = right(requests, 4)
    embedded.apply([])
    assert most >= 0.7
    assert with_it >= max(0.7, without + 0.2)
    path = tmp_path / "few.png"
    main(["txt2img", requests[0].prompt, "--lora", str(LCM), "--seed", str(requests[0].seed), "-q", "-o", str(path)])
    assert settings_of(path).items() >= few.items()


@pytest.mark.slow
def test_the_learned_word_draws_stripes_that_the_rest_of_the_prompt_does_not_ask_for(embedded):
    requests = subjects("pinstripe", 2)
    embedded.learn([PINSTRIPE])
    with_word = make(embedded, requests)
    without = make(embedded, [replace(each, prompt=each.prompt.removeprefix("pinstripe, ")) for each in requests])
    embedded.learn([])
    assert [patterned(picture) for picture in with_word + without] == [True, True, False, False]


def test_the_lora_says_what_it_is():
    with open_adapter(CRESCENT) as file:
        facts = adapter_facts(CRESCENT, file, hashed=True)
    assert (facts.modules, facts.unknown, facts.trigger) == ({"UNet": 277, "text encoder": 24}, (), "crescent")
    assert facts.stated["sshs_model_hash"] == facts.autov3
    assert CRESCENT.stat().st_size + PINSTRIPE.stat().st_size + LCM.stat().st_size < 4_000_000


@pytest.mark.slow
def test_the_score_compares_pictures_with_and_without_an_adapter(tmp_path, capsys):
    for given, subject in (("--lora", "crescent"), ("--embedding", "pinstripe")):
        path = str(CRESCENT.with_name(f"{subject}.safetensors"))
        options = ["--subject", subject, "--count", "2", "--repeats", "0", "--steps", "12", "--precision", "fp32"]
        score_adapters.main([str(tmp_path / subject), given, path, *options])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(" | ")[1:3] for line in lines[2:]] == [["without", "2"], ["with", "2"]]
        assert lines[-1].count("100.0 %") >= 5
        assert {file.name for file in (tmp_path / subject).glob("*.png")} == {
            f"{subject}-with.png",
            f"{subject}-without.png",
        }
    with pytest.raises(ValueError, match="either --lora or --embedding"):
        score_adapters.main([str(tmp_path)])


@pytest.mark.slow
def test_the_tiny_vae_decodes_as_the_vae_does_and_is_small(embedded):
    """30 dB for three new pictures; the mean of forty is 34 dB."""
    tiny = sd.load(precision="fp32", tiny_vae=TINY_VAE)
    drawn, _ = ShapesDataset(1, 128, held_out=True).batch(0, 3)
    latents = embedded.encode_image(drawn)
    assert min(psnr(*pair) for pair in zip(embedded.decode(latents), tiny.decode(latents), strict=True)) > 30
    assert tiny_vae_warning(tiny) is None
    assert TINY_VAE.stat().st_size < 1_000_000
