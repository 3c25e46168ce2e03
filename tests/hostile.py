"""Builders of files that nobody should send us: a tiny pickle assembler, a zip writer that writes whatever is asked."""

import io
import os
import struct
import sys
import types
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from convert.checkpoint import Checkpoint, read_checkpoint
from convert.errors import CheckpointError, UnsafeFileError
from convert.files.reader import CheckpointFile, open_checkpoint
from convert.files.records import TensorRecord

# Pickle assembler: each function returns the bytes of an opcode with its argument

PROTO2 = b"\x80\x02"


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<L", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode("utf-8", "surrogatepass")


def stack_name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def put(index: int) -> bytes:
    return b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<L", index)


def get(index: int) -> bytes:
    return b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<L", index)


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def frame(size: int) -> bytes:
    return b"\x95" + struct.pack("<Q", size)


def list_of(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def dict_of(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def call(module: str, attribute: str, *args: bytes) -> bytes:
    return name(module, attribute) + tuple_of(*args) + b"R"


HOOKS = call("collections", "OrderedDict")


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage", location: str = "cpu", module="torch") -> bytes:
    return tuple_of(text("storage"), name(module, kind), text(key), text(location), number(count)) + b"Q"


def tensor(source: bytes | None = None, offset=0, size=(2, 2), stride=(2, 1), grad=b"\x89", hooks=HOOKS, extra=b""):
    """_rebuild_tensor_v2 over storage 0 of four float32, unless told otherwise."""
    numbers = [tuple_of(*(number(value) for value in values)) for values in (size, stride)]
    source = storage() if source is None else source
    return call("torch._utils", "_rebuild_tensor_v2", source, number(offset), *numbers, grad, hooks, extra)


def pickled(value: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + value + b"."


# Stream writer: what torch.save wrote before 1.6

MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
VERSION = b"\x80\x02M\xe9\x03."
MACHINE = pickled(dict_of(protocol_version=number(1001), little_endian=b"\x88"))
FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def stream_storage(key="7", count=4, kind="FloatStorage", view=b"N") -> bytes:
    """A persistent id of the stream format: it has a sixth field."""
    return tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), number(count), view) + b"Q"


def stream(value, *, magic=MAGIC, version=VERSION, machine=MACHINE, keys=("7",), blocks=((4, FOUR_FLOATS),), after=b""):
    """A file of the stream format, with any of its parts replaced."""
    listed = pickled(list_of(*map(text, keys)))
    stored = b"".join(struct.pack("<Q", count) + data for count, data in blocks)
    return magic + version + machine + pickled(value) + listed + stored + after


# Zip writer


@dataclass
class Record:
    """A record as it should be; `local` and `central` override fields of its two headers."""

    name: str | bytes
    data: bytes
    method: int = 0
    local: dict = field(default_factory=dict)
    central: dict = field(default_factory=dict)
    local_extra: bytes = b""
    central_extra: bytes = b""
    descriptor: bytes | None = None  # None: sizes stand in the local header
    after: bytes = b""


def write_zip(records: list[Record], *, before=b"", zip64=False, comment=b"", end: dict | None = None) -> bytes:
    out = bytearray(before)
    directory = bytearray()
    for record in records:
        raw_name = record.name.encode() if isinstance(record.name, str) else record.name
        packed = record.data
        if record.method == 8:
            deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
            packed = deflater.compress(record.data) + deflater.flush()
        common = {
            "flags": 0x800,
            "method": record.method,
            "crc": zlib.crc32(record.data),
            "stored": len(packed),
            "size": len(record.data),
            "name": raw_name,
        }
        if record.descriptor is not None:
            common["flags"] |= 8
        local = common | ({"crc": 0, "stored": 0, "size": 0} if record.descriptor is not None else {}) | record.local
        central = common | {"header": len(out), "attributes": 0, "made_by": 0, "needed": 0, "disk": 0} | record.central
        out += struct.pack(
            "<4s5H3L2H", b"PK\3\4", 0, local["flags"], local["method"], 0, 0, local["crc"], local["stored"],
            local["size"], len(local["name"]), len(record.local_extra),
        )  # fmt: skip
        out += local["name"] + record.local_extra + packed + (record.descriptor or b"") + record.after
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", central["made_by"], central["needed"], central["flags"], central["method"], 0, 0,
            central["crc"], central["stored"], central["size"], len(central["name"]), len(record.central_extra), 0,
            central["disk"], 0, central["attributes"], central["header"],
        )  # fmt: skip
        directory += central["name"] + record.central_extra
    fields = {"count": len(records), "size": len(directory), "offset": len(out), "disk": 0} | (end or {})
    out += directory
    if zip64:
        start = len(out)
        out += struct.pack(
            "<4sQ2H2L4Q", b"PK\6\6", 44, 0, 45, 0, 0, *2 * [fields["count"]], fields["size"], fields["offset"]
        )
        out += struct.pack("<4sLQL", b"PK\6\7", 0, start, 1)
    out += struct.pack(
        "<4s4H2LH", b"PK\5\6", fields["disk"], 0, fields["count"], fields["count"], fields["size"], fields["offset"],
        len(comment),
    )  # fmt: skip
    return bytes(out + comment)


def checkpoint_records(pickle: bytes, storages: dict[str, bytes] | None = None, folder="archive") -> list[Record]:
    storages = {"0": FOUR_FLOATS} if storages is None else storages
    data = [Record(f"{folder}/data/{key}", content) for key, content in storages.items()]
    return [
        Record(f"{folder}/data.pkl", pickle),
        Record(f"{folder}/byteorder", b"little"),
        *data,
        Record(f"{folder}/version", b"3\n"),
    ]


def checkpoint(pickle: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    return write_zip(checkpoint_records(pickle, storages))


def as_big_endian(content: bytes, width: Callable[[str], int]) -> bytes:
    """A torch zip as a big-endian machine would have written it.

    width  bytes of one number in the storage of a key
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [Record(info.filename, archive.read(info)) for info in archive.infolist()]
    for record in records:
        folder, _, key = record.name.rpartition("/")
        if key == "byteorder":
            record.data = b"big"
        elif folder.endswith("/data"):
            step = width(key)
            record.data = b"".join(record.data[at : at + step][::-1] for at in range(0, len(record.data), step))
    return write_zip(records)


# Libraries that are not installed


@contextmanager
def pretended(module: str, *classes: type):
    """A module that exists while its objects are pickled."""
    parts = module.split(".")
    paths = [".".join(parts[: count + 1]) for count in range(len(parts))]
    assert not set(paths) & sys.modules.keys()
    for path in paths:
        sys.modules[path] = types.ModuleType(path)
    for made in classes:
        made.__module__, made.__qualname__ = module, made.__name__
        setattr(sys.modules[module], made.__name__, made)
    try:
        yield
    finally:
        for path in paths:
            del sys.modules[path]


# Payloads: each would create the marker file


class Payload:
    """An object whose pickle calls a function when it is loaded by the pickle module."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def touch_command(marker: Path) -> str:
    return f"touch '{marker}'"


def touch(marker: Path) -> Payload:
    return Payload(os.system, touch_command(marker))


# Assertions


def refused(path: Path, kind: type[CheckpointError], *parts: str, read: Callable | None = None) -> CheckpointError:
    """Opening (or verifying, or `read`) fails with exactly this class, with all the parts in a text fit to be shown."""
    with pytest.raises(CheckpointError) as caught:
        (read or read_all)(path)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    for part in parts:
        assert part in message
    assert_showable(message)
    return caught.value


def look(path: Path) -> Checkpoint:
    """The model in a file or folder."""
    with open_checkpoint(path) as file:
        return read_checkpoint(file)


def refused_model(path: Path, kind: type[CheckpointError], *parts: str) -> None:
    refused(path, kind, path.name, *parts, read=look)


def assert_showable(message: str) -> None:
    assert message.count("\n") <= 2
    assert len(message) < 1500
    assert message.replace("\n", "").isprintable()


def refused_bytes(tmp_path: Path, content: bytes, kind: type[CheckpointError], *parts: str) -> CheckpointError:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    return refused(path, kind, *parts)


def refused_pickle(tmp_path: Path, pickle: bytes, kind: type[CheckpointError] = UnsafeFileError, *parts: str):
    """The pickle in an otherwise sound file with one storage of four float32."""
    return refused_bytes(tmp_path, checkpoint(pickle), kind, *parts)


def leaves(root: object, kind: type) -> list:
    """All leaves of one kind below dicts, lists and tuples of a small file."""
    if isinstance(root, kind):
        return [root]
    values = root.values() if isinstance(root, dict) else root if isinstance(root, (list, tuple)) else ()
    return [leaf for value in values for leaf in leaves(value, kind)]


def read_all(path: Path) -> CheckpointFile:
    """Open a file and verify each of its tensors."""
    file = open_checkpoint(path)
    for record in leaves(file.root, TensorRecord):
        file.verify(record)
    return file
