"""The zip container: genuine archives of several writers are read, anything else is refused with its fault."""

import io
import os
import struct
import time
import tracemalloc
import zipfile
import zlib
from dataclasses import replace

import pytest
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


@pytest.mark.parametrize("layout", ["<3L", "<L2Q"])
@pytest.mark.parametrize("signature", [b"PK\x07\x08", b""])
def test_sizes_may_stand_in_a_data_descriptor(tmp_path, layout, signature):
    records = checkpoint_records(PICKLE)
    for record in records:
        record.descriptor = descriptor(record.data, layout, signature)
    assert weight(opened(tmp_path, write_zip(records, zip64=True))) == FOUR_FLOATS


def test_zip64_end_records_are_read_even_in_small_files(tmp_path):
    assert weight(opened(tmp_path, write_zip(checkpoint_records(PICKLE), zip64=True))) == FOUR_FLOATS


def test_zip64_end_records_may_have_the_only_numbers(tmp_path):
    content = bytearray(write_zip(checkpoint_records(PICKLE), zip64=True))
    content[-14:-2] = b"\xff" * 12
    assert weight(opened(tmp_path, bytes(content))) == FOUR_FLOATS


@pytest.mark.parametrize("folder", ["archive", "model v1.5 \u00e9", "data", "a.b"])
def test_the_folder_may_have_any_name(tmp_path, folder):
    records = checkpoint_records(PICKLE, folder=folder)
    assert weight(opened(tmp_path, write_zip(records))) == FOUR_FLOATS


def test_records_may_come_in_any_order(tmp_path):
    records = checkpoint_records(PICKLE)
    assert weight(opened(tmp_path, write_zip(records[::-1]))) == FOUR_FLOATS


def test_the_small_records_of_newer_writers_are_accepted_and_those_of_older_ones_may_be_missing(tmp_path):
    sound = checkpoint_records(PICKLE)
    extra = [(".format_version", b"1"), (".storage_alignment", b"64"), (".data/serialization_id", b"0" * 40)]
    newer = sound + [Record(f"archive/{name}", data) for name, data in extra]
    older = [record for record in sound if "byteorder" not in record.name]
    assert weight(opened(tmp_path, write_zip(newer))) == FOUR_FLOATS
    assert weight(opened(tmp_path, write_zip(older))) == FOUR_FLOATS


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_packed_again_by_another_program_are_read(tmp_path, method):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for folder in ("archive/", "archive/data/"):
            archive.writestr(zipfile.ZipInfo(folder), b"")
        for record in checkpoint_records(PICKLE):
            archive.writestr(record.name, record.data)
    file = opened(tmp_path, out.getvalue())
    assert weight(file) == FOUR_FLOATS
    assert (file.root["weight"].storage.deflated is None) == (method == zipfile.ZIP_STORED)


def test_a_file_without_checksums_is_read(tmp_path):
    records = checkpoint_records(PICKLE)
    for record in records:
        record.local = record.central = {"crc": 0}
    file = opened(tmp_path, write_zip(records))
    assert weight(file) == FOUR_FLOATS
    assert file.root["weight"].storage.crc is None


def test_one_record_without_a_checksum_is_not_enough(tmp_path):
    content = changed(2, local={"crc": 0}, central={"crc": 0})
    refused_bytes(tmp_path, content, CorruptFileError, "checksum", "data/0", "download it again")


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


def test_data_before_the_archive_is_refused(tmp_path):
    content = write_zip(checkpoint_records(PICKLE), before=b"PK\3\4 and more")
    refused_bytes(tmp_path, content, UnsafeFileError, "before its first zip record")


def test_data_behind_the_archive_is_refused(tmp_path):
    refused_bytes(tmp_path, checkpoint(PICKLE) + b"\0", CorruptFileError, "without a zip directory")
    content = write_zip(checkpoint_records(PICKLE), comment=b"a comment")
    refused_bytes(tmp_path, content, CorruptFileError, "without a zip directory")


def test_an_archive_inside_a_comment_of_another_is_refused(tmp_path):
    inner = checkpoint(PICKLE)
    outer = write_zip(checkpoint_records(PICKLE), comment=inner)
    refused_bytes(tmp_path, outer, CorruptFileError, "zip directory")


def test_data_between_the_records_is_refused(tmp_path):
    refused_bytes(tmp_path, changed(0, after=b"hidden"), UnsafeFileError, "belong to nothing", "archive/data.pkl")
    refused_bytes(tmp_path, changed(3, after=b"hidden"), UnsafeFileError, "belong to nothing", "archive/version")


def test_two_records_of_one_name_are_refused(tmp_path):
    records = checkpoint_records(PICKLE)
    for name in ("archive/data.pkl", "archive/DATA.pkl", "archive/data/0"):
        content = write_zip([*records, Record(name, b"x")])
        refused_bytes(tmp_path, content, UnsafeFileError, "two zip records of the same name", name)


def test_overlapping_records_are_refused(tmp_path):
    content = changed(1, central={"header": 0})
    refused_bytes(tmp_path, content, UnsafeFileError, "overlapping zip records")
    content = changed(0, local={"stored": 200, "size": 200}, central={"stored": 200, "size": 200})
    refused_bytes(tmp_path, content, UnsafeFileError, "overlapping zip records", "archive/data.pkl")


@pytest.mark.parametrize("header", [1, 5, 10_000, 2**32 - 2])
def test_a_directory_that_points_elsewhere_is_refused(tmp_path, header):
    refused_bytes(tmp_path, changed(1, central={"header": header}), UnsafeFileError)


@pytest.mark.parametrize("flag", [0x0001, 0x0041, 0x2000])
def test_encrypted_records_are_refused(tmp_path, flag):
    content = changed(2, local={"flags": flag}, central={"flags": flag})
    refused_bytes(tmp_path, content, UnsupportedFileError, "encrypted", "archive/data/0")


@pytest.mark.parametrize("flag", [0x0010, 0x0020, 0x4000])
def test_unknown_flags_are_refused(tmp_path, flag):
    content = changed(2, local={"flags": flag}, central={"flags": flag})
    refused_bytes(tmp_path, content, UnsafeFileError, "unknown flags", "archive/data/0")


def test_records_that_need_a_later_version_of_zip_are_refused(tmp_path):
    """Python's zipfile refuses them, too: nobody knows what such a record would be."""
    for needed in (10, 20, 45, 63):
        (tmp_path / "model.ckpt").write_bytes(changed(2, central={"needed": needed}))
        open_checkpoint(tmp_path / "model.ckpt").close()
    content = changed(2, central={"needed": 169})
    refused_bytes(tmp_path, content, UnsupportedFileError, "version 16.9 is needed, 6.3 is read: archive/data/0")


@pytest.mark.parametrize("method", [1, 9, 12, 14, 93, 99])
def test_other_methods_are_refused(tmp_path, method):
    content = changed(2, local={"method": method}, central={"method": method})
    refused_bytes(tmp_path, content, UnsupportedFileError, f"method {method}", "archive/data/0")


BAD_PATHS = ["/archive/data/1", "archive/../data/1", "archive/./x", "archive\\data\\1", "archive//data/1", "..", ".",
             "", "archive/data/1\0.txt", "../../etc/passwd", "archive/data/.."]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS)
def test_bad_paths_are_refused(tmp_path, path):
    content = write_zip([*checkpoint_records(PICKLE), Record(path, b"x")])
    refused_bytes(tmp_path, content, UnsafeFileError, "bad path")


@pytest.mark.parametrize("kind", [0o120000, 0o020000, 0o060000, 0o010000, 0o140000])
def test_links_and_devices_are_refused(tmp_path, kind):
    content = changed(2, central={"made_by": 3 << 8, "attributes": (kind | 0o777) << 16})
    refused_bytes(tmp_path, content, UnsafeFileError, "link or a device", "archive/data/0")
    sound = changed(2, central={"made_by": 3 << 8, "attributes": 0o100644 << 16})
    assert weight(opened(tmp_path, sound)) == FOUR_FLOATS


@pytest.mark.parametrize(
    "local",
    [
        {"name": b"archive/data/1"},
        {"flags": 0},
        {"method": 8},
        {"crc": 1},
        {"crc": 0},
        {"stored": 15},
        {"size": 17},
        {"crc": 0, "stored": 0, "size": 0},
    ],
    ids=str,
)
def test_headers_that_disagree_are_refused(tmp_path, local):
    refused_bytes(tmp_path, changed(2, local=local), UnsafeFileError, "headers disagree", "archive/data/0")


def test_a_stored_record_has_one_size(tmp_path):
    content = changed(2, local={"stored": 15}, central={"stored": 15})
    refused_bytes(tmp_path, content, UnsafeFileError, "two sizes, 15 and 16")


@pytest.mark.parametrize("found", [b"", b"PK\x07\x08" + bytes(12), b"PK\x07\x08" + bytes(9), b"PK\x07\x08" + bytes(40)])
def test_a_descriptor_that_is_wrong_or_missing_is_refused(tmp_path, found):
    kind = "without the descriptor" if not found else "belong to nothing"
    refused_bytes(tmp_path, changed(2, descriptor=found), UnsafeFileError, kind, "archive/data/0")


@pytest.mark.parametrize("name", ["archive/evil.py", "archive/data/x", "archive/data/0.bin", "archive/data.pkl.bak",
                                  "archive/data/1/2", "archive/data/00000000000000000000"])  # fmt: skip
def test_unknown_records_are_refused(tmp_path, name):
    content = write_zip([*checkpoint_records(PICKLE), Record(name, b"x")])
    refused_bytes(tmp_path, content, UnsafeFileError, "does not belong in a checkpoint", name)


@pytest.mark.parametrize("name", ["other/version", "version", "data/1"])
def test_records_outside_the_folder_are_refused(tmp_path, name):
    content = write_zip([*checkpoint_records(PICKLE), Record(name, b"x")])
    refused_bytes(tmp_path, content, UnsafeFileError, "outside its folder", name)


def test_two_pickles_in_two_folders_are_refused(tmp_path):
    content = write_zip([*checkpoint_records(PICKLE), Record("other/data.pkl", PICKLE)])
    refused_bytes(tmp_path, content, UnsafeFileError, "outside its folder")


def test_a_folder_with_content_is_refused(tmp_path):
    content = write_zip([*checkpoint_records(PICKLE), Record("archive/data/", b"hidden")])
    refused_bytes(tmp_path, content, UnsafeFileError, "folder with content")


def test_a_storage_that_the_pickle_does_not_refer_to_is_refused(tmp_path):
    content = checkpoint(PICKLE, {"0": FOUR_FLOATS, "1": FOUR_FLOATS})
    refused_bytes(tmp_path, content, UnsafeFileError, "does not refer to", "data/1")


@pytest.mark.parametrize("order", [b"middle", b"", b"LITTLE", b"\xff\x1b[31m"])
def test_an_unknown_byte_order_is_refused(tmp_path, order):
    refused_bytes(tmp_path, changed(1, data=order), UnsafeFileError, "byte order")


@pytest.mark.parametrize("index", range(4), ids=["data.pkl", "byteorder", "data/0", "version"])
def test_a_wrong_checksum_is_named(tmp_path, index):
    name = checkpoint_records(PICKLE)[index].name
    content = changed(index, local={"crc": 12345}, central={"crc": 12345})
    refused_bytes(tmp_path, content, CorruptFileError, "wrong checksum", name.removeprefix("archive/"))


@pytest.mark.parametrize("field", ["count", "size", "offset", "disk"])
@pytest.mark.parametrize("zip64", [False, True])
def test_end_records_with_wrong_numbers_are_refused(tmp_path, field, zip64):
    sound = {"count": 4, "disk": 0}
    content = write_zip(checkpoint_records(PICKLE), zip64=zip64, end={field: sound.get(field, 100) + 1})
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises((CorruptFileError, UnsafeFileError)):
        read_all(path)


def test_a_directory_with_more_or_longer_entries_than_announced_is_refused(tmp_path):
    content = write_zip(checkpoint_records(PICKLE), end={"count": 3})
    refused_bytes(tmp_path, content, CorruptFileError, "does not go with its number of entries")
    content = bytearray(checkpoint(PICKLE))
    content[content.rindex(b"PK\1\2") + 28] = 100  # the length of the last name
    refused_bytes(tmp_path, bytes(content), CorruptFileError, "reaches beyond its end")


def test_a_directory_entry_without_a_record_is_refused(tmp_path):
    records = [*checkpoint_records(PICKLE), Record("archive/data/1", b"")]
    whole = write_zip(records)
    start, size = whole.index(b"PK\1\2") - 44, 44  # the last record is a header and nothing else
    without = write_zip(records, end={"offset": start})
    content = without[:start] + without[start + size :]
    refused_bytes(tmp_path, content, UnsafeFileError, "overlapping", "archive/data/1")


def test_a_record_without_its_signature_is_refused(tmp_path):
    content = bytearray(checkpoint(PICKLE))
    content[content.rindex(b"PK\3\4")] ^= 1
    refused_bytes(tmp_path, bytes(content), CorruptFileError, "no zip record where the directory announces one")


@pytest.mark.parametrize("back", [22 + 20 + 56, 22 + 20 + 52, 22 + 20 - 4, 22 + 20 - 8, 22 + 4], ids=str)
def test_zip64_end_records_with_wrong_numbers_are_refused(tmp_path, back):
    content = bytearray(write_zip(checkpoint_records(PICKLE), zip64=True))
    content[-back] ^= 2  # signature and size of the record; disk, offset and disks in its locator
    refused_bytes(tmp_path, bytes(content), CorruptFileError, "zip64 end records that do not go together")


def test_end_records_that_disagree_are_refused(tmp_path):
    content = bytearray(write_zip(checkpoint_records(PICKLE), zip64=True))
    content[-10] ^= 1  # the short record's directory size
    refused_bytes(tmp_path, bytes(content), UnsafeFileError, "end records that disagree")


@pytest.mark.parametrize("extra", [b"\1", b"\1\0\x08\0" + bytes(7), struct.pack("<2H", 1, 3) + b"abc",
                                   2 * struct.pack("<2HQ", 1, 8, 0)])  # fmt: skip
@pytest.mark.parametrize("where", ["local_extra", "central_extra"])
def test_damaged_extra_fields_are_refused(tmp_path, extra, where):
    path = tmp_path / "model.ckpt"
    path.write_bytes(changed(2, **{where: extra}))
    with pytest.raises((CorruptFileError, UnsafeFileError), match=r"extra field|zip64 fields"):
        read_all(path)


def test_sizes_of_exabytes_in_a_zip64_field_are_refused(tmp_path):
    extra = struct.pack("<2H2Q", 1, 16, 2**62, 2**62)
    full = {"stored": 2**32 - 1, "size": 2**32 - 1}
    content = changed(2, local=full, central=full, local_extra=extra, central_extra=extra)
    refused_bytes(tmp_path, content, UnsafeFileError, "overlapping", "archive/data/0")


# Bounded inflation


def test_deflated_records_are_inflated_once_and_verified(tmp_path):
    zeros = bytes(4096)
    records = checkpoint_records(pickled(dict_of(weight=tensor(storage(count=1024)))), {"0": zeros})
    file = opened(tmp_path, write_zip([replace(record, method=8) for record in records]))
    assert weight(file) == zeros
    assert file.storage_bytes(file.root["weight"]).obj is file.storage_bytes(file.root["weight"]).obj


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
    assert len(read_zip(memoryview(content))) == 4
    monkeypatch.setattr(convert.files.zip_reader, "LIMITS", replace(convert.files.limits.LIMITS, zip_records=3))
    with pytest.raises(UnsafeFileError, match="zip records: found 4, allowed 3"):
        read_zip(memoryview(content))


def test_the_limit_of_names(tmp_path):
    assert weight(opened(tmp_path, write_zip(checkpoint_records(PICKLE, folder="a" * 490)))) == FOUR_FLOATS
    content = write_zip(checkpoint_records(PICKLE, folder="a" * 600))
    refused_bytes(tmp_path, content, UnsafeFileError, "zip record's name: found 609, allowed 512")


def test_the_limit_of_extra_fields(tmp_path):
    field = struct.pack("<2H", 0x4246, 0)
    assert weight(opened(tmp_path, changed(2, local_extra=16 * field))) == FOUR_FLOATS
    for where in ("local_extra", "central_extra"):
        content = changed(2, **{where: 17 * field})
        refused_bytes(tmp_path, content, UnsafeFileError, "extra fields of a zip record: found 17, allowed 16")


def test_the_limit_of_small_records(tmp_path):
    refused_bytes(tmp_path, changed(3, data=b"3" * 5000), UnsafeFileError, "record version: found 5000, allowed 4096")


def test_the_limit_of_the_pickle_holds_before_it_is_inflated(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(changed(0, data=bytes(2**26 + 1), method=8))
    tracemalloc.start()
    refused(path, UnsafeFileError, "bytes of the pickle: found 67108865, allowed 67108864")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_a_huge_number_of_records_is_refused_within_seconds(tmp_path):
    pickle = pickled(dict_of(weight=tensor()))
    many = {str(index): b"" for index in range(1, 60_000)}
    path = tmp_path / "model.ckpt"
    path.write_bytes(write_zip(checkpoint_records(pickle, {"0": FOUR_FLOATS} | many)))
    start = time.process_time()
    refused(path, UnsafeFileError, "59999 records")
    assert time.process_time() - start < 10


# Damage


@pytest.mark.parametrize("zip64", [False, True])
def test_a_file_cut_anywhere_is_refused(tmp_path, zip64):
    whole = write_zip(checkpoint_records(PICKLE), zip64=zip64)
    path = tmp_path / "model.ckpt"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_a_cut_download_is_called_incomplete(tmp_path):
    whole = checkpoint(PICKLE)
    size = len(whole) - 30
    refused_bytes(tmp_path, whole[:size], CorruptFileError, f"ends after {size} bytes", "incomplete", "download")


def test_a_hole_in_the_middle_is_refused(tmp_path):
    whole = checkpoint(PICKLE)
    refused_bytes(tmp_path, whole[:100] + whole[140:], CorruptFileError, "bytes are missing or were added")
