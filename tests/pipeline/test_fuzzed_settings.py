"""A short run of the fuzzer of settings; the long one is scripts/checks/fuzz_settings.py."""

import json
import random

from fuzz_settings import examine, fault_in
from settings_texts import json_lines, mutated, seeds


def test_sound_texts_are_read():
    assert {examine(text) for text in seeds()} == {"read"}
    assert len([*json_lines()]) > 15


def test_changed_texts_are_read_or_refused():
    pick, corpus = random.Random(3), [*seeds()]
    for _ in range(400):
        text = mutated(pick.choice(corpus), pick)
        fault, outcome = fault_in(text)
        assert fault is None, (fault, text)
        corpus += [text] if outcome == "read" else []


def test_a_fault_is_noticed():
    assert fault_in("x", lambda text: json.dumps({}, allow_nan=False)) == (None, "{}")
    assert fault_in("x", lambda text: 1 / 0)[0].startswith("ZeroDivisionError at test_fuzzed_settings.py:")
