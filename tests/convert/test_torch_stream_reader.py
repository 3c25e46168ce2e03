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


def stream_refused(tmp_path, kind, *parts, value=None, **options):
    value = dict_of(w=tensor(storage())) if value is None else value
    refused_bytes(tmp_path, stream(value, **options), kind, *parts)


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
    refused_bytes(tmp_path, whole + bomb, CorruptFileError, "after its last storage")
    assert not marker.exists()


def test_a_network_of_the_authors_own_class_is_refused(tmp_path):
    module = tuple_of(text("module"), name("__main__", "Net"), text("net.py"), text("class Net: ...")) + b"Q"
    stream_refused(tmp_path, UnsafeFileError, "whole pickled network", value=dict_of(w=module))


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


def test_bytes_after_the_last_storage_are_refused(tmp_path):
    stream_refused(tmp_path, CorruptFileError, "has 1 byte after its last storage", after=b"\0")


def test_two_lengths_of_a_storage_are_refused(tmp_path):
    stream_refused(tmp_path, UnsafeFileError, "two lengths: 4 in its pickle, 3 before", blocks=((3, FOUR_FLOATS),))


def test_a_storage_of_two_counts_or_types_is_refused(tmp_path):
    counts = dict_of(w=tensor(storage()), v=tensor(storage(count=3), size=(1,)))
    stream_refused(tmp_path, UnsafeFileError, "claims 12 bytes for storage 7, which has 16", value=counts)
    types = dict_of(w=tensor(storage()), v=tensor(storage(kind="IntStorage")))
    stream_refused(tmp_path, UnsafeFileError, "gives storage 7 two types", value=types)


@pytest.mark.parametrize("count", [-1, 2**61, 2**63, 2**80])
def test_a_count_out_of_range_is_refused(tmp_path, count):
    value = dict_of(w=tensor(storage(count=count), size=(0,)))
    stream_refused(tmp_path, UnsafeFileError, "out of range", value=value)


def test_an_announced_size_beyond_the_file_costs_nothing(tmp_path):
    value = dict_of(w=tensor(storage(count=2**50), size=(1,)))
    stream_refused(tmp_path, CorruptFileError, "ends after", value=value, blocks=((2**50, b""),))


def test_the_list_of_storages_must_be_that_of_the_pickle(tmp_path):
    stream_refused(tmp_path, UnsafeFileError, "storage 7, which is not in its list", keys=(), blocks=())
    more = {"keys": ("7", "8"), "blocks": ((4, FOUR_FLOATS), (4, FOUR_FLOATS))}
    stream_refused(tmp_path, UnsafeFileError, "1 storages that its pickle does not refer to, first 8", **more)
    twice = {"keys": ("7", "7"), "blocks": ((4, FOUR_FLOATS), (4, FOUR_FLOATS))}
    stream_refused(tmp_path, UnsafeFileError, "a storage twice", **twice)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (tuple_of(text("8"), number(3), number(2)), "claims elements 3 to 5 of storage 7, which has 4"),
        (tuple_of(text("8"), number(-1), number(2)), "claims elements -1 to 1"),
        (tuple_of(text("8"), number(1)), "not a key and two numbers"),
        (tuple_of(number(8), number(0), number(2)), "not a key and two numbers"),
        (text("8"), "not a key and two numbers"),
    ],
)
def test_a_view_outside_its_storage_is_refused(tmp_path, view, words):
    value = dict_of(w=tensor(storage(view=view), size=(1,)))
    stream_refused(tmp_path, UnsafeFileError, words, value=value)


def test_a_tensor_outside_its_view_is_refused(tmp_path):
    view = tuple_of(text("8"), number(1), number(2))
    value = dict_of(w=tensor(storage(view=view), size=(3,)))
    stream_refused(tmp_path, UnsafeFileError, "claims 12 bytes of storage 7, which has 8", value=value)


def test_two_views_of_one_name_are_refused(tmp_path):
    first, second = (tuple_of(text("8"), number(start), number(2)) for start in (0, 1))
    value = dict_of(w=tensor(storage(view=first), size=(1,)), v=tensor(storage(view=second), size=(1,)))
    stream_refused(tmp_path, UnsafeFileError, "two different views by the name '8'", value=value)


def test_the_preamble_is_checked(tmp_path):
    stream_refused(tmp_path, UnsupportedFileError, "of version 1000; 1001 is read", version=pickled(number(1000)))
    stream_refused(tmp_path, UnsafeFileError, "does not say which version", machine=pickled(b"N"))
    odd = pickled(dict_of(protocol_version=number(1001), little_endian=text("yes")))
    stream_refused(tmp_path, UnsafeFileError, "unknown byte order", machine=odd)
    stored = pickled(dict_of(w=storage()))
    stream_refused(tmp_path, UnsafeFileError, "persistent id", machine=stored)


def test_persistent_ids_of_the_zip_format_are_refused(tmp_path):
    five = tuple_of(text("storage"), name("torch", "FloatStorage"), text("7"), text("cpu"), number(4)) + b"Q"
    stream_refused(tmp_path, UnsafeFileError, "not a storage of six fields", value=dict_of(w=tensor(five)))


def test_a_stream_named_safetensors_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(stream(dict_of(w=tensor(storage()))))
    refused(path, UnsupportedFileError, "is named .safetensors, but is a pickle checkpoint")
