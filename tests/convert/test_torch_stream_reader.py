"""The stream format that torch wrote before 1.6: every value as torch reads it, and every lie found out."""

import io
import pickle
from contextlib import suppress

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

from convert.errors import CorruptFileError, UnsafeFileError, UnsupportedFileError
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


def test_old_opcodes_that_make_objects_stay_hostile(tmp_path):
    for made in (b"(" + text("x") + b"iposix\nsystem\n", b"(" + name("posix", "system") + text("x") + b"o"):
        refused_bytes(tmp_path, stream(dict_of(w=tensor(storage()), x=made)), UnsafeFileError, "Nothing in it was run")


def test_a_cut_file_says_how_much_of_it_there_is(tmp_path):
    content = saved(tmp_path, {"w": torch.ones(25_000)}).read_bytes()
    refused_bytes(tmp_path, content[:60_000], CorruptFileError, "ends after 60 kB of the 100 kB", "download it again")


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 40])
def test_flipped_bytes_and_holes_of_zeros_are_damage_or_change_only_values(tmp_path, length):
    content = stream(dict_of(**{"a.weight": tensor(storage()), "step": number(70000)}))
    path = tmp_path / "model.ckpt"
    for position in range(len(MAGIC), len(content) - 16):
        hole, whole = bytes(length), content[position : position + length]
        for damage in (hole, *(bytes(byte ^ 1 << bit for byte in whole) for bit in range(8))):
            path.write_bytes((content[:position] + damage + content[position + length :])[: len(content)])
            with suppress(CorruptFileError, UnsupportedFileError), open_checkpoint(path) as file:
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
    (SOUND, {"blocks": ((3, FOUR_FLOATS),)}, CorruptFileError, "two lengths: 4 in its pickle, 3 before"),
    (
        dict_of(w=tensor(storage()), v=tensor(storage(count=3), size=(1,))),
        {},
        CorruptFileError,
        "claims 12 bytes for storage 7, which has 16",
    ),
    (dict_of(w=tensor(storage()), v=tensor(storage(kind="IntStorage"))), {}, CorruptFileError, "storage 7 two types"),
    *(
        (dict_of(w=tensor(storage(count=count), size=(0,))), {}, CorruptFileError, "out of range")
        for count in (-1, 2**61, 2**63, 2**80)
    ),
    (dict_of(w=tensor(storage(count=2**50), size=(1,))), {"blocks": ((2**50, b""),)}, CorruptFileError, "ends after"),
    (SOUND, {"keys": (), "blocks": ()}, CorruptFileError, "storage 7, which is not in its list"),
    (SOUND, {"keys": "78", "blocks": TWO_BLOCKS}, CorruptFileError, "1 storages that its pickle does not refer to, "),
    (SOUND, {"keys": "77", "blocks": TWO_BLOCKS}, CorruptFileError, "a storage twice"),
    (dict_of(w=window(3, 2)), {}, CorruptFileError, "claims elements 3 to 5 of storage 7, which has 4"),
    (dict_of(w=window(-1, 2)), {}, CorruptFileError, "claims elements -1 to 1"),
    (dict_of(w=viewed(text("8"), number(1))), {}, CorruptFileError, "not a key and two numbers"),
    (dict_of(w=viewed(number(8), number(0), number(2))), {}, CorruptFileError, "not a key and two numbers"),
    (dict_of(w=tensor(storage(view=text("8")))), {}, CorruptFileError, "not a key and two numbers"),
    (dict_of(w=window(1, 2, size=(3,))), {}, CorruptFileError, "claims 12 bytes of storage 7, which has 8"),
    (dict_of(w=window(0, 2), v=window(1, 2)), {}, CorruptFileError, "two different views by the name '8'"),
    (SOUND, {"version": pickled(number(1000))}, UnsupportedFileError, "of version 1000; 1001 is read"),
    (SOUND, {"machine": pickled(b"N")}, CorruptFileError, "does not say which version"),
    (
        SOUND,
        {"machine": pickled(dict_of(protocol_version=number(1001), little_endian=text("yes")))},
        CorruptFileError,
        "unknown byte order",
    ),
    (SOUND, {"machine": pickled(dict_of(w=storage()))}, CorruptFileError, "persistent id"),
    (dict_of(w=tensor(FIVE_FIELDS)), {}, CorruptFileError, "not a storage of six fields"),
    (dict_of(w=NETWORK), {}, UnsafeFileError, "whole pickled network"),
]


@pytest.mark.parametrize(("value", "options", "kind", "words"), FAULTS, ids=range(len(FAULTS)))
def test_faults_are_refused_by_name(tmp_path, value, options, kind, words):
    refused_bytes(tmp_path, stream(value, **options), kind, words)


def test_a_stream_named_safetensors_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(stream(dict_of(w=tensor(storage()))))
    refused(path, UnsupportedFileError, "is named .safetensors, but is a pickle checkpoint")
