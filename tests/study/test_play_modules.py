"""The JavaScript of `sd play`, run by Node.js, gives what Python gives."""

import json
import math
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tokenizer_strings
import torch

from sd.config import SD_V1
from sd.pipeline.latent_diffusion import table_and_steps
from sd.pipeline.settings import Settings
from sd.sampling.noise import cpu_source
from sd.sampling.samplers import find_sampler
from sd.sampling.schedule import alpha_bar_at, alphas_cumprod
from sd.text.chunks import chunks_of
from sd.text.prompt_syntax import PromptError
from sd.text.tokenizer import MERGES_FILE, Tokenizer

NODE = shutil.which("node")
ROOT = Path(__file__).parents[2]
SAMPLERS = ("ddim", "euler", "dpmpp_2m")
SCHEDULE = {"timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
CASES = [(sampler, steps) for sampler in SAMPLERS for steps in (1, 2, 10, 30)]

pytestmark = pytest.mark.skipif(NODE is None, reason="needs Node.js, to run the modules of the page")


def in_node(room, **given):
    arguments = [NODE, ROOT / "tests/study/play_in_node.mjs", ROOT / "sd/study/play/web", MERGES_FILE]
    result = subprocess.run(
        arguments, input=json.dumps({"room": room, **given}).encode(), capture_output=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr.decode()
    return json.loads(result.stdout)


def settings(sampler, steps):
    return Settings(prompt="", width=128, height=128, seed=0, sampler=sampler, steps=steps)


def test_the_tokenizer_equals_pythons_on_what_people_type():
    """Not equal: rare HTML entities, text decoded with the wrong character set, and letters new in Unicode."""
    other = {"mojibake", "entities", "control", "special", "unicode"}
    texts = [text for kind, texts in tokenizer_strings.HAND_PICKED.items() if kind not in other for text in texts]
    texts += [
        "black &amp; white",
        "&lt;b&gt;bold&lt;/b&gt;",
        "it&#39;s &#x27;t",
        "caf&eacute;",
        "<b>bold</b> &amp; more",
    ]
    texts += [text for text in tokenizer_strings.HAND_PICKED["control"] if "\x85" not in text and "\x80" not in text]
    rng, kinds = random.Random(0), ("prompt", "punctuation", "digits", "long_word")
    texts += [getattr(tokenizer_strings, kind)(rng) for kind in kinds for _ in range(75)]
    assert len(texts) > 350
    tokenizer = Tokenizer()
    for text, found in zip(texts, in_node("tokens", texts=texts), strict=True):
        assert found["ids"] == tokenizer.encode(text), text
        assert found["texts"] == [piece for _, piece in tokenizer.pieces(text)], text


def test_weights_and_long_prompts_are_read_as_in_python():
    texts = [
        "",
        "a red circle",
        "a (red:1.3) (circle)",
        "((a)) [b] (c:-0.5) (d:.5",
        r"\(old\) \[x\] a\\b a\:b",
        "a [b) c] (d",
    ]
    texts += ["a BREAK b", "BREAK", "a BREAK", "aBREAKb BREAK", "(a BREAK b:1.2) c", "x:1.2) (y: 2 ) (z:nan)", "(a:11)"]
    texts += ["(big:inf)", "a, " * 60, "word " * 200, "a " * 70 + ", " + "b " * 30, "a " * 75 + ", b"]
    tokenizer = Tokenizer()
    for text, found in zip(texts, in_node("rows", texts=texts), strict=True):
        try:
            chunks = chunks_of(text, tokenizer)
        except PromptError:
            assert "weights are" in found["error"], text
            continue
        assert [tuple(row["ids"]) for row in found["rows"]] == [chunk.ids for chunk in chunks], text
        for row, chunk in zip(found["rows"], chunks, strict=True):
            assert row["weights"] == pytest.approx(chunk.weights, rel=1e-15), text
        assert found["strip"]["chunks"] == len(chunks)
        assert [token["id"] for token in found["strip"]["tokens"]] == [id for each in chunks for id, _ in each.tokens]


def test_a_seed_gives_the_noise_that_pytorch_draws():
    seeds, counts = [0, 1, 42, 2**31, 2**32 + 7, 2**53 - 1], [1024, 1024, 16, 17, 31, 100]
    for seed, found in zip(seeds, in_node("noise", seeds=seeds, counts=counts), strict=True):
        draw = cpu_source(seed)
        for count, values in zip(counts, found, strict=True):
            torch.testing.assert_close(torch.tensor(values), draw([count]), rtol=0, atol=2e-6)


def test_the_schedule_is_pythons():
    found = in_node("steps", schedule=SCHEDULE, cases=CASES)
    table = alphas_cumprod(SD_V1.schedule)
    assert torch.tensor(found["table"], dtype=torch.float64).float().equal(table)
    places = torch.tensor([0, 0.25, 499.5, 998.75, 999], dtype=torch.float64)
    assert found["between"] == pytest.approx(alpha_bar_at(table, places).tolist(), rel=1e-9)
    for (sampler, count), steps in zip(CASES, found["steps"], strict=True):
        _, expected = table_and_steps(SD_V1.schedule, settings(sampler, count))
        assert len(steps) == len(expected) == count
        for step, (timestep, alpha_bar, alpha_bar_prev) in zip(steps, expected, strict=True):
            assert step["timestep"] == pytest.approx(timestep.item(), abs=1e-4), (sampler, count)
            assert step["alphaBar"] == pytest.approx(alpha_bar.item(), rel=1e-9)
            assert step["alphaBarNext"] == pytest.approx(alpha_bar_prev.item(), rel=1e-9)


def test_each_sampler_takes_pythons_steps():
    generator = torch.Generator().manual_seed(3)
    x, target = torch.randn(2, 1, 4, 4, 4, generator=generator)

    def made_up_denoiser(x_t, alpha_bar):
        return x_t.sin() * math.sqrt(1 - alpha_bar) + 0.3 * target * math.sqrt(alpha_bar)

    given = {"x": x.flatten().tolist(), "target": target.flatten().tolist()}
    for (sampler, count), found in zip(CASES, in_node("samples", schedule=SCHEDULE, cases=CASES, **given), strict=True):
        _, steps = table_and_steps(SD_V1.schedule, settings(sampler, count))
        expected = list(find_sampler(sampler)(made_up_denoiser, x, steps, draw_noise=None))
        assert len(found) == len(expected) == count
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours).reshape(x.shape), theirs, rtol=2e-6, atol=2e-6)


def test_the_engine_mixes_branches_paints_and_keeps_what_a_mask_keeps():
    found = in_node("engine", schedule=SCHEDULE)
    near = {name: np.array(values) for name, values in found.items() if name != "problems"}

    def same(one, other):
        return np.allclose(near[one], near[other], atol=1e-5)

    assert same("first", "plain")
    assert same("second", "other")
    assert same("arc", "other")
    assert not same("plain", "other")
    assert same("branch", "whole")
    assert not same("painted", "plain")
    assert found["unchanged"] == found["latents"]
    assert found["batches"] == [2]
    assert found["single"] == [1, 3, 3]  # without guidance, one row; half of six steps
    assert near["sums"] == pytest.approx(np.ones(256), abs=1e-5)
    kept, latents = (near[name].reshape(4, 16, 16) for name in ("kept", "latents"))
    assert kept[:, 8:] == pytest.approx(latents[:, 8:], abs=1e-4)
    assert np.abs(kept[:, :8] - latents[:, :8]).max() > 0.1
    expected = ["A mask needs a picture", "needs latents", "ddim", "1 to 1000", "timestep 600", "weights are", "not 3"]
    for problem, words in zip(found["problems"], expected, strict=True):
        assert words in problem
