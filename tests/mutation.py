"""Files to start fuzzing from, and changes that leave most of a file's structure alone.

Flipped bits alone rarely come far: a checksum, a length or a missing opcode stops them at the door. So a zip is taken
apart into records and written again with matching checksums, a pickle into opcodes, a safetensors file into the JSON of
its header; one part is changed, and the rest is put together as it was.
"""

import io
import json
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from math import prod

from hostile import (
    FOUR_FLOATS,
    HOOKS,
    MAGIC,
    Record,
    call,
    checkpoint_records,
    dict_of,
    get,
    list_of,
    name,
    number,
    pickled,
    put,
    stack_name,
    storage,
    stream,
    stream_storage,
    tensor,
    text,
    tuple_of,
    write_zip,
)

from convert.files.pickle_reader import FORBIDDEN, OPCODES
from convert.files.records import DTYPE_WIDTHS
from convert.files.safetensors_reader import DTYPES
from convert.files.safetensors_writer import write_safetensors

Pick = random.Random
CALLBACK = name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
SCALAR = call(
    "numpy.core.multiarray",
    "scalar",
    call("numpy", "dtype", text("f8"), number(0), number(1))
    + tuple_of(number(3), text("<"), b"N", b"N", b"N", number(-1), number(-1), number(0))
    + b"b",
    call("_codecs", "encode", text("\0\0\0\0\0\0\xf0?"), text("latin1")),
)
UNTYPED = tuple_of(text("storage"), name("torch", "UntypedStorage"), text("0"), text("cpu"), number(16)) + b"Q"
UNTYPED_IN_STREAM = UNTYPED[:-2] + b"NtQ"
V3 = call(
    "torch._utils", "_rebuild_tensor_v3", UNTYPED, number(0), tuple_of(number(4)), tuple_of(number(1)), b"\x89", HOOKS,
    name("torch", "float8_e4m3fn"),
)  # fmt: skip
PYTHON_2 = name("collections", "OrderedDict") + tuple_of(list_of(list_of(text("a"), tensor()))) + b"R"
OF_BYTES = dict_of(w=V3)
VALUES = (  # what stands in a pickle
    dict_of(weight=tensor()),
    dict_of(state_dict=dict_of(a=tensor(), b=tensor(size=(4,), stride=(1,)) + put(1)), again=get(1)),
    dict_of(state_dict=PYTHON_2, global_step=number(470_000), epoch=b"G" + struct.pack(">d", 0.5)),
    dict_of(
        w=call("torch._utils", "_rebuild_parameter", tensor(), b"\x88", HOOKS), v=tensor(size=(2, 0), stride=(0, 1))
    ),
    dict_of(callbacks=b"}" + CALLBACK + dict_of(score=SCALAR, best=tensor()) + b"s", w=tensor(stride=(1, 2))),
    HOOKS + b"(" + text("w") + tensor() + b"u}" + text("_metadata") + HOOKS + b"s" + b"b",
    dict_of(nested=list_of(b"N", b"\x88", tuple_of(), number(-1), b"\x8f(K\1K\2\x90", b"(K\1\x91"), w=tensor()),
    OF_BYTES,
    dict_of(node=name("omegaconf", "Node") + b")\x81" + dict_of(_content=HOOKS) + b"b", w=tensor(stride=(0, 0))),
    dict_of(d=call("collections", "defaultdict", name("builtins", "int")) + text("k") + number(1) + b"s", w=tensor()),
    dict_of(q=call("collections", "deque", list_of()) + b"(K\1K\2e", s=call("builtins", "set", list_of()), w=tensor()),
)
EDGES = (0, 1, 2, 3, 4, 7, 8, 16, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
EDGES += (2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**80, -1, -2, -128, -(2**31), -(2**63))
WORDS = """
    os system builtins eval argparse Namespace pkg Thing __main__ Net torch FloatStorage HalfStorage UntypedStorage
    torch._utils _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter torch.nn.modules.linear Linear collections
    OrderedDict numpy dtype scalar numpy._core.multiarray _codecs encode latin1 cpu cuda:0 storage module 0 1 7 00
    data.pkl state_dict w weight ../x f8 i8 b1 V8 < |
"""
NAMES = (*WORDS.split(), "", "a" * 300, "\x1b[31m", "\u202e", "\ud800", "٣")
PIECES = [
    *sorted(OPCODES), *sorted(FORBIDDEN), *VALUES, HOOKS, SCALAR, V3, UNTYPED, CALLBACK, tensor(), storage(),
    stream_storage(), text("w"), text("0"), number(1), put(0), get(0), put(1), get(1), tuple_of(number(2), number(2)),
    stream_storage(view=tuple_of(text("8"), number(1), number(2))), stack_name("pkg", "Thing"), name("os", "system"),
    b"\x95" + struct.pack("<Q", 8), b"G" + struct.pack(">d", float("nan")), b"C\4abcd", b"(" * 40, b"]" * 50,
]  # fmt: skip


def seeds() -> list[bytes]:
    """Small genuine files of every container, and pickles alone."""
    found = []
    for value in VALUES:
        in_zip = pickled(value)
        found += [in_zip, pickled(value, 4), write_zip(checkpoint_records(in_zip))]
        as_stream = value.replace(storage(), stream_storage("0")).replace(UNTYPED, UNTYPED_IN_STREAM)
        found.append(stream(as_stream, keys=("0",), blocks=((16 if value is OF_BYTES else 4, FOUR_FLOATS),)))
    records = checkpoint_records(pickled(VALUES[0]))
    found.append(write_zip(records, zip64=True))
    found.append(write_zip([Record(record.name, record.data, method=8) for record in records]))
    found.append(write_zip([Record(r.name, r.data, descriptor=descriptor(r.data, "<L2L")) for r in records]))
    wide = [Record(r.name, r.data, descriptor=b"PK\7\x08" + descriptor(r.data, "<L2Q")) for r in records]
    found.append(write_zip(wide, zip64=True))
    found.append(write_zip([Record("m/.format_version", b"1"), *checkpoint_records(pickled(VALUES[1]), folder="m")]))
    found.append(write_zip([Record(r.name, b"big" if "order" in r.name else r.data) for r in records]))
    every = {dtype: (dtype, (2, 1)) for dtype in DTYPES.values()}
    for entries in (every, {"a": ("float32", ()), "b": ("bfloat16", (3, 0)), "c.d": ("int64", (1,) * 8)}, {}):
        found.append(safetensors(entries, {"format": "pt", "modelspec.title": '{"a": [[1]]}'}))
    return found


def kind_of(data: bytes) -> str:
    """What a file is meant to be, by its first bytes."""
    if data.startswith(b"PK"):
        return "zip"
    if data.startswith(MAGIC):
        return "stream"
    return "pickle" if data[:1] == b"\x80" else "safetensors"


def safetensors(entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    out = io.BytesIO()
    data = (memoryview(bytes(prod(shape) * DTYPE_WIDTHS[dtype])) for dtype, shape in entries.values())
    write_safetensors(out, entries, data, metadata)
    return out.getvalue()


def descriptor(data: bytes, layout: str) -> bytes:
    return struct.pack(layout, zlib.crc32(data), len(data), len(data))


def mutated(data: bytes, pick: Pick) -> bytes:
    """The file with one to four changes."""
    for _ in range(pick.choice((1, 1, 1, 2, 2, 3, 4))):
        data = changed(data, pick)
    return data


def changed(data: bytes, pick: Pick) -> bytes:
    """One change, most often one that fits the kind of file."""
    if pick.random() < 0.15:
        return changed_bytes(data, pick)
    return CHANGES[kind_of(data)](data, pick)


def changed_bytes(data: bytes, pick: Pick) -> bytes:
    """A flipped bit, a number written over, a cut, a repeated or a removed piece."""
    result = bytearray(data or b"\0")
    start = pick.randrange(len(result))
    length = pick.choice((1, 1, 2, 4, 8, pick.randrange(1, 40)))
    what = pick.randrange(6)
    if what == 0:
        result[start] ^= 1 << pick.randrange(8)
    elif what == 1:
        width = pick.choice((1, 2, 4, 8))
        edge = pick.choice(EDGES) % (1 << 8 * width)
        result[start : start + width] = edge.to_bytes(width, pick.choice(("little", "big")))
    elif what == 2:
        del result[start : start + length]
    elif what == 3:
        result[start:start] = result[pick.randrange(len(result)) :][:length]
    elif what == 4:
        result[start : start + length] = pick.randbytes(length)
    else:
        del result[start:]
    return bytes(result)


def opcodes(data: bytes) -> list[bytes]:
    """A pickle cut into its opcodes; the last piece is whatever could not be told."""
    starts = [0]
    with suppress(ValueError, IndexError, EOFError, OverflowError):  # what was told before is enough
        starts.extend(position for _, _, position in pickletools.genops(data) if position)
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def changed_pickle(data: bytes, pick: Pick) -> bytes:
    """An opcode removed, repeated, moved, replaced, or with another argument."""
    pieces = opcodes(data)
    at = pick.randrange(len(pieces))
    what = pick.randrange(10)
    if what == 0:
        del pieces[at]
    elif what == 1:
        start = pick.randrange(len(pieces))
        pieces[at:at] = pieces[start : start + pick.choice((1, 2, 5, 20))]
    elif what == 2:
        other = pick.randrange(len(pieces))
        pieces[at], pieces[other] = pieces[other], pieces[at]
    elif what in (3, 4):
        pieces.insert(at, pick.choice(PIECES))
    elif what == 5:
        pieces[at] = pick.choice(PIECES)
    elif what == 6:
        pieces[at] = number(pick.choice(EDGES))
    elif what == 7:
        pieces[at] = changed_bytes(pieces[at], pick)
    else:
        pieces[at] = other_argument(pieces[at], pick)
    return b"".join(pieces)


def other_argument(piece: bytes, pick: Pick) -> bytes:
    """The opcode with another number, text or name."""
    opcode = piece[:1]
    if opcode in b"X\x8c\x8d":
        return text(pick.choice(NAMES))
    if opcode == b"c":
        words = piece[1:].decode("utf-8", "replace").split("\n")[:2]
        words[pick.randrange(len(words))] = pick.choice(NAMES)
        return name(*words) if len(words) == 2 else piece
    if opcode in b"JKM\x8a":
        return number(pick.choice(EDGES))
    if opcode in b"hjqr":
        return (get if opcode in b"hj" else put)(pick.choice((0, 1, 2, 3, 255, 256, 2**32 - 1)))
    return pick.choice(PIECES)


def changed_stream(data: bytes, pick: Pick) -> bytes:
    """One of the five pickles changed, or what comes after them."""
    parts, position = [], 0
    for _ in range(5):
        pieces = opcodes(data[position:])
        stop = next((index for index, piece in enumerate(pieces) if piece[:1] == b"."), len(pieces) - 1)
        whole = b"".join(pieces[:stop]) + pieces[stop][:1]
        parts.append(whole)
        position += len(whole)
    parts.append(data[position:])
    at = pick.choice((1, 2, 3, 3, 3, 3, 4, 4, 5))
    parts[at] = changed_pickle(parts[at], pick) if at < 5 and parts[at] else changed_bytes(parts[at], pick)
    return b"".join(parts)


def records_of(data: bytes) -> list[Record]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [Record(i.filename, archive.read(i), method=i.compress_type) for i in archive.infolist()[:40]]


def changed_zip(data: bytes, pick: Pick) -> bytes:
    """A record or a header changed, everything else written anew to go with it."""
    try:
        records = [record for record in records_of(data) if record.method in (0, 8)]
    except Exception:
        return changed_bytes(data, pick)
    if not records:
        return changed_bytes(data, pick)
    record = pick.choice(records)
    options: dict = {"zip64": pick.random() < 0.3}
    what = pick.randrange(16)
    if what < 7:
        for found in records:
            if str(found.name).endswith("data.pkl"):
                found.data = changed_pickle(found.data, pick)
    elif what == 7:
        record.data = changed_bytes(record.data, pick)
    elif what == 8:
        record.data = pick.choice(
            (b"", b"big", b"little", FOUR_FLOATS, FOUR_FLOATS * 3, pick.randbytes(40), bytes(5000))
        )
    elif what == 9:
        record.name = pick.choice(
            (*NAMES, f"archive/data/{pick.randrange(3)}", "archive/", "archive/data/", "archive/Version")
        )
        record.name = record.name.encode("utf-8", "surrogatepass")
    elif what == 10:
        records.insert(pick.randrange(len(records) + 1), record)
    elif what == 11:
        records.remove(record)
        if pick.random() < 0.5:
            records.append(record)
    elif what == 12:
        record.method = 8 - record.method
        if pick.random() < 0.5:
            layout = pick.choice(("<L2L", "<L2Q"))
            record.descriptor = pick.choice((b"", b"PK\7\x08")) + descriptor(record.data, layout)
    elif what == 13:
        fields = ("flags", "method", "crc", "stored", "size", "header", "attributes", "made_by", "needed", "disk")
        field = pick.choice(fields)
        width = 16 if field in ("flags", "method", "made_by", "needed", "disk") else 32
        for headers in pick.choice(((record.local,), (record.central,), (record.local, record.central))):
            headers[field] = pick.choice(EDGES) % (1 << width)
    elif what == 14:
        extra = struct.pack("<2H", pick.choice((1, 0x4246, 0x5455)), pick.choice((0, 8, 16, 24))) + bytes(
            pick.choice((0, 8, 16))
        )
        record.central_extra = extra
        record.local_extra = pick.choice((b"", extra))
        if pick.random() < 0.5:
            record.central |= {"size": 0xFFFFFFFF, "stored": 0xFFFFFFFF}
            record.central_extra = struct.pack("<2H2Q", 1, 16, len(record.data), len(record.data))
    else:
        key = pick.choice(("before", "comment", "end"))
        options[key] = pick.choice((b"x", b"PK\5\6", bytes(100)))
        if key == "end":
            options["end"] = {pick.choice(("count", "size", "offset", "disk")): pick.choice(EDGES) % (1 << 16)}
    return write_zip(records, **options)


def changed_safetensors(data: bytes, pick: Pick) -> bytes:
    """The JSON of the header changed in one place, or its text, or the data; the length mostly goes with it."""
    length = int.from_bytes(data[:8], "little")
    raw, rest = data[8 : 8 + length], data[8 + length :]
    what = pick.randrange(4)
    if what == 0:
        raw = changed_bytes(raw, pick)
    elif what == 1:
        rest = rest[: pick.randrange(len(rest) + 1)] + bytes(pick.choice((0, 0, 1, 8, 64)))
    else:
        try:
            header = json.loads(raw)
        except (ValueError, RecursionError):
            return changed_bytes(data, pick)
        raw = json.dumps(changed_json(header, pick)).encode("utf-8", "surrogatepass")
    length = len(raw) if pick.random() < 0.95 else pick.choice(EDGES) % (1 << 64)
    return struct.pack("<Q", length) + raw + rest


def changed_json(value: object, pick: Pick, depth: int = 0) -> object:
    """The same tree with one node replaced, renamed, repeated or removed."""
    if isinstance(value, dict) and value and (depth == 0 or pick.random() < 0.8):
        value = dict(value)
        key = pick.choice(sorted(value))
        action: Callable[[], object] = pick.choice(
            (
                lambda: value.update({key: changed_json(value[key], pick, depth + 1)}),
                lambda: value.update({key: changed_json(value[key], pick, depth + 1)}),
                lambda: value.update({pick.choice((*NAMES, "__metadata__")): value.pop(key)}),
                lambda: value.update({pick.choice(NAMES): value[key]}),
                lambda: value.pop(key),
            )
        )
        action()
        return value
    if isinstance(value, list) and value and pick.random() < 0.8:
        value = list(value)
        at = pick.randrange(len(value))
        if pick.random() < 0.7:
            value[at] = changed_json(value[at], pick, depth + 1)
        else:
            value.insert(at, value[at])
        return value
    if isinstance(value, int) and pick.random() < 0.5:
        return value + pick.choice((-8, -4, -1, 1, 4, 8))
    return pick.choice((*EDGES, *DTYPES, *NAMES, 0.5, float("nan"), None, True, [], {}, [[[]]], {"a": {"b": {}}}))


CHANGES = {
    "zip": changed_zip,
    "stream": changed_stream,
    "pickle": changed_pickle,
    "safetensors": changed_safetensors,
}
