"""What fuzzing checks on millions of adapters and cards, here on a few hundred; `adapter_fuzzing.py` has the rules."""

import random

import adapter_fuzzing
import pytest
from adapter_fuzzing import adapters, cards, examine, examine_card, mutated, mutated_card

from convert.errors import WeightMismatchError

ADAPTERS, CARDS = adapters(), cards()


def test_files_that_fuzzing_starts_from_are_read():
    outcomes = [examine(data) for data in ADAPTERS]
    assert (outcomes.count("adapter"), outcomes.count("embedding")) == (16, 10)
    assert [examine_card(data) for data in CARDS] == ["card", "card", "card", "card", "picture"]


@pytest.mark.parametrize("seed", range(4))
def test_changed_adapters_are_read_or_refused_in_a_sentence(seed):
    pick = random.Random(seed)
    outcomes = [examine(mutated(pick.choice(ADAPTERS), pick)) for _ in range(80)]
    assert 5 < outcomes.count("refused") < 78  # neither always the door nor nothing changed


@pytest.mark.parametrize("seed", range(2))
def test_changed_cards_are_read_or_refused_in_a_sentence(seed):
    pick = random.Random(seed)
    outcomes = [examine_card(mutated_card(pick.choice(CARDS), pick)) for _ in range(100)]
    assert min(outcomes.count(each) for each in ("card", "picture", "refused")) > 5


def test_the_examination_notices_an_error_let_through_and_one_that_cannot_be_shown(monkeypatch):
    def fails(*_):
        raise KeyError("let through")

    monkeypatch.setattr(adapter_fuzzing, "read_adapter", fails)
    with pytest.raises(KeyError):
        examine(ADAPTERS[0])

    def unescaped(*_):
        raise WeightMismatchError("holds \x1b[31m")

    monkeypatch.setattr(adapter_fuzzing, "read_adapter", unescaped)
    with pytest.raises(AssertionError):
        examine(ADAPTERS[0])
