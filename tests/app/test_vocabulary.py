"""The embedded model says which words of a prompt it was never trained on."""

from random import Random

import pytest

from sd.app.jobs.vocabulary import WORD, unknown_words
from sd.training.shapes.captions import caption, plain_caption, vocabulary
from sd.training.shapes.scenes import KINDS, sample_scene


def test_the_vocabulary_is_that_of_the_captions():
    scenes = [sample_scene(Random(number), kind=KINDS[-1]) for number in range(6000)]
    captions = [caption(scene, Random(number)) for number, scene in enumerate(scenes)]
    assert {word for text in captions for word in WORD.findall(text)} == vocabulary()
    assert not unknown_words([plain_caption(scene) for scene in scenes[:100]], vocabulary())


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a photograph of an astronaut", ["photograph", "astronaut"]),
        ("A Red CIRCLE, on the (blue:1.3) background BREAK [star:heart:0.5]", []),
        ("this is a small square with 2 dots!", []),
        ("circles and a red-blue ring", ["circles"]),
        ("a red circle, masterpiece, 8k", ["masterpiece", "8k"]),
        ("猫", ["猫"]),
        ("a 🐱 on a “red” background…", ["🐱"]),
        ("cat cat CAT cat's", ["cat"]),
        ("it's a ring inside the star’s square", []),
        ("", []),
        ("(((", []),
    ],
)
def test_words_outside_it_are_found_once_each(prompt, unknown):
    assert unknown_words([prompt], vocabulary()) == unknown


SMALL = ["-W", 64, "-H", 64, "--steps", 1, "-s", 1]


@pytest.mark.slow
def test_only_the_embedded_model_says_so_once_and_not_of_negative_prompts(run, tiny_ckpt, tmp_path):
    (tmp_path / "jobs.txt").write_text("an astronaut\na red circle\na horse\nan astronaut")
    code, _, err = run("txt2img", "--from-file", "jobs.txt", *SMALL, "-n", "blurry", "-q")
    assert code == 0
    assert err == (
        "sd: the embedded model does not know: astronaut, horse. It knows circle, square, triangle, star, heart, "
        "diamond, cross, ring, in red, orange, yellow, green, blue, purple, white, black; -m FILE for anything else.\n"
    )
    many = " ".join(f"word{number}" for number in range(10))
    assert "word7 and 2 other words." in run("txt2img", many, *SMALL, "-q")[2]
    assert run("txt2img", "a red circle", *SMALL, "-n", "blurry", "-q")[2] == ""
    assert run("txt2img", "an astronaut", *SMALL, "-q", "-m", tiny_ckpt)[2] == ""
