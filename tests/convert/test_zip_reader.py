"""The zip container: genuine archives of several writers are read, anything else is refused with its fault."""

import io
import os
import struct
import time
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hostile import (
    FOUR_FLOATS,
    Record,
    checkpoint,
    checkpoint_records,
    dict_of,
    pickled,
    read_all,
    refused,
    refused_bytes,
    storage,
    tensor,
    write_zip,
)

import convert.files.limits
import convert.files.zip_reader
from convert.errors import CheckpointError, CorruptFileError, UnsafeFileError, UnsupportedFileError
from convert.files.reader import open_checkpoint
from convert.files.zip_reader import inflate, read_zip

PICKLE = pickled(dict_of(weight=tensor()))


def opened(tmp_path, content: bytes):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    return read_all(path)


def weight(file) -> bytes:
    return bytes(file.storage_bytes(file.root["weight"]))


def changed(index: int, **changes) -> bytes:
    """A sound checkpoint with one record changed."""
    records = checkpoint_records(PICKLE)
    records[index] = replace(records[index], **changes)
    return write_zip(records)


# Genuine archives


def descriptor(data: bytes, layout: str, signature: bytes) -> bytes:
    return signature + struct.pack(layout, zlib.crc32(data), len(data), len(data))


def with_descriptors(layout: str, signature: bytes) -> bytes:
    records = checkpoint_records(PICKLE)
    for record in records:
        record.descriptor = descriptor(record.data, layout, signature)
    return write_zip(records, zip64=True)


def with_ones_in_its_short_end() -> bytes:
    content = bytearray(write_zip(checkpoint_records(PICKLE), zip64=True))
    content[-14:-2] = b"\xff" * 12  # the only numbers stand in the zip64 end records
    return bytes(content)


NEWER = [(".format_version", b"1"), (".storage_alignment", b"64"), (".data/serialization_id", b"0" * 40)]
SOUND = {
    **{
        f"sizes in a data descriptor, {layout}, {signature}": with_descriptors(layout, signature)
        for layout in ("<3L", "<L2Q")
        for signature in (b"PK\x07\x08", b"")
    },
    **{
        f"the folder {folder}": write_zip(checkpoint_records(PICKLE, folder=folder))
        for folder in ("archive", "model v1.5 \u00e9", "data", "a.b", "a" * 490)
    },
    **{f"version {needed}": changed(2, central={"needed": needed}) for needed in (10, 20, 45, 63)},
    "zip64 end records in a small file": write_zip(checkpoint_records(PICKLE), zip64=True),
    "the only numbers in the zip64 end records": with_ones_in_its_short_end(),
    "records in another order": write_zip(checkpoint_records(PICKLE)[::-1]),
    "the small records of newer writers": write_zip(
        checkpoint_records(PICKLE) + [Record(f"archive/{name}", data) for name, data in NEWER]
    ),
    "without those of older ones": write_zip(
        [record for record in checkpoint_records(PICKLE) if "byteorder" not in record.name]
    ),
    "a plain file by its attributes": changed(2, central={"made_by": 3 << 8, "attributes": 0o100644 << 16}),
    "16 extra fields": changed(2, local_extra=16 * struct.pack("<2H", 0x4246, 0)),
}


@pytest.mark.parametrize("kind", SOUND)
def test_genuine_archives_are_read(tmp_path, kind):
    assert weight(opened(tmp_path, SOUND[kind])) == FOUR_FLOATS


def test_records_behind_4_gib_are_found_as_torch_writes_them(tmp_path):
    # A hole in the middle of the file: torch's writer keeps 32-bit sizes and adds a zip64 field with just the offset.
    gap = 2**32
    path = tmp_path / "huge.ckpt"
    pickle = pickled(dict_of(big=tensor(storage("0", gap, "ByteStorage")), weight=tensor(storage("1"))))
    entries = [("a/data.pkl", pickle, len(pickle)), ("a/data/0", b"", gap), ("a/data/1", FOUR_FLOATS, 16)]
    directory = b""
    with open(path, "wb") as out:
        for name, data, size in entries:
            header = out.tell()
            far = struct.pack("<2HQ", 1, 8, header) if header >= 2**32 - 1 else b""
            sizes = struct.pack("<2HQQ", 1, 16, size, size) if size >= 2**32 - 1 else b""
            raw = name.encode()
            out.write(struct.pack("<4s5H3L2H", b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, len(raw), len(far + sizes)))
            out.write(raw + (far or sizes) + data)
            out.seek(size - len(data), os.SEEK_CUR)
            out.write(b"PK\x07\x08" + struct.pack("<L2Q" if far or sizes else "<3L", 0, size, size))
            short = min(size, 2**32 - 1)
            directory += struct.pack(
                "<4s6H3L5H2L", b"PK\1\2", 0, 0, 0x808, 0, 0, 0, 0, short, short,
                len(raw), len(far or sizes), 0, 0, 0, 0, min(header, 2**32 - 1),
            )  # fmt: skip
            directory += raw + (far or sizes)
        start = out.tell()
        out.write(directory)
        end = out.tell()
        out.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 45, 0, 0, 3, 3, len(directory), start))
        out.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        out.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(directory), 2**32 - 1, 0))
    with open_checkpoint(path) as file:
        assert weight(file) == FOUR_FLOATS
        assert file.root["weight"].storage.offset > 2**32
        assert file.root["big"].storage.nbytes == gap


# Faults


def both(index: int, **fields) -> bytes:
    """A sound checkpoint with the same change in both headers of a record."""
    return changed(index, local=fields, central=fields)


def and_a(name: str | bytes, data: bytes = b"x") -> bytes:
    return write_zip([*checkpoint_records(PICKLE), Record(name, data)])


def edited(change, **options) -> bytes:
    content = bytearray(write_zip(checkpoint_records(PICKLE), **options))
    change(content)
    return bytes(content)


def flip(position, bits):
    """Change bits of the byte at a position, which may depend on the content."""

    def change(content):
        content[position(content) if callable(position) else position] ^= bits

    return change


def without_the_last_record() -> bytes:
    """Its entry in the directory stays; it is a header and nothing else."""
    records = [*checkpoint_records(PICKLE), Record("archive/data/1", b"")]
    start, size = write_zip(records).index(b"PK\1\2") - 44, 44
    whole = write_zip(records, end={"offset": start})
    return whole[:start] + whole[start + size :]


BAD_PATHS = ["/archive/data/1", "archive/../data/1", "archive/./x", "archive\\data\\1", "archive//data/1", "..", ".",
             "", "archive/data/1\0.txt", "../../etc/passwd", "archive/data/.."]  # fmt: skip
STRAY = ["archive/.DS_Store", "__MACOSX/archive/._data.pkl", "README.txt", "archive/data/", "other/version", "data/1",
         "archive/evil.py", "archive/data/x", "archive/data/0.bin", "archive/data.pkl.bak", "archive/data/1/2",
         "archive/data/00000000000000000000"]  # fmt: skip
DISAGREEING = [{"name": b"archive/data/1"}, {"flags": 0}, {"method": 8}, {"crc": 1}, {"crc": 0}, {"stored": 15},
               {"size": 17}, {"crc": 0, "stored": 0, "size": 0}]  # fmt: skip
DESCRIPTORS = [b"PK\x07\x08" + bytes(12), b"PK\x07\x08" + bytes(9), b"PK\x07\x08" + bytes(40)]
SOUND_BYTES, EXABYTES = checkpoint(PICKLE), struct.pack("<2H2Q", 1, 16, 2**62, 2**62)
FULL = {"stored": 2**32 - 1, "size": 2**32 - 1}
FAULTS = [  # (the content, what is said of it)
    (write_zip(checkpoint_records(PICKLE), before=b"PK\3\4 and more"), UnsafeFileError, "before its first zip record"),
    (write_zip([], before=b"PK\3\4 and no record"), UnsafeFileError, "before its first zip record"),
    (SOUND_BYTES + bytes(2**16), CorruptFileError, "without a zip directory"),  # no program looks that far
    (write_zip(checkpoint_records(PICKLE), comment=b"a comment")[:-1], CorruptFileError, "inside the comment"),
    (write_zip(checkpoint_records(PICKLE), comment=SOUND_BYTES), CorruptFileError, "zip directory"),
    (changed(0, after=b"hidden"), CorruptFileError, "behind the zip record archive/data.pkl belong to nothing"),
    (changed(3, after=b"hidden"), CorruptFileError, "behind the zip record archive/version belong to nothing"),
    *(
        (and_a(name), UnsafeFileError, f"two zip records of the same name: {name}")
        for name in ("archive/data.pkl", "archive/DATA.pkl", "archive/data/0")
    ),
    (changed(0, after=bytes(2**17)), CorruptFileError, "belong to nothing"),
    (
        changed(1, central={"header": 0}),
        CorruptFileError,
        "headers of the zip record archive/byteorder disagree",
    ),
    (both(0, stored=200, size=200), UnsafeFileError, "overlapping zip records: archive/data.pkl"),
    *(
        (changed(1, central={"header": header}), CorruptFileError, "no zip record")
        for header in (1, 5, 10_000, 2**32 - 2)
    ),
    *(
        (both(2, flags=flag), UnsupportedFileError, "encrypted zip record: archive/data/0")
        for flag in (1, 0x41, 0x2000)
    ),
    *((both(2, flags=flag), UnsafeFileError, "unknown flags: archive/data/0") for flag in (0x10, 0x20, 0x4000)),
    (  # as Python's zipfile: nobody knows what such a record would be
        changed(2, central={"needed": 169}),
        UnsupportedFileError,
        "version 16.9 is needed, 6.3 is read: archive/data/0",
    ),
    *((both(2, method=m), UnsupportedFileError, f"packed by method {m},") for m in (1, 9, 12, 14, 93, 99)),
    (and_a(b"\xff\xfe"), CorruptFileError, "whose name is not the UTF-8 that it says it is"),
    *((and_a(path), UnsafeFileError, "bad path") for path in BAD_PATHS),
    *(
        (
            changed(2, central={"made_by": 3 << 8, "attributes": (kind | 0o777) << 16}),
            UnsafeFileError,
            "link or a device",
        )
        for kind in (0o120000, 0o020000, 0o060000, 0o010000, 0o140000)
    ),
    *((changed(2, local=local), CorruptFileError, "headers of the zip record archive/data/0") for local in DISAGREEING),
    (both(2, stored=15), CorruptFileError, "two sizes, 15 and 16"),
    (changed(2, descriptor=b""), CorruptFileError, "archive/data/0 is without the descriptor it announces"),
    *((changed(2, descriptor=found), CorruptFileError, "without the descriptor") for found in DESCRIPTORS),
    (and_a("other/data.pkl", PICKLE), UnsafeFileError, "has two pickles: archive/data.pkl, other/data.pkl"),
    *((changed(1, data=o), UnsafeFileError, "byte order") for o in (b"middle", b"", b"LITTLE", b"\xff\x1b[31m")),
    *(
        (both(index, crc=12345), CorruptFileError, f"wrong checksum in its record {name}")
        for index, name in enumerate(("archive/data.pkl", "archive/byteorder", "data/0", "archive/version"))
    ),
    (both(2, crc=0), CorruptFileError, "checksum"),  # one record without a checksum is not enough
    (
        write_zip(checkpoint_records(PICKLE), end={"count": 3}),
        CorruptFileError,
        "does not go with its number of entries",
    ),
    (
        edited(flip(lambda content: content.rindex(b"PK\1\2") + 28, 64)),  # the length of the last name
        CorruptFileError,
        "reaches beyond its end",
    ),
    (without_the_last_record(), CorruptFileError, "no zip record where the directory announces archive/data/1"),
    (
        edited(flip(lambda content: content.rindex(b"PK\3\4"), 1)),
        CorruptFileError,
        "no zip record where the directory announces archive/version",
    ),
    *(  # signature and size of the record; disk, offset and disks in its locator
        (edited(flip(-back, 2), zip64=True), CorruptFileError, "zip64 end records that do not go together")
        for back in (22 + 20 + 56, 22 + 20 + 52, 22 + 20 - 4, 22 + 20 - 8, 22 + 4)
    ),
    (edited(flip(-10, 1), zip64=True), CorruptFileError, "end records that disagree"),  # the short one's directory size
    (
        changed(2, local=FULL, central=FULL, local_extra=EXABYTES, central_extra=EXABYTES),
        UnsafeFileError,
        "overlapping zip records: archive/data/0",
    ),
    (write_zip(checkpoint_records(PICKLE, folder="a" * 600)), CorruptFileError, "a name of 609 bytes"),
    *(
        (
            changed(2, **{where: 17 * struct.pack("<2H", 0x4246, 0)}),
            CorruptFileError,
            "damaged extra field",
        )
        for where in ("local_extra", "central_extra")
    ),
    (changed(3, data=b"3" * 5000), UnsupportedFileError, "record version: found 5000, allowed 4096"),
    (
        SOUND_BYTES[:-30],
        CorruptFileError,
        f"ends after {len(SOUND_BYTES) - 30} bytes without a zip directory",
    ),
    (SOUND_BYTES[:100] + SOUND_BYTES[140:], CorruptFileError, "bytes are missing or were added"),
]


@pytest.mark.parametrize(
    ("content", "kind", "words"), FAULTS, ids=[f"{index}-{fault[2][:30]}" for index, fault in enumerate(FAULTS)]
)
def test_faults_are_refused_by_name(tmp_path, content, kind, words):
    text = str(refused_bytes(tmp_path, content, kind, words))
    assert ("download it again" in text) == (kind is CorruptFileError)


@pytest.mark.parametrize("field", ["count", "size", "offset", "disk"])
@pytest.mark.parametrize("zip64", [False, True])
def test_end_records_with_wrong_numbers_are_refused(tmp_path, field, zip64):
    sound = {"count": 4, "disk": 0}
    content = write_zip(checkpoint_records(PICKLE), zip64=zip64, end={field: sound.get(field, 100) + 1})
    with pytest.raises((CorruptFileError, UnsafeFileError)):
        opened(tmp_path, content)


@pytest.mark.parametrize("extra", [b"\1", b"\1\0\x08\0" + bytes(7), struct.pack("<2H", 1, 3) + b"abc",
                                   2 * struct.pack("<2HQ", 1, 8, 0)])  # fmt: skip
@pytest.mark.parametrize("where", ["local_extra", "central_extra"])
def test_damaged_extra_fields_are_refused(tmp_path, extra, where):
    with pytest.raises((CorruptFileError, UnsafeFileError), match=r"extra field|zip64 fields"):
        opened(tmp_path, changed(2, **{where: extra}))


# What changes no weight

HARMLESS = {  # and what is said of it
    "a comment": (write_zip(checkpoint_records(PICKLE), comment=b"a comment"), "9 bytes in the comment of the zip"),
    "a byte behind": (SOUND_BYTES + b"\0", "1 byte behind the end"),
    "a web page behind": (SOUND_BYTES + b"<html>" * 9, "54 bytes behind the end"),
    "a comment and more": (write_zip(checkpoint_records(PICKLE), comment=b"abc") + b"x", "1 byte behind the end"),
    "padding": (changed(1, after=bytes(100)), "100 zeros between zip records"),
    "padding before the directory": (changed(3, after=bytes(7)), "7 zeros between zip records"),
    "an unused storage": (
        checkpoint(PICKLE, {"0": FOUR_FLOATS, "1": FOUR_FLOATS}),
        "the record archive/data/1, which is not used",
    ),
    **{name: (and_a(name), f"the record {name}, which is not used") for name in STRAY},
}


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.parametrize("zip64", [False, True])
def test_what_changes_no_weight_is_passed_over_and_told(tmp_path, kind, zip64):
    content, told = HARMLESS[kind]
    with opened(tmp_path, content) as file:
        assert weight(file) == FOUR_FLOATS
        assert told in file.passed_over
        assert len(file.passed_over) == 1 + (kind == "a comment and more")


def test_records_that_share_bytes_are_hostile(tmp_path):
    inner = Record("archive/data/1", b"x" * 8)
    whole = write_zip([inner])
    records = checkpoint_records(PICKLE, {"0": FOUR_FLOATS, "2": whole[: whole.index(b"PK\1\2")]})
    content = write_zip([*records, Record("archive/data/1", b"x" * 8, central={"header": 0})])
    place = content.index(whole[:30])
    content = write_zip([*records, Record("archive/data/1", b"x" * 8, central={"header": place})])
    refused_bytes(tmp_path, content, UnsafeFileError, "overlapping zip records")


# Damage is never called hostile


@pytest.mark.parametrize(
    "length", [pytest.param(1, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow), 300]
)
def test_holes_of_zeros_and_flipped_bytes_are_damage_at_a_place(tmp_path, length):
    whole = written_by_torch()
    path = tmp_path / "model.ckpt"
    for start in range(0, len(whole), max(5, length // 10)):
        for filled in (bytes(length), bytes(byte ^ 0x20 for byte in whole[start : start + length])):
            path.write_bytes((whole[:start] + filled + whole[start + length :])[: len(whole)])
            with suppress(CorruptFileError, UnsupportedFileError):
                read_all(path)


@pytest.mark.parametrize("start", [5_000, 50_001, 300_000, 400_123])
def test_a_hole_is_told_with_its_first_byte(tmp_path, start):
    path = tmp_path / "model.ckpt"
    torch.save({str(index): torch.full((40_000,), 1.1) for index in range(4)}, path)
    whole = bytearray(path.read_bytes())
    whole[start : start + 100_000] = bytes(100_000)
    path.write_bytes(whole)
    with pytest.raises(CorruptFileError, match=rf"is damaged at byte {start}.*\n.*download it again"):
        read_all(path)


# Bounded inflation


@pytest.mark.parametrize("size", [1, 15, 17, 2**27])
def test_a_deflated_storage_inflates_to_exactly_the_announced_size(tmp_path, size):
    source = storage(count=size, kind="ByteStorage")
    records = checkpoint_records(pickled(dict_of(weight=tensor(source, size=(), stride=()))))
    records[2] = replace(records[2], method=8, local={"size": size}, central={"size": size})
    refused_bytes(tmp_path, write_zip(records), CorruptFileError, f"does not inflate to the announced {size} bytes")


@pytest.mark.parametrize("off", [-1, 1, 10_000])
def test_a_deflated_pickle_inflates_to_exactly_the_announced_size(tmp_path, off):
    numbers = {"size": len(PICKLE) + off}
    content = changed(0, method=8, local=numbers, central=numbers)
    refused_bytes(tmp_path, content, CorruptFileError, "does not inflate", "data.pkl")


def test_an_inflation_bomb_is_refused_by_what_it_announces(tmp_path):
    numbers = {"size": 2**31}
    records = checkpoint_records(pickled(dict_of(weight=tensor(storage(count=2**29)))), {"0": bytes(2**20)})
    records[2] = replace(records[2], method=8, local=numbers, central=numbers)
    refused_bytes(tmp_path, write_zip(records), UnsafeFileError, "inflated bytes: found 2147483648")


def test_an_inflation_bomb_that_announces_little_is_stopped_there():
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = deflater.compress(bytes(2**28)) + deflater.flush()
    start = time.process_time()
    with pytest.raises(CorruptFileError, match="announced 1000 bytes"):
        inflate(memoryview(bomb), 1000, "data/0")
    assert time.process_time() - start < 1


@pytest.mark.parametrize("size", [0, 1, 1000, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 17])
@pytest.mark.parametrize("content", ["random", "zeros"])
def test_inflation_gives_back_what_was_deflated(size, content):
    data = os.urandom(size) if content == "random" else bytes(size)
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = deflater.compress(data) + deflater.flush()
    assert inflate(memoryview(packed), size, "x") == data
    for wrong in (packed[:-1], packed + b"\0", b"", b"\xff" * 10):
        with pytest.raises(CorruptFileError):
            inflate(memoryview(wrong), size, "x")


# Limits


def test_the_limit_of_records(monkeypatch):
    content = checkpoint(PICKLE)
    assert len(read_zip(memoryview(content))[0]) == 4
    monkeypatch.setattr(convert.files.zip_reader, "LIMITS", replace(convert.files.limits.LIMITS, zip_records=3))
    with pytest.raises(UnsupportedFileError, match="zip records: found 4, allowed 3"):
        read_zip(memoryview(content))


def test_the_limit_of_the_pickle_holds_before_it_is_inflated(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(changed(0, data=bytes(2**26 + 1), method=8))
    tracemalloc.start()
    refused(path, UnsupportedFileError, "bytes of the pickle: found 67108865, allowed 67108864")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.slow
def test_a_huge_number_of_unused_records_is_passed_over_within_seconds(tmp_path):
    pickle = pickled(dict_of(weight=tensor()))
    many = {str(index): b"" for index in range(1, 60_000)}
    path = tmp_path / "model.ckpt"
    path.write_bytes(write_zip(checkpoint_records(pickle, {"0": FOUR_FLOATS} | many)))
    start = time.process_time()
    with open_checkpoint(path) as file:
        assert len(file.passed_over) == 59_999
    assert time.process_time() - start < 10


# Damage


def written_by_torch() -> bytes:
    out = io.BytesIO()
    torch.save({"alpha": torch.tensor([1.0, 2.0]), "beta": torch.tensor([[3, 4]], dtype=torch.int16)}, out)
    return out.getvalue()


@pytest.mark.parametrize(
    "kind", ["plain", pytest.param("zip64", marks=pytest.mark.slow), pytest.param("torch's", marks=pytest.mark.slow)]
)
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    whole = written_by_torch() if kind == "torch's" else write_zip(checkpoint_records(PICKLE), zip64=kind == "zip64")
    path = tmp_path / "model.ckpt"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
