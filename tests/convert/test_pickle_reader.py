"""The pickle machine: what it refuses, what it reads, what it costs."""

import argparse
import collections
import datetime
import functools
import importlib
import operator
import os
import pathlib
import pickle
import runpy
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hostile import (
    HOOKS,
    PROTO2,
    Payload,
    call,
    checkpoint,
    dict_of,
    frame,
    get,
    list_of,
    name,
    number,
    pickled,
    pretended,
    put,
    refused_bytes,
    refused_pickle,
    stack_name,
    storage,
    tensor,
    text,
    touch,
    touch_command,
    tuple_of,
)

import convert.files.limits
import convert.files.pickle_objects
import convert.files.pickle_reader
from convert.errors import CheckpointError, CorruptFileError, UnsafeFileError, UnsupportedFileError
from convert.files.pickle_reader import FORBIDDEN, OPCODES, read_pickle
from convert.files.records import GlobalName, Inert, StorageRecord


def find_storage(key: str, count: int, width: int) -> StorageRecord:
    return StorageRecord(key, 64, 16, "little", None)


def read(data: bytes):
    return read_pickle(data, find_storage)


def fails(data: bytes, kind: type[CheckpointError], *parts: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(data)
    assert type(caught.value) is kind, caught.value
    for part in parts:
        assert part in str(caught.value)
    return caught.value


# Code


OLD = {  # pickles of protocol 0 and 1
    "a function": (b"cos\nsystem\n(S'id'\ntR.", UnsafeFileError, "os.system"),
    "an instance": (b"(S'id'\nios\nsystem\n.", UnsafeFileError, "os.system"),
    "cut off": (b"(lp0\n(cos\nsystem\nI1\no", UnsafeFileError, "os.system"),
    "numbers": (pickle.dumps({"a": range(3)}, 0), UnsupportedFileError, "protocol 0 or 1"),
    "weights": (pickle.dumps([collections.OrderedDict(a=1)], 1), UnsupportedFileError, "protocol 0 or 1"),
}


@pytest.mark.parametrize("kind", OLD)
def test_an_old_pickle_is_dangerous_only_if_it_names_code(kind):
    fails(*OLD[kind])


def payloads(marker):
    code = f"open({str(marker)!r}, 'w')"
    return {
        "system": Payload(os.system, touch_command(marker)),
        "check_call": Payload(subprocess.check_call, ["touch", str(marker)]),
        "Popen": Payload(subprocess.Popen, ["touch", str(marker)]),
        "exec": Payload(exec, code),
        "eval": Payload(eval, code),
        "open": Payload(open, str(marker), "w"),
        "import": Payload(importlib.import_module, "antigravity"),
        "getattr": Payload(getattr, Payload(importlib.import_module, "os"), "system"),
        "copyfile": Payload(shutil.copyfile, __file__, str(marker)),
        "run_path": Payload(runpy.run_path, __file__),
        "partial": Payload(functools.partial, os.system, touch_command(marker)),
        "methodcaller": Payload(operator.methodcaller("system", touch_command(marker)), os.name),
        "touch": Payload(pathlib.Path.touch, pathlib.Path(marker)),
        "map": Payload(list, Payload(map, os.system, [touch_command(marker)])),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("payload", payloads(""))
def test_payloads_never_run_and_are_named(tmp_path, payload, protocol):
    marker = tmp_path / "marker"
    bomb = payloads(marker)[payload]
    data = pickle.dumps({"state_dict": {"weight": [1.0, {"deep": bomb}]}}, protocol)
    error = refused_pickle(tmp_path, data, UnsafeFileError, "Nothing in it was run", ".safetensors")
    assert not marker.exists()
    assert error.names
    # On the machine that writes it, os.system is posix.system, eval is builtins.eval, and so on.
    assert any(part in str(error) for part in ("names code", "forbidden pickle opcode", "calls something"))


def test_the_payloads_of_these_tests_do_run_elsewhere(tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(touch(marker)))
    assert marker.exists()


SYSTEM = name("posix", "system") + tuple_of(text("touch {marker}")) + b"R"
POSITIONS = {
    "as the whole file": SYSTEM,
    "as a dict value": dict_of(weight=tensor(), other=SYSTEM),
    "before the weights": dict_of(other=SYSTEM, weight=tensor()),
    "in a list": list_of(tensor(), SYSTEM),
    "as a storage": dict_of(weight=tensor(source=SYSTEM)),
    "as the hooks of a tensor": dict_of(weight=tensor(hooks=SYSTEM)),
    "as the metadata of a tensor": dict_of(weight=tensor(extra=SYSTEM)),
    "as a parameter": call("torch._utils", "_rebuild_parameter", SYSTEM, b"\x89", HOOKS),
    "in the pairs of an OrderedDict": call("collections", "OrderedDict", list_of(list_of(text("a"), SYSTEM))),
    "in the state of an OrderedDict": HOOKS + dict_of(_metadata=SYSTEM) + b"b",
    "in the state of a placeholder": call("lightning", "Callback") + dict_of(x=SYSTEM) + b"b",
    "as an argument of a placeholder": call("lightning", "Callback", SYSTEM),
    "as a numpy dtype": call("numpy", "dtype", SYSTEM),
    "as a number of numpy": call("numpy.core.multiarray", "scalar", SYSTEM, SYSTEM),
    "as encoded text": call("_codecs", "encode", SYSTEM, text("latin1")),
    "as an argument of a persistent id": tuple_of(text("storage"), SYSTEM, text("0"), text("cpu"), number(4)) + b"Q",
    "as a key": b"}" + SYSTEM + number(1) + b"s",
    "in a set": b"\x8f(" + SYSTEM + b"\x90",
    "in a frozen set": b"(" + SYSTEM + b"\x91",
    "by NEWOBJ": name("posix", "system") + tuple_of(text("touch {marker}")) + b"\x81",
    "by a name from the stack": stack_name("posix", "system") + tuple_of(text("touch {marker}")) + b"R",
    "mentioned but never called": dict_of(weight=tensor(), function=name("posix", "system")),
    "in a memo that is used later": SYSTEM.join([b"](", put(0) + b"e"]) + get(0) + b"\x86",
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("position", POSITIONS)
def test_code_is_named_wherever_it_stands(tmp_path, position, protocol):
    marker = tmp_path / "marker"
    data = pickled(POSITIONS[position].replace(b"{marker}", str(marker).encode()), protocol)
    # the length in front of the command no longer fits: write it again
    command = f"touch {marker}"
    data = data.replace(text("touch {marker}")[:5] + command.encode(), text(command))
    error = refused_pickle(tmp_path, data, UnsafeFileError, "posix.system")
    assert error.names == ("posix.system",)
    assert not marker.exists()


REFUSED = """
    os.system posix.system nt.system subprocess.Popen builtins.eval builtins.exec builtins.getattr builtins.open
    builtins.__import__ builtins.type builtins.compile builtins.globals __builtin__.eval __builtin__.apply
    __builtin__.execfile commands.getoutput popen2.Popen3 UserDict.UserDict copy_reg._reconstructor
    copyreg._reconstructor pickle.loads pickle.Unpickler cPickle.loads marshal.loads types.CodeType types.FunctionType
    ctypes.CDLL socket.socket runpy.run_path webbrowser.open pty.spawn code.InteractiveInterpreter pdb.run timeit.timeit
    logging.config.fileConfig importlib.import_module sys.modules collections.namedtuple collections.UserDict
    operator.attrgetter operator.methodcaller operator.getitem pathlib.Path.touch argparse.FileType
    argparse.ArgumentParser datetime.datetime.now
    typing.get_type_hints typing.NamedTuple test.support.run_unittest distutils.core.Extension
    _codecs.decode _codecs.lookup _posixsubprocess.fork_exec io.FileIO _io.FileIO io.BytesIO
    torch.load torch.compile torch.hub.load torch.jit.load torch.storage._load_from_bytes torch.serialization.load
    torch.distributed.rpc.PyRRef torch.utils.data.datapipes.utils.decoder.basichandlers torch.utils.collect_env.run
    torch._inductor.codecache.compile_file torch._dynamo.guards.GuardBuilder.get torch.package.PackageImporter
    numpy.load numpy.fromfile numpy.memmap numpy.testing.Tester numpy.core.multiarray.fromfile numpy.poly1d
    numpy._core._ufunc_reconstruct numpy.f2py.crackfortran.getlincoef numpy.DataSource
    pip.main pip._internal.main setuptools.setup
"""


@pytest.mark.parametrize("full", REFUSED.split())
@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL"])
def test_names_that_no_checkpoint_needs_are_refused_even_beside_intact_weights(full, opcode):
    module, _, attribute = full.rpartition(".")
    if full in ("pathlib.Path.touch", "datetime.datetime.now"):
        module, _, attribute = full.partition(".")  # a dotted name in a module
    push = name if opcode == "GLOBAL" else stack_name
    error = fails(pickled(dict_of(weight=tensor(), other=push(module, attribute))), UnsafeFileError, full)
    assert error.names == (full,)


@pytest.mark.parametrize(
    ("module", "attribute"),
    [("", "Thing"), ("a b", "Thing"), ("os\0", "Thing"), ("pkg.", "Thing"), ("pkg", ""), ("pkg", "A b"), ("pkg", "_")],
)
def test_names_that_are_not_identifiers_are_refused(module, attribute):
    fails(pickled(stack_name(module, attribute)), UnsafeFileError, "names code")


def test_all_refused_names_are_listed():
    error = fails(pickled(list_of(*(name("os", f"f{index}") for index in range(20)))), UnsafeFileError)
    assert len(error.names) == 20
    assert "os.f0, os.f1, os.f10" in str(error)
    assert "and 12 more" in str(error)


def test_a_name_with_control_characters_is_escaped(tmp_path):
    hostile = "evil\x1b[31m\u202egnp\x9b\ud800"
    error = refused_pickle(tmp_path, pickled(stack_name("os", hostile)), UnsafeFileError)
    assert r"evil\x1b[31m\u202egnp\x9b\ud800" in str(error)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_whole_pickled_network_is_called_a_program(tmp_path, is_zip):
    path = tmp_path / "model.ckpt"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path, _use_new_zipfile_serialization=is_zip)
    error = refused_bytes(tmp_path, path.read_bytes(), UnsafeFileError, "program", "state_dict")
    assert "torch.nn.modules.linear.Linear" in error.names or not is_zip  # a stream says so before it names one


# Opcodes


@pytest.mark.parametrize("opcode", sorted(FORBIDDEN))
@pytest.mark.parametrize("before", [b"", dict_of(weight=tensor())], ids=["first", "after a dict"])
def test_forbidden_opcodes_are_named_with_their_position(tmp_path, opcode, before):
    data = PROTO2 + before + opcode + b"\x00" * 8 + b"\n\n."
    part = f"(opcode {FORBIDDEN[opcode]} at byte {2 + len(before)})"
    refused_pickle(tmp_path, data, UnsafeFileError, "forbidden pickle opcode", part)


def test_bytes_that_are_no_opcode_are_refused():
    known = {opcode[0] for opcode in (*OPCODES, *FORBIDDEN)}
    for code in set(range(256)) - known:
        fails(PROTO2 + bytes([code]) + b"N.", UnsafeFileError, f"opcode 0x{code:02x} at byte 2")


def test_every_opcode_of_the_pickle_list_is_either_allowed_or_forbidden():
    import pickletools

    listed = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}
    assert listed == OPCODES | FORBIDDEN
    assert not OPCODES.keys() & FORBIDDEN.keys()


SYSTEM_NAME = name("lightning", "Callback")
MISUSES = {
    "PROTO twice": (PROTO2 + PROTO2 + b"N.", "PROTO at byte 2"),
    "no PROTO": (b"N.", "NONE at byte 0"),
    "STOP on an empty stack": (PROTO2 + b".", "STOP at byte 2"),
    "STOP on two objects": (PROTO2 + b"NN.", "2 objects"),
    "STOP with an open mark": (PROTO2 + b"(N.", "STOP at byte 4"),
    "TUPLE1 on nothing": (PROTO2 + b"\x85.", "TUPLE1"),
    "TUPLE2 below a mark": (PROTO2 + b"NN(N\x86t.", "TUPLE2"),
    "TUPLE without a mark": (PROTO2 + b"Nt.", "TUPLE"),
    "BINPUT on nothing": (PROTO2 + put(0) + b"N.", "BINPUT"),
    "MEMOIZE on nothing": (PROTO2 + b"\x94N.", "MEMOIZE"),
    "BINGET of nothing": (PROTO2 + get(0) + b".", "BINGET"),
    "LONG_BINGET of nothing": (PROTO2 + get(300) + b".", "LONG_BINGET"),
    "a memo entry far away": (PROTO2 + b"N" + put(2**31) + b".", "LONG_BINPUT"),
    "APPEND to a dict": (PROTO2 + b"}Na.", "APPEND"),
    "APPEND to a tuple": (PROTO2 + b")Na.", "APPEND"),
    "APPENDS to a name": (PROTO2 + SYSTEM_NAME + b"(Ne.", "APPENDS"),
    "SETITEM of a list": (PROTO2 + b"]NNs.", "SETITEM"),
    "SETITEM of a tensor": (pickled(tensor() + text("offset") + number(9) + b"s"), "SETITEM"),
    "SETITEMS of an odd count": (PROTO2 + b"}(NNNu.", "SETITEMS"),
    "ADDITEMS to a list": (PROTO2 + b"](N\x90.", "ADDITEMS"),
    "a list as a key": (PROTO2 + b"}]Ns.", "dict key"),
    "a dict as a key": (PROTO2 + b"}}Ns.", "dict key"),
    "a list in a tuple as a key": (PROTO2 + b"}]\x85Ns.", "dict key"),
    "an integer of 65 bits as a key": (PROTO2 + b"}" + number(2**63) + b"Ns.", "64 bits"),
    "the same integer in a tuple": (PROTO2 + b"}" + number(2**63) + b"\x85Ns.", "64 bits"),
    "a key twice": (pickled(b"}" + 2 * (text("model.weight") + tensor() + b"s")), "twice: model.weight"),
    "a key twice in two spellings": (PROTO2 + b"}(K\x01N\x88Nu.", "twice"),
    "REDUCE of text": (PROTO2 + text("os.system") + b")R.", "REDUCE"),
    "REDUCE of a pair of texts": (PROTO2 + text("os") + text("system") + b"\x86)R.", "REDUCE"),
    "REDUCE of a placeholder": (pickled(call("lightning", "Callback") + b")R"), "REDUCE"),
    "REDUCE of a tensor": (pickled(tensor() + b")R"), "REDUCE"),
    "REDUCE with a list": (PROTO2 + SYSTEM_NAME + b"]R.", "REDUCE"),
    "NEWOBJ of text": (PROTO2 + text("Thing") + b")\x81.", "NEWOBJ"),
    "NEWOBJ of a constructor": (PROTO2 + name("torch._utils", "_rebuild_parameter") + b")\x81.", "NEWOBJ"),
    "NEWOBJ with a list": (PROTO2 + SYSTEM_NAME + b"]\x81.", "NEWOBJ"),
    "REDUCE of a storage class": (pickled(call("torch", "FloatStorage", number(10**12))), "torch.FloatStorage"),
    "REDUCE of a dtype": (pickled(call("torch", "float32")), "torch.float32"),
    "REDUCE of a builtin type": (pickled(call("builtins", "list", text("x"))), "builtins.list"),
    "bytes of an integer": (pickled(call("builtins", "bytes", number(10**12))), "asks for memory"),
    "a bytearray of an integer": (pickled(call("__builtin__", "bytearray", number(10**12))), "asks for memory"),
    "BUILD of a dict": (PROTO2 + b"}}b.", "BUILD"),
    "BUILD of a list": (PROTO2 + b"]}b.", "BUILD"),
    "BUILD of a tensor": (pickled(tensor() + b"}b"), "BUILD"),
    "BUILD of a name": (PROTO2 + SYSTEM_NAME + b"}b.", "BUILD"),
    "BUILD of an OrderedDict with a tuple": (pickled(HOOKS + b")b"), "BUILD"),
    "STACK_GLOBAL of numbers": (PROTO2 + b"K\x01K\x02\x93.", "STACK_GLOBAL"),
    "GLOBAL without an end": (PROTO2 + b"c" + b"a" * 500, "GLOBAL"),
    "GLOBAL that is not UTF-8": (PROTO2 + b"c\xff\xfe\nx\n.", "UTF-8"),
    "text that is not UTF-8": (PROTO2 + b"X\x02\x00\x00\x00\xff\xfe.", "UTF-8"),
    "an OrderedDict of a dict": (pickled(call("collections", "OrderedDict", b"}")), "OrderedDict"),
    "an OrderedDict of triples": (pickled(call("collections", "OrderedDict", list_of(b")"))), "OrderedDict"),
    "an OrderedDict of two things": (pickled(call("collections", "OrderedDict", b"]", b"]")), "OrderedDict"),
    # found by fuzzing, as are the frames: each made one thing in Python's unpickler and another one here
    "an OrderedDict with pairs, but not called": (
        PROTO2 + name("collections", "OrderedDict") + list_of(list_of(text("a"), number(1))) + b"\x85\x81.",
        "NEWOBJ",
    ),
    "a frame that ends inside a name": (PROTO2 + frame(8) + name("collections", "OrderedDict") + b")R.", "GLOBAL"),
    "a frame that ends inside a text": (PROTO2 + frame(8) + text("weight") + b".", "BINUNICODE"),
    "a frame that ends inside the next frame's length": (PROTO2 + frame(5) + frame(2) + b"N.", "FRAME"),
    "a frame inside a frame": (PROTO2 + frame(11) + frame(2) + b"N.", "FRAME"),
    "encode to something else": (pickled(call("_codecs", "encode", text("x"), text("zip"))), "latin1"),
    "encode of something else": (pickled(call("_codecs", "encode", text("\u1234"), text("latin1"))), "latin1"),
    "encode of bytes": (pickled(call("_codecs", "encode", b"C\x01x", text("latin1"))), "latin1"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misused_opcodes_are_refused_with_opcode_and_position(misuse):
    data, part = MISUSES[misuse]
    error = fails(data, UnsafeFileError, part)
    assert "(opcode " in str(error)
    assert " at byte " in str(error)


@pytest.mark.parametrize("protocol", [0, 1, 6, 255])
def test_other_protocols_are_unsupported(protocol):
    fails(pickled(b"N", protocol), UnsupportedFileError, f"protocol {protocol};")


TRUNCATED = [
    b"",
    PROTO2,
    PROTO2 + b"X\x10\x00\x00\x00abc",
    PROTO2 + b"J\x01",
    PROTO2 + b"G123",
    PROTO2 + b"\x8a\x05a",
    PROTO2 + b"C\x05abc",
    PROTO2 + b"\x8d\x09" + bytes(7) + b"x",
    PROTO2 + b"\x95" + b"\xff" * 8,
    PROTO2 + b"\x8d" + b"\xff" * 7 + b"\x7f.",  # found before anything is allocated
    PROTO2 + b"\x95\x03" + bytes(7) + b"N.",  # whole, but for the frame
    PROTO2 + b"}" + text("a") + tensor() + b"s",
]


@pytest.mark.parametrize("data", TRUNCATED, ids=range(len(TRUNCATED)))
def test_pickles_that_end_early_are_incomplete(data):
    fails(data, CorruptFileError, "incomplete")


def test_a_pickle_cut_anywhere_is_refused():
    whole = pickled(dict_of(weight=tensor(), step=number(3)))
    assert read(whole).root["step"] == 3
    for length in range(len(whole)):
        with pytest.raises(CheckpointError):
            read(whole[:length])


def test_an_incomplete_pickle_that_names_code_is_said_to_name_code():
    fails(PROTO2 + name("os", "system") + text("touch")[:-2], UnsafeFileError, "names code", "os.system")


def test_nothing_may_follow_stop_in_a_zip(tmp_path):
    refused_pickle(tmp_path, pickled(dict_of(weight=tensor())) + b"N.", UnsafeFileError, "2 bytes after the end")


# Storages and tensors

WORD, FLOATS, KEY, PLACE, FOUR = text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(4)
WRONG_IDS = {
    "four fields": tuple_of(WORD, FLOATS, KEY, PLACE),
    "six fields": tuple_of(WORD, FLOATS, KEY, PLACE, FOUR, b"N"),
    "another word": tuple_of(text("module"), FLOATS, KEY, PLACE, FOUR),
    "a type that is text": tuple_of(WORD, text("FloatStorage"), KEY, PLACE, FOUR),
    "an unknown type": tuple_of(WORD, name("pkg", "FloatStorage"), KEY, PLACE, FOUR),
    "a key that is a number": tuple_of(WORD, FLOATS, number(0), PLACE, FOUR),
    "a key that is a path": tuple_of(WORD, FLOATS, text("../0"), PLACE, FOUR),
    "a key with other digits": tuple_of(WORD, FLOATS, text("\u0661"), PLACE, FOUR),
    "an endless key": tuple_of(WORD, FLOATS, text("0" * 30), PLACE, FOUR),
    "a count that is true": tuple_of(WORD, name("torch", "ByteStorage"), KEY, PLACE, b"\x88"),
    "a count that is a float": tuple_of(WORD, FLOATS, KEY, PLACE, b"G@\x10" + bytes(6)),
    "text": KEY,
}


@pytest.mark.parametrize("wrong", WRONG_IDS)
def test_a_persistent_id_is_a_storage_of_five_exact_fields(wrong):
    fails(pickled(WRONG_IDS[wrong] + b"Q"), UnsafeFileError, "BINPERSID")


@pytest.mark.parametrize("count", [0, 3, 5, 2**40])
def test_a_storage_has_as_many_bytes_as_its_record(count):
    fails(pickled(storage(count=count)), UnsafeFileError, f"claims {4 * count} bytes for storage 0, which has 16")


def test_a_storage_has_one_type():
    fails(pickled(list_of(storage(), storage(kind="IntStorage"))), UnsafeFileError, "two types, float32 and int32")


def test_a_storage_that_is_not_in_the_file_is_refused(tmp_path):
    data = checkpoint(pickled(dict_of(a=tensor(storage()), b=tensor(storage("7")))))
    refused_bytes(tmp_path, data, CorruptFileError, "data/7")


WRONG_TENSORS = {
    "one row too many": tensor(size=(3, 2)),
    "an offset too far": tensor(offset=1),
    "a stride too long": tensor(stride=(3, 1)),
    "sizes whose product overflows": tensor(size=(2**62, 2**62), stride=(2**62, 2**62)),
    "a window behind the end": tensor(offset=4, size=(), stride=()),
    "a huge offset": tensor(offset=2**62, size=(1,), stride=(1,)),
}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_a_tensor_outside_its_storage_is_refused_with_weight_key_and_sizes(tmp_path, wrong):
    data = pickled(b"}" + text("model.weight") + WRONG_TENSORS[wrong] + b"s")
    refused_pickle(
        tmp_path, data, UnsafeFileError, "weight 'model.weight'", "of storage 0", "claims", "which has 16", "REDUCE"
    )


MALFORMED_TENSORS = {
    "more sizes than strides": tensor(size=(2, 2), stride=(1,)),
    "a negative size": tensor(size=(-1, 2)),
    "a negative stride": tensor(stride=(-2, 1)),
    "a negative offset": tensor(offset=-1),
    "a size of more than 63 bits": tensor(size=(2**63, 0), stride=(1, 1)),
    "hooks": tensor(hooks=dict_of(hook=b"N")),
    "hooks that are a list": tensor(hooks=b"]"),
    "gradients that are a number": tensor(grad=number(1)),
    "no storage": tensor(source=b"N"),
    "a storage that is text": tensor(source=text("0")),
    "a storage that is a placeholder": tensor(source=call("pkg", "Storage")),
    "an untyped storage in v2": tensor(source=storage(kind="UntypedStorage", module="torch.storage", count=16)),
    "too few arguments": call("torch._utils", "_rebuild_tensor_v2", storage()),
    "sizes that are a list": call(
        "torch._utils", "_rebuild_tensor_v2", storage(), number(0), b"]", b"]", b"\x89", HOOKS
    ),
    "a size that is true": call(
        "torch._utils",
        "_rebuild_tensor_v2",
        storage(),
        number(0),
        tuple_of(b"\x88"),
        tuple_of(number(1)),
        b"\x89",
        HOOKS,
    ),
    "a parameter of a placeholder": call("torch._utils", "_rebuild_parameter", call("pkg", "Tensor"), b"\x88", HOOKS),
    "a parameter of nothing": call("torch._utils", "_rebuild_parameter"),
    "a parameter with hooks": call("torch._utils", "_rebuild_parameter", tensor(), b"\x88", dict_of(a=b"N")),
}


def tensor_v3(dtype: bytes, source: bytes) -> bytes:
    ones = tuple_of(number(1))
    return call("torch._utils", "_rebuild_tensor_v3", source, number(0), ones, ones, b"\x89", HOOKS, dtype)


UNTYPED = storage(kind="UntypedStorage", module="torch.storage", count=16)
MALFORMED_TENSORS |= {
    "v3 over a typed storage": tensor_v3(name("torch", "float32"), storage()),
    "v3 with a dtype that is text": tensor_v3(text("float32"), UNTYPED),
    "v3 with a class as its dtype": tensor_v3(name("pkg", "Float"), UNTYPED),
}


@pytest.mark.parametrize("wrong", MALFORMED_TENSORS)
def test_malformed_tensors_are_refused(wrong):
    fails(pickled(dict_of(weight=MALFORMED_TENSORS[wrong])), UnsafeFileError, "weight 'weight'", "REDUCE")


def test_a_tensor_of_v3_has_the_dtype_beside_it():
    record = read(pickled(tensor_v3(name("torch", "float8_e5m2"), UNTYPED))).root
    assert (record.dtype, record.shape, record.nbytes) == ("float8_e5m2", (1,), 1)


def test_an_empty_tensor_may_have_any_offset_and_starts_at_zero():
    record = read(pickled(tensor(offset=3, size=(0, 5), stride=(5, 1)))).root
    assert (record.offset, record.numel, record.nbytes) == (0, 0, 0)


# Limits


def limited(monkeypatch, **changes) -> None:
    limits = replace(convert.files.limits.LIMITS, **changes)
    for module in (convert.files.limits, convert.files.pickle_reader, convert.files.pickle_objects):
        monkeypatch.setattr(module, "LIMITS", limits)


def seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def long_text(length: int) -> bytes:
    return b"X" + length.to_bytes(4, "little") + b"a" * length


def with_axes(count: int) -> bytes:
    return pickled(tensor(size=count * (1,), stride=count * (1,)))


NAMES = [name("pkg", f"A{index}") for index in range(4)]
TOO_MUCH = [  # lowered limits, what is still read, what is not, what is said of it
    ({}, None, PROTO2 + b"N" * 100_001 + b".", "pickle stack: found 100001, allowed 100000"),
    ({}, pickled(b"(" * 64 + b"t" * 64), PROTO2 + b"(" * 65 + b".", "open pickle marks: found 65, allowed 64"),
    ({}, pickled(long_text(2**24)), pickled(long_text(2**24 + 1)), "one text in the pickle: found 16777217, allowed"),
    ({"memo": 10}, pickled(b"N" + b"\x94" * 10), pickled(b"N" + b"\x94" * 11), "memo entries: found 11, allowed 10"),
    ({}, None, bytes(2**26 + 1), "bytes of the pickle: found 67108865, allowed 67108864"),
    ({}, pickled(stack_name("pkg", "A" * 256)), pickled(stack_name("pkg", "A" * 257)), "code: found 257, allowed 256"),
    ({"names": 3}, pickled(list_of(*2 * NAMES[:3])), pickled(list_of(*NAMES)), "different names of code: found 4,"),
    ({"tensors": 3}, pickled(list_of(*3 * [tensor()])), pickled(list_of(*4 * [tensor()])), "tensors: found 4,"),
    ({}, with_axes(8), with_axes(9), "dimensions of a tensor: found 9, allowed 8"),
    ({}, pickled(b"}(" + b"N" * 64 + b"tNs"), pickled(b"}(" + b"N" * 65 + b"tNs"), "dict key: found 65, allowed 64"),
]


@pytest.mark.parametrize(("limits", "within", "beyond", "words"), TOO_MUCH, ids=[row[3][:20] for row in TOO_MUCH])
def test_a_limit_is_named_with_what_was_found(monkeypatch, limits, within, beyond, words):
    limited(monkeypatch, **limits)
    if within:
        read(within)
    fails(beyond, UnsupportedFileError, words)


@pytest.mark.slow
def test_the_limit_of_opcodes_is_reached_within_seconds():
    data = PROTO2 + b"]" + b"Na" * 1_100_000 + b"."
    spent = seconds(lambda: fails(data, UnsupportedFileError, "pickle opcodes: found 2000001, allowed 2000000"))
    assert spent < 20


def test_the_limit_of_keys_that_can_be_made_to_collide():
    # Multiples of 2**61 - 1 have the hash 0; of these few fit into 64 bits, so collisions come from the low bits.
    keys = b"".join(number(index << 40) + b"N" for index in range(20_001))
    spent = seconds(
        lambda: fails(pickled(b"}(" + keys + b"u"), UnsupportedFileError, "not text: found 20001, allowed 20000")
    )
    assert spent < 10
    mixed = b"".join(b"}" + tuple_of(number(index)) + b"Ns" for index in range(20_001))
    fails(pickled(list_of(mixed)), UnsupportedFileError, "not text")


def test_expanded_tensors_are_legitimate_until_they_grow_a_small_file_to_gigabytes():
    record = read(pickled(tensor(size=(1024, 1024, 64), stride=(0, 0, 0)))).root
    assert record.nbytes == 256 << 20
    fails(
        pickled(dict_of(a=tensor(size=(1024, 1024, 64), stride=(0, 0, 0)), b=tensor(size=(100,), stride=(0,)))),
        UnsafeFileError,
        "bytes of all tensors: found 268435856, allowed 268435520",
    )


def test_work_that_a_few_opcodes_repeat_is_counted():
    pairs = list_of(*(list_of(text(str(index)), b"N") for index in range(3000)))
    data = PROTO2 + b"(" + pairs + put(0) + (name("collections", "OrderedDict") + get(0) + b"\x85R") * 1000 + b"t."
    assert seconds(lambda: fails(data, UnsupportedFileError, "pickle opcodes")) < 10


def test_long_encoded_text_is_not_copied():
    data = PROTO2 + b"(" + long_text(2**20) + put(0)
    data += (name("_codecs", "encode") + get(0) + text("latin1") + b"\x86R") * 2000 + b"t."
    tracemalloc.start()
    root = read(data).root
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert type(root[1]) is Inert
    assert peak < 20 << 20


@pytest.mark.parametrize(
    "value",
    [
        b"]" * 60_000 + b"a" * 59_999,
        b")" + b"\x85" * 300_000,
        b"}" + b"".join(text("k") + b"}" for _ in range(30_000)) + b"s" * 30_000,
        (name("pkg", "Thing") + b")R") * 20_000 + b"b" * 19_999,
    ],
    ids=["lists", "tuples", "dicts", "states"],
)
def test_deeply_nested_data_does_not_exhaust_the_stack(value):
    assert read(pickled(value)).root is not None


def test_data_of_exponential_size_and_cycles_are_read_without_walking_them():
    doubled = b")" + put(0) + b"".join(get(index) + b"\x86" + put(index + 1) for index in range(200))
    cycle = b"]" + put(201) + get(201) + b"a"
    assert seconds(lambda: read(pickled(dict_of(a=doubled, b=cycle)))) < 2


def test_the_worst_containers_stay_within_the_memory_allowance():
    data = PROTO2 + b"]" + (b"(" + b"\x8f" * 1000 + b"e") * 60 + b"."
    tracemalloc.start()
    read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak * 2_000_000 / 60_000 < 512 << 20


# What genuine files hold


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_read_as_it_was(protocol):
    shared = [1, 2]
    value = {
        "text": "h\u00e9llo \U0001f600 \ud800",
        "long text": "x" * 70_000,
        "numbers": [0, 1, 255, 256, 65535, 65536, -1, -(2**31), 2**31, 2**63, -(2**200), 1.5, float("inf"), -0.0],
        "constants": (None, True, False),
        "bytes": b"\x00\xff",
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "shared": [shared, shared],
        "keys": {1: "a", 2.5: "b", None: "c", False: "e", ("a", (1, (2,))): "f", b"g": "h", -(2**63): "i"},
        "ordered": collections.OrderedDict(b=1, a=2),
        "many": {str(index): index for index in range(3000)},
        "long list": list(range(3000)),
    }
    contents = read(pickle.dumps(value, protocol))
    assert contents.root == value
    assert list(contents.root["ordered"]) == ["b", "a"]
    assert type(contents.root["ordered"]) is dict
    assert contents.root["shared"][0] is contents.root["shared"][1]
    assert contents.foreign == ()


def test_an_ordered_dict_as_python_2_wrote_it():
    pairs = list_of(list_of(text("b"), number(1)), list_of(text("a"), number(2)))
    root = read(pickled(call("collections", "OrderedDict", pairs))).root
    assert list(root.items()) == [("b", 1), ("a", 2)]


def test_a_memo_that_counts_from_one_as_python_2_wrote_it():
    assert read(pickled(b"]" + put(1) + text("a") + put(2) + b"a" + get(2) + b"a")).root == ["a", "a"]


def test_the_version_numbers_of_a_state_dict_are_dropped():
    root = read(pickled(HOOKS + text("a") + number(1) + b"s" + dict_of(_metadata=HOOKS) + b"b")).root
    assert root == {"a": 1}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.5), np.float32(0.1), np.float16(2.5), np.int64(-7), np.int32(8), np.int16(-9), np.int8(10),
        np.uint64(2**64 - 1), np.uint32(12), np.uint16(13), np.uint8(14), np.bool_(True), np.array(3.5, ">f8")[()],
    ],
    ids=lambda value: value.dtype.name,
)  # fmt: skip
def test_numpy_numbers_become_plain_numbers(value, protocol):
    found = read(pickle.dumps([value, value], protocol)).root
    assert found == [value.item(), value.item()]
    assert type(found[0]) is type(value.item())


def test_numpy_numbers_of_the_older_module_name():
    data = pickle.dumps(np.float64(1.5), 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core" in data
    assert read(data).root == 1.5


def scalar(kind: str, order: str, data: bytes) -> bytes:
    state = tuple_of(number(3), text(order), b"N", b"N", b"N", number(-1), number(-1), number(0))
    dtype = call("numpy", "dtype", text(kind), b"\x89", b"\x88") + state + b"b"
    return call("numpy.core.multiarray", "scalar", dtype, b"C" + bytes([len(data)]) + data)


def test_a_big_endian_numpy_number():
    assert read(pickled(scalar("i4", ">", b"\0\0\1\0"))).root == 256
    assert read(pickled(scalar("i4", "<", b"\0\0\1\0"))).root == 65536


@pytest.mark.parametrize(
    ("kind", "order", "size"),
    [("f8", "<", 7), ("f8", "<", 9), ("f8", "=", 8), ("O8", "|", 8), ("V8", "|", 8), ("U2", "<", 8), ("M8", "<", 8)],
)
def test_other_numpy_scalars_stay_placeholders(kind, order, size):
    assert type(read(pickled(scalar(kind, order, bytes(size)))).root) is Inert


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_numpy_arrays_stay_placeholders(protocol):
    contents = read(pickle.dumps({"scores": np.arange(5000.0), "step": 3}, protocol))
    assert contents.root["step"] == 3
    assert type(contents.root["scores"]) is Inert
    assert any("_reconstruct" in foreign for foreign in contents.foreign)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_training_leaves_beside_the_weights_is_ignored_and_named(protocol):
    class ModelCheckpoint:
        pass

    class DictConfig:
        def __init__(self, content):
            self._content = content
            self._parent = self

    class AttributeDict(dict):
        pass

    value = {
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.25)}},
        "hyper_parameters": DictConfig({"lr": 1e-4}),
        "attributes": AttributeDict(lr=1e-4),
        "namespace": argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("a/b")),
        "started": datetime.datetime(2022, 8, 1, 12, tzinfo=datetime.timezone.utc),
        "took": datetime.timedelta(seconds=3),
        "counts": collections.Counter("aab"),
        "defaults": collections.defaultdict(int, a=1),
        "recent": collections.deque([1, 2, 3], maxlen=5),
        "sets": [{1, 2}, frozenset({3}), set()],
        "complex": 1 + 2j,
        "type": float,
    }
    with (
        pretended("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint),
        pretended("omegaconf.dictconfig", DictConfig, AttributeDict),
    ):
        data = pickle.dumps(value, protocol)
    contents = read(data)
    (key,) = contents.root["callbacks"]
    assert key == GlobalName("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    assert contents.root["callbacks"][key] == {"best_model_score": 0.25}
    assert contents.root["hyper_parameters"].state["_content"] == {"lr": 1e-4}
    assert type(contents.root["namespace"]) is Inert
    assert list(contents.root["recent"].items) == [1, 2, 3]
    assert contents.root["type"].name == "float"
    for foreign in (str(key), "omegaconf.dictconfig.DictConfig", "argparse.Namespace", "collections.Counter"):
        assert foreign in contents.foreign
    assert list(contents.foreign) == sorted(contents.foreign)


@pytest.mark.parametrize(
    ("module", "attribute"),
    [("pkg", "Thing"), ("pkg.deep.er", "_Private"), ("__main__", "Config"), ("typing", "Any"), ("torch", "Size"),
     ("torch", "device"), ("torch.nn.modules.container", "ParameterDict"), ("builtins", "set"), ("__builtin__", "set"),
     ("builtins", "dict"), ("__builtin__", "unicode"), ("torchvision.transforms", "Resize"), ("numpy", "ndarray")],
)  # fmt: skip
def test_names_of_classes_are_ignored(module, attribute):
    assert read(pickled(name(module, attribute))).foreign == (f"{module}.{attribute}",)


def test_placeholders_are_hashable_and_keep_what_they_were_made_from():
    thing = read(pickled(call("pkg", "Thing", number(1)) + dict_of(a=number(2)) + b"b")).root
    assert (thing.name, thing.args, thing.state) == (GlobalName("pkg", "Thing"), (1,), {"a": 2})
    assert {thing: 1}[thing] == 1


def test_bytes_made_from_bytes_are_placeholders():
    assert type(read(pickled(call("builtins", "bytearray", b"C\x01x"))).root) is Inert
    assert type(read(pickled(call("__builtin__", "bytes"))).root) is Inert


def test_the_reader_imports_nothing_that_can_load_a_pickle_and_no_torch():
    code = "import sys, convert.files.reader; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "convert.files.pickle_reader" in loaded
    assert not {"pickle", "_pickle", "shelve", "torch", "numpy", "safetensors", "zipfile"} & loaded
