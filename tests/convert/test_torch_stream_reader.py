"""The stream format that torch wrote before 1.6: every value as torch reads it, and every lie found out."""

import io
import pickle

import pytest
import torch
from hostile import (
    FOUR_FLOATS,
    HOOKS,
    MACHINE,
    MAGIC,
    VERSION,
    call,
    dict_of,
    leaves,
    list_of,
    name,
    number,
    pickled,
    refused,
    refused_bytes,
    stream,
    text,
    touch,
    tuple_of,
)
from hostile import stream_storage as storage
from test_reader import assert_same

from convert.errors import CheckpointError, CorruptFileError, UnsafeFileError, UnsupportedFileError
from convert.files.reader import open_checkpoint
from convert.files.records import TensorRecord


def saved(tmp_path, value, protocol=2):
    path = tmp_path / "model.ckpt"
    torch.save(value, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    return path


def tensor(source, offset=0, size=(4,), stride=(1,)):
    numbers = [tuple_of(*map(number, values)) for values in (size, stride)]
    return call("torch._utils", "_rebuild_tensor_v2", source, number(offset), *numbers, b"\x89", HOOKS)


def test_many_storages_lie_in_the_order_of_their_list(tmp_path):
    tensors = {str(index): torch.randn(index % 5, 3) for index in range(300)}
    with open_checkpoint(saved(tmp_path, tensors)) as file:
        for key, expected in tensors.items():
            assert_same(file, file.root[key], expected)


def read_both(tmp_path, content):
    """The tensor `w` of a file as torch reads it, and as we do."""
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    theirs = torch.load(io.BytesIO(content), weights_only=True)["w"]
    with open_checkpoint(path) as file:
        assert_same(file, file.root["w"], theirs)
    return theirs


def test_a_view_of_a_storage_is_read_as_torch_reads_it(tmp_path):
    """Torch before 0.4 wrote parts of storages like this."""
    view = tuple_of(text("8"), number(1), number(2))
    value = dict_of(whole=tensor(storage()), w=tensor(storage(view=view), offset=1, size=(1,)))
    assert read_both(tmp_path, stream(value)).tolist() == [3.0]


@pytest.mark.parametrize("flag", [b"\x88", b"\x89"])
def test_storages_are_little_endian_whatever_machine_wrote_them(tmp_path, flag):
    machine = pickled(dict_of(protocol_version=number(1001), little_endian=flag))
    value = read_both(tmp_path, stream(dict_of(w=tensor(storage())), machine=machine))
    assert value.tolist() == [1, 2, 3, 4]


def test_code_never_runs_in_any_of_the_five_pickles(tmp_path):
    marker = tmp_path / "marker"
    whole = saved(tmp_path, {"w": torch.ones(4)}).read_bytes()
    bomb = pickle.dumps(touch(marker), 2)
    beside = pickle.dumps({"w": 1, "beside": touch(marker)}, 2)
    assert marker.exists() is False
    for content in (
        MAGIC + bomb,
        MAGIC + VERSION + bomb,
        MAGIC + VERSION + MACHINE + bomb + whole[-100:],
        MAGIC + VERSION + MACHINE + beside + pickled(list_of()),
        MAGIC + VERSION + MACHINE + pickled(dict_of(w=tensor(storage()))) + bomb,
    ):
        refused_bytes(tmp_path, content, UnsafeFileError, "names code", "system")
    refused_bytes(tmp_path, whole + bomb, UnsafeFileError, "a pickle behind its end")
    assert not marker.exists()


def test_bytes_behind_the_last_storage_are_passed_over_and_told(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(4)})
    path.write_bytes(path.read_bytes() + bytes(9))
    with open_checkpoint(path) as file:
        assert_same(file, file.root["w"], torch.ones(4))
        assert file.passed_over == ("9 bytes behind the end",)


def test_cuts_anywhere_are_refused(tmp_path):
    content = stream(dict_of(w=tensor(storage())))
    for length in range(1, len(content)):
        error = refused_bytes(tmp_path, content[:length], CorruptFileError)
        assert "ends after" in str(error) or "incomplete" in str(error)


def test_a_cut_file_says_how_much_of_it_there_is(tmp_path):
    content = saved(tmp_path, {"w": torch.ones(25_000)}).read_bytes()
    refused_bytes(tmp_path, content[:60_000], CorruptFileError, "ends after 60 kB of the 100 kB", "download it again")


def test_flipped_bits_are_refused_or_change_only_values(tmp_path):
    content = stream(dict_of(w=tensor(storage())))
    path = tmp_path / "model.ckpt"
    for position in range(len(content) - 16):
        for bit in (0, 3, 7):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                file = open_checkpoint(path)
            except CheckpointError:
                continue
            with file:
                for record in leaves(file.root, TensorRecord):
                    assert record.storage.offset + record.storage.nbytes <= len(content)
                    assert len(file.storage_bytes(record)) == record.storage.nbytes


SOUND = dict_of(w=tensor(storage()))
TWO_BLOCKS = ((4, FOUR_FLOATS), (4, FOUR_FLOATS))
NETWORK = tuple_of(text("module"), name("__main__", "Net"), text("net.py"), text("class Net: ...")) + b"Q"
FIVE_FIELDS = tuple_of(text("storage"), name("torch", "FloatStorage"), text("7"), text("cpu"), number(4)) + b"Q"


def viewed(*parts, size=(1,)):
    """A tensor over a part of storage 7."""
    return tensor(storage(view=tuple_of(*parts)), size=size)


def window(start, count, size=(1,)):
    return viewed(text("8"), number(start), number(count), size=size)


FAULTS = [  # the object, other parts of the file, what is said
    (SOUND, {"blocks": ((3, FOUR_FLOATS),)}, UnsafeFileError, "two lengths: 4 in its pickle, 3 before"),
    (
        dict_of(w=tensor(storage()), v=tensor(storage(count=3), size=(1,))),
        {},
        UnsafeFileError,
        "claims 12 bytes for storage 7, which has 16",
    ),
    (dict_of(w=tensor(storage()), v=tensor(storage(kind="IntStorage"))), {}, UnsafeFileError, "storage 7 two types"),
    *(
        (dict_of(w=tensor(storage(count=count), size=(0,))), {}, UnsafeFileError, "out of range")
        for count in (-1, 2**61, 2**63, 2**80)
    ),
    (dict_of(w=tensor(storage(count=2**50), size=(1,))), {"blocks": ((2**50, b""),)}, CorruptFileError, "ends after"),
    (SOUND, {"keys": (), "blocks": ()}, UnsafeFileError, "storage 7, which is not in its list"),
    (SOUND, {"keys": "78", "blocks": TWO_BLOCKS}, UnsafeFileError, "1 storages that its pickle does not refer to, "),
    (SOUND, {"keys": "77", "blocks": TWO_BLOCKS}, UnsafeFileError, "a storage twice"),
    (dict_of(w=window(3, 2)), {}, UnsafeFileError, "claims elements 3 to 5 of storage 7, which has 4"),
    (dict_of(w=window(-1, 2)), {}, UnsafeFileError, "claims elements -1 to 1"),
    (dict_of(w=viewed(text("8"), number(1))), {}, UnsafeFileError, "not a key and two numbers"),
    (dict_of(w=viewed(number(8), number(0), number(2))), {}, UnsafeFileError, "not a key and two numbers"),
    (dict_of(w=tensor(storage(view=text("8")))), {}, UnsafeFileError, "not a key and two numbers"),
    (dict_of(w=window(1, 2, size=(3,))), {}, UnsafeFileError, "claims 12 bytes of storage 7, which has 8"),
    (dict_of(w=window(0, 2), v=window(1, 2)), {}, UnsafeFileError, "two different views by the name '8'"),
    (SOUND, {"version": pickled(number(1000))}, UnsupportedFileError, "of version 1000; 1001 is read"),
    (SOUND, {"machine": pickled(b"N")}, UnsafeFileError, "does not say which version"),
    (
        SOUND,
        {"machine": pickled(dict_of(protocol_version=number(1001), little_endian=text("yes")))},
        UnsafeFileError,
        "unknown byte order",
    ),
    (SOUND, {"machine": pickled(dict_of(w=storage()))}, UnsafeFileError, "persistent id"),
    (dict_of(w=tensor(FIVE_FIELDS)), {}, UnsafeFileError, "not a storage of six fields"),
    (dict_of(w=NETWORK), {}, UnsafeFileError, "whole pickled network"),
]


@pytest.mark.parametrize(("value", "options", "kind", "words"), FAULTS, ids=range(len(FAULTS)))
def test_faults_are_refused_by_name(tmp_path, value, options, kind, words):
    refused_bytes(tmp_path, stream(value, **options), kind, words)


def test_a_stream_named_safetensors_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(stream(dict_of(w=tensor(storage()))))
    refused(path, UnsupportedFileError, "is named .safetensors, but is a pickle checkpoint")
