"""The format of torch.save since 1.6: a zip with one pickle, `<folder>/data.pkl`, and one record per storage.

The folder's name varies. Beside the storages `<folder>/data/<key>` lie a few tiny records, newer writers have more.
Whatever else lies in the archive (.DS_Store, a note, a storage that nothing refers to) is passed over.
"""

import re
import zlib

from convert.errors import CorruptFileError, UnsafeFileError, UnsupportedFileError, shown
from convert.files.limits import LIMITS, check_limit
from convert.files.pickle_reader import read_pickle
from convert.files.records import Contents, StorageRecord
from convert.files.zip_reader import ZipRecord, inflate, read_zip, wrong_checksum

SMALL_RECORDS = {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
FOLDERS = {"", "data/", ".data/"}  # re-packed files have entries for these
STORAGE = re.compile(r"data/[0-9]{1,19}")
PROGRAM = re.compile(r"code/|constants\.pkl|bytecode\.pkl|attributes\.pkl|extra/|models/|archive_format|\.data/version")


def is_zip(head: bytes, size: int) -> bool:
    return head.startswith(b"PK\3\4")


def read_torch_zip(data: memoryview) -> Contents:
    """Read everything but the storages; check every record's name, header and place."""
    records, passed_over = read_zip(data)
    by_name, strangers = strip_folder(records)
    has_checksums = any(record.crc for record in by_name.values())  # torch's writer can leave them out

    def content(name: str) -> bytes:
        record = by_name[name]
        packed = data[record.offset : record.offset + record.stored]
        result = bytes(inflate(packed, record.size, record.name) if record.is_deflated else packed)
        if has_checksums and zlib.crc32(result) != record.crc:
            raise wrong_checksum(packed, record.offset, record.name)
        return result

    for name in SMALL_RECORDS & by_name.keys():
        check_limit(f"bytes of the record {name}", by_name[name].size, LIMITS.small_record_bytes)
        content(name)
    byteorder = content("byteorder").decode("ascii", "replace").strip() if "byteorder" in by_name else "little"
    if byteorder not in ("little", "big"):
        raise UnsafeFileError(f"has an unknown byte order: '{shown(byteorder)}'")

    def find_storage(key: str, count: int, width: int) -> StorageRecord:
        record = by_name.get(f"data/{key}")
        if record is None:
            raise CorruptFileError(f"has no record data/{key}, which its pickle refers to")
        return StorageRecord(
            key=key,
            offset=record.offset,
            nbytes=record.size,
            byteorder=byteorder,
            crc=record.crc if has_checksums else None,
            deflated=record.stored if record.is_deflated else None,
        )

    check_limit("bytes of the pickle", by_name["data.pkl"].size, LIMITS.pickle_bytes)
    pickle = content("data.pkl")
    contents = read_pickle(pickle, find_storage)
    if contents.end != len(pickle):
        raise UnsafeFileError(f"has {len(pickle) - contents.end} bytes after the end of its pickle")
    unused = [r.name for name, r in by_name.items() if STORAGE.fullmatch(name) and name[5:] not in contents.storages]
    return Contents(
        "torch zip",
        contents.root,
        foreign=contents.foreign,
        calls=contents.calls,
        passed_over=(*passed_over, *(f"the record {name}, which is not used" for name in (*strangers, *unused))),
    )


def strip_folder(records: list[ZipRecord]) -> tuple[dict[str, ZipRecord], list[str]]:
    """The records by their name inside the one top folder, and the names of those that no checkpoint needs.

    Names other zips in an error.
    """
    names = [record.name for record in records]
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    inner = [name.partition("/")[2] for name in names]
    if (pickles or "version" in inner) and any(PROGRAM.match(name) for name in inner):
        raise UnsafeFileError("is a TorchScript archive, which contains a program; save the model's state_dict instead")
    if not pickles:
        raise UnsupportedFileError(describe_zip(names))
    if len(pickles) > 1:
        raise UnsafeFileError(f"has two pickles: {shown(pickles[0])}, {shown(pickles[1])}")
    folder = pickles[0].partition("/")[0]
    by_name, strangers = {}, []
    for record, name in zip(records, inner, strict=True):
        inside = record.name.startswith(f"{folder}/")
        if inside and (name == "data.pkl" or name in SMALL_RECORDS or STORAGE.fullmatch(name)):
            by_name[name] = record
        elif not (inside and name in FOLDERS and not record.size):
            strangers.append(record.name)
    return by_name, strangers


def describe_zip(names: list[str]) -> str:
    """Name a zip without `data.pkl`."""
    if names and all(name.endswith(".npy") for name in names):
        return "is a NumPy archive (npz), not a checkpoint"
    if any(name.endswith((".ckpt", ".safetensors", ".pt", ".pth", ".bin")) for name in names):
        return "is a zip with model files inside; unpack it and give the file itself"
    return f"is a zip archive with no checkpoint in it; its first entry is '{shown(names[0])}'"
