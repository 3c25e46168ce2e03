"""What fuzzing checks on millions of files, here on a few hundred; and that it would notice a fault.

`examination.py` has the rules, `mutation.py` the files. `scripts/checks/fuzz_readers.py` is the long run.
"""

import os
import random
import subprocess
from dataclasses import replace

import examination
import mutation
import pytest
from examination import StandIn, Unpickler, assert_inside, assert_same, examine, open_in_memory, watched
from hostile import checkpoint_records, dict_of, name, number, pickled, stream, stream_storage, tensor, text, write_zip
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from convert.errors import CheckpointError, UnsafeFileError, shown
from convert.files.records import GlobalName, StorageRecord, TensorRecord

SEEDS = mutation.seeds()
HEADS = [b"", b"PK\3\4", b"\x80\4", mutation.MAGIC, b"\x10" + bytes(7) + b"{", b"<"]
PHASES = [Phase.explicit, Phase.generate, Phase.shrink]  # explaining traces, which is seen as an event
STORAGE = StorageRecord("0", 100, 16, "little", None)


@pytest.mark.parametrize("index", range(len(SEEDS)))
def test_files_that_fuzzing_starts_from_are_read(index):
    data = SEEDS[index]
    kind = mutation.kind_of(data)
    assert examine(data) == (f"torch {kind}" if kind in ("zip", "stream") else kind)


@settings(max_examples=1200, phases=PHASES)
@given(st.sampled_from(SEEDS), st.integers(0, 2**32))
def test_changed_files_keep_the_rules(data, seed):
    examine(mutation.mutated(data, random.Random(seed)))


@settings(max_examples=600, phases=PHASES)
@given(st.sampled_from(HEADS), st.binary(max_size=200))
def test_random_bytes_keep_the_rules(head, data):
    assert examine(head + data) in ("pickle", "refused")


@settings(max_examples=300, phases=PHASES)
@given(st.lists(st.sampled_from(mutation.PIECES), max_size=60))
def test_random_opcodes_keep_the_rules(pieces):
    assert examine(b"\x80\2" + b"".join(pieces) + b".") in ("pickle", "refused")


def test_changed_files_are_still_accepted_often_enough_to_test_more_than_the_door():
    pick = random.Random(0)
    outcomes = [examine(mutation.mutated(pick.choice(SEEDS), pick)) for _ in range(300)]
    for kind in ("torch zip", "torch stream", "pickle"):
        assert outcomes.count(kind) >= 2, kind
    assert 60 < outcomes.count("refused") < 290


# The examination notices faults


@pytest.mark.parametrize(
    ("dtype", "shape", "stride", "offset", "storage"),
    [
        ("float32", (5,), (1,), 0, {}),
        ("float32", (2, 2), (3, 1), 0, {}),
        ("float32", (1,), (1,), 4, {}),
        ("float32", (1,), (-1,), 0, {}),
        ("float64", (4,), (1,), 0, {}),
        ("float32", (4,), (1,), 0, {"offset": 101}),
        ("float32", (4,), (1,), 0, {"offset": -4}),
        ("float32", (4,), (1,), 0, {"deflated": 17}),
    ],
)
def test_a_weight_outside_its_file_would_be_noticed(dtype, shape, stride, offset, storage):
    assert_inside(TensorRecord("float32", (2, 2), (2, 1), STORAGE, 0), 116)
    with pytest.raises(AssertionError):
        assert_inside(TensorRecord(dtype, shape, stride, replace(STORAGE, **storage), offset), 116)


@pytest.mark.parametrize(
    "act",
    [
        lambda: __import__("antigravity_that_is_nowhere"),
        lambda: compile("1", "x", "eval"),
        lambda: eval("1"),
        lambda: open(os.devnull).close(),
        lambda: os.system("true"),
        lambda: subprocess.run(["true"], check=False),
        lambda: os.listdir("."),
    ],
)
def test_whatever_is_run_or_opened_while_reading_would_be_noticed(act):
    def noticed():
        with watched():
            try:
                act()
            except ImportError:
                return

    with pytest.raises(AssertionError, match="reading a file caused"):
        noticed()
    with watched():
        open_in_memory(SEEDS[2]).close()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 1, "b": 1}),
        ([1, [2]], [1, [3]]),
        ([1], (1,)),
        ([1], [1.0]),
        ([True], [1]),
        ("a", b"a"),
    ],
)
def test_data_that_python_reads_otherwise_would_be_noticed(ours, theirs):
    assert_same(ours, ours)
    with pytest.raises(AssertionError):
        assert_same(ours, theirs)


def test_a_tensor_that_python_reads_otherwise_would_be_noticed():
    contents = open_in_memory(write_zip(checkpoint_records(pickled(dict_of(w=tensor())))))
    for other in (tensor(stride=(1, 2)), tensor(size=(1, 2)), tensor(offset=1)):
        with pytest.raises(AssertionError):
            examination.assert_same_pickle(contents.root, pickled(dict_of(w=other)))
        with pytest.raises(AssertionError):
            examination.assert_same_pickle(contents.root, stream(dict_of(w=other)), before=3)
    examination.assert_same_pickle(contents.root, pickled(dict_of(w=tensor())))
    examination.assert_same_pickle(contents.root, stream(dict_of(w=tensor())), before=3)


def test_the_unpickler_of_the_examination_finds_nothing_but_stand_ins():
    made = Unpickler(examination.io.BytesIO(pickled(mutation.call("os", "system", text("exit 1"))))).load()
    assert isinstance(made, StandIn)
    assert (made.module, made.name, made.args) == ("os", "system", ("exit 1",))
    assert_same(GlobalName("os", "system"), type(made))


def test_a_message_that_controls_the_terminal_would_be_noticed(monkeypatch):
    def unescaped(path, data):
        raise CheckpointError("has a name \x1b[31m")

    monkeypatch.setattr(examination, "read_contents", unescaped)
    with pytest.raises(AssertionError):
        examine(SEEDS[2])


# Found by reading the code for what random changes rarely build

BIG = number(2**2030)  # the longest number that LONG1 holds: 612 digits


@pytest.mark.parametrize(
    "data",
    [
        stream(dict_of(w=tensor(stream_storage(view=mutation.tuple_of(text("8"), BIG, BIG)))), keys=("7",)),
        stream(dict_of(w=tensor(stream_storage(count=2**2030)))),
        stream(dict_of(w=tensor(stream_storage())), version=pickled(BIG)),
        write_zip(checkpoint_records(pickled(dict_of(w=tensor(offset=2**2030))))),
        write_zip(checkpoint_records(pickled(dict_of(w=tensor(size=(2**2030,), stride=(2**2030,)))))),
        pickled(mutation.list_of(*[name("torch." + "m" * 249, "f" + "a" * 200 + str(index)) for index in range(12)])),
        pickled(mutation.list_of(*[name("\x1b" * 255, "\u202e" * 50 + str(index)) for index in range(12)])),
    ],
    ids=["view", "count", "version", "offset", "size", "long names", "names that are escaped"],
)
def test_refusals_of_the_longest_numbers_and_names_can_be_shown(data):
    assert examine(data) == "refused"


def test_wide_and_narrow_spaces_are_shown_as_what_they_are():
    assert shown("a\u2000b\u00a0c d") == "a\\u2000b\\xa0c d"
    with pytest.raises(UnsafeFileError, match=r"names code .*\\u2000"):
        open_in_memory(b"\x80\x04c\n\n(c\n\nX\x02\x00\x00\x00f8tR(\x8a\x00tc\n\xe2\x80\x80\n")
