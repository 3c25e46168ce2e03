"""What fuzzing checks on millions of pictures, here on a few hundred; `picture_fuzzing.py` has the rules."""

import random

import picture_fuzzing
import pytest
from picture_fuzzing import examine, mutated, seeds
from PIL import Image

SEEDS = seeds()


def test_most_pictures_that_fuzzing_starts_from_are_read():
    outcomes = [examine(data) for data in SEEDS]
    assert outcomes.count("refused") <= 8  # several frames, LAB
    assert {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "picture"} <= set(outcomes)


@pytest.mark.parametrize("seed", range(8))
def test_changed_pictures_are_read_or_refused_in_a_sentence(seed):
    pick = random.Random(seed)
    outcomes = [examine(mutated(pick.choice(SEEDS), pick)) for _ in range(60)]
    assert 5 < outcomes.count("refused") < 58  # neither always the door nor nothing changed


def test_the_examination_notices_an_error_let_through(monkeypatch):
    def fails(*_, **__):
        raise KeyError("let through")

    monkeypatch.setattr(picture_fuzzing, "read_rgba", fails)
    with pytest.raises(KeyError):
        examine(SEEDS[0])
    monkeypatch.setattr(picture_fuzzing, "read_rgba", lambda *_, **__: Image.new("L", (8, 8)))
    with pytest.raises(AssertionError):
        examine(SEEDS[0])
