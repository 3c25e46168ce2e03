"""The zip container, read strictly: what the directory says and what lies in the file must be the same, byte for byte.

Layout: one entry after the other from byte 0 (local header, name, extra field, data, sometimes a data descriptor), then
the directory, then its end records. Between entries may be zeros, behind the end a comment or other bytes: nobody reads
them. What disagrees is damage; what agrees but has two meanings is hostile. PKWARE APPNOTE 6.3.10, 4.3 and 4.5.

Torch's writer leaves sizes and checksum 0 in local headers and puts them into a data descriptor, writes zip64 end
records even in small files, and from 4 GiB on a zip64 extra field with just the header's own offset.
"""

import re
import struct
import zlib
from dataclasses import dataclass

from convert.errors import CorruptFileError, UnsafeFileError, UnsupportedFileError, counted, shown, size_text
from convert.files.limits import LIMITS, check_growth, check_limit

LOCAL = struct.Struct("<4s5H3L2H")  # signature, version, flags, method, time, date, crc, sizes, name, extra
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64_LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
NEWEST_VERSION = 63  # of the zip format: 6.3
STORED, DEFLATED = 0, 8
ENCRYPTED = 0x2041  # flag bits: encrypted, strongly encrypted, directory masked
DESCRIPTOR = 0x0008
UTF_8 = 0x0800
KNOWN_FLAGS = 0x080E  # UTF-8 name, descriptor, two bits of the deflate level
INFLATE_STEP = 1 << 20  # bytes
HOLE = 4096  # zeros in a row
MOST_PADDING = 1 << 16  # zeros between two records
ANY_PICKLE = re.compile(rb"\x80[\x02-\x05]|[(\]}lp0-9\n]{0,8}c[\w.]+\n[\w.]+\n")
BEHIND = 0xFFFF  # bytes behind the end record: where zip readers look for it


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """One entry of the archive, both of whose headers agree."""

    name: str
    offset: int  # of the data
    stored: int  # bytes in the file
    size: int  # bytes once inflated; the same if the record is not deflated
    crc: int
    is_deflated: bool


def read_zip(data: memoryview) -> tuple[list[ZipRecord], tuple[str, ...]]:
    """Every entry of a zip archive in the order of the file, and what lies beside them. Reads headers only."""
    directory, directory_end, count, passed_over = find_directory(data)
    entries = []
    position = directory
    for _ in range(count):
        entry, position = read_entry(data, position, directory_end)
        entries.append(entry)
    if position != directory_end:
        raise CorruptFileError("has a zip directory whose size does not go with its number of entries")
    entries.sort(key=lambda entry: entry.header)
    if not entries:
        raise UnsafeFileError("has data before its first zip record")
    checked = [check_local(data, entry) for entry in entries]  # all of them before their places are compared
    if entries[0].header != 0:
        raise UnsafeFileError("has data before its first zip record")
    ends = [entry.header for entry in entries[1:]] + [directory]
    padding = sum(check_gap(data, record, behind, end) for (record, behind), end in zip(checked, ends, strict=True))
    for entry in entries:
        check_kind(entry)
    check_names([entry.name for entry in entries])
    records = [record for record, _ in checked]
    inflated = sum(record.size for record in records if record.is_deflated)
    check_growth("inflated bytes", inflated, len(data))
    return records, (*passed_over, *([f"{counted(padding, 'zero')} between zip records"] if padding else []))


@dataclass(frozen=True, slots=True)
class Entry:
    """What the directory says about a record."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    stored: int
    size: int
    header: int  # offset of the local header
    needed: int  # version of the zip format, times ten
    unix_kind: int  # type of the file that was packed; 0 if unknown


def find_directory(data: memoryview) -> tuple[int, int, int, list[str]]:
    """Start and end of the central directory, its number of entries, and what lies behind the end record."""
    tail = len(data) - END.size
    if tail < 0 or data[tail : tail + 4] != b"PK\5\6":
        start = max(0, tail - BEHIND)
        found = bytes(data[start:]).rfind(b"PK\5\6")
        tail = start + found if found >= 0 else -1
    if tail < 0 or tail + END.size > len(data):
        raise CorruptFileError(f"ends after {size_text(len(data))} without a zip directory: it is incomplete")
    _, disk, directory_disk, count_here, count, size, offset, comment = END.unpack_from(data, tail)
    behind = len(data) - tail - END.size - comment
    if behind < 0:
        raise CorruptFileError(f"ends after {size_text(len(data))} inside the comment of its zip directory")
    end = tail
    locator = tail - END64_LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\6\7":
        _, locator_disk, end, disks = END64_LOCATOR.unpack_from(data, locator)
        if end != locator - END64.size or end < 0:
            raise CorruptFileError("has zip64 end records that do not go together")
        wide = END64.unpack_from(data, end)
        if wide[0] != b"PK\6\6" or wide[1] != END64.size - 12 or locator_disk or disks != 1:
            raise CorruptFileError("has zip64 end records that do not go together")
        narrow = ((disk, 0xFFFF), (directory_disk, 0xFFFF), (count_here, 0xFFFF), (count, 0xFFFF))
        narrow += ((size, 0xFFFFFFFF), (offset, 0xFFFFFFFF))
        if any(value not in (full, widest) for (value, widest), full in zip(narrow, wide[4:], strict=True)):
            raise CorruptFileError("has zip end records that disagree")
        disk, directory_disk, count_here, count, size, offset = wide[4:]
    if disk or directory_disk or count_here != count:
        raise CorruptFileError("has a zip end record for several disks")
    if offset + size != end:
        raise CorruptFileError(
            f"has its zip directory at byte {end - size} where {offset} is announced: bytes are missing or were added"
        )
    if count > size // CENTRAL.size:
        raise CorruptFileError(f"has a zip directory of {size_text(size)} for {count} entries")
    check_limit("zip records", count, LIMITS.zip_records)
    passed_over = [f"{counted(comment, 'byte')} in the comment of the zip"] if comment else []
    return offset, end, count, passed_over + bytes_behind(data, len(data) - behind)


def bytes_behind(data: memoryview, end: int) -> list[str]:
    """What is said of bytes that no program reads. Raises UnsafeFileError where one that looks for pickles would."""
    if ANY_PICKLE.match(bytes(data[end : end + 512])):
        raise UnsafeFileError("has a pickle behind its end")
    return [f"{size_text(len(data) - end)} behind the end"] if end < len(data) else []


def read_entry(data: memoryview, position: int, directory_end: int) -> tuple[Entry, int]:
    """One entry of the central directory, and the position after it."""
    if position + CENTRAL.size > directory_end or data[position : position + 4] != b"PK\1\2":
        raise CorruptFileError(f"has a damaged zip directory at byte {position}")
    fields = CENTRAL.unpack_from(data, position)
    _, made_by, needed, flags, method, _, _, crc, stored, size, name_size, extra_size, comment_size = fields[:13]
    disk, _, attributes, header = fields[13:]
    name_start = position + CENTRAL.size
    extra_start = name_start + name_size
    position = extra_start + extra_size + comment_size
    if position > directory_end:
        raise CorruptFileError("has a damaged zip directory: an entry reaches beyond its end")
    raw_name = bytes(data[name_start:extra_start])
    name = raw_name.decode("utf-8", "surrogateescape")
    if name_size > LIMITS.zip_name_bytes:
        raise CorruptFileError(f"has a zip record with a name of {name_size} bytes: {shown(name)}")
    if flags & UTF_8 and name.encode("utf-8", "replace") != raw_name:
        raise CorruptFileError(f"has a zip record whose name is not the UTF-8 that it says it is: {shown(name)}")
    kind = attributes >> 28 if made_by >> 8 == 3 else 0  # Unix file type
    extra = zip64_extra(bytes(data[extra_start : extra_start + extra_size]), name)
    wide = iter(extra)
    if size == 0xFFFFFFFF:
        size = next(wide, size)
    if stored == 0xFFFFFFFF:
        stored = next(wide, stored)
    if header == 0xFFFFFFFF:
        header = next(wide, header)
    if disk:
        raise CorruptFileError(f"has a zip record for several disks: {shown(name)}")
    if method == STORED and stored != size:
        raise CorruptFileError(f"has a stored zip record of two sizes, {stored} and {size}: {shown(name)}")
    return Entry(name, raw_name, flags, method, crc, stored, size, header, needed & 0xFF, kind), position


def check_kind(entry: Entry) -> None:
    """Refuse a record that is no plain file of a kind that is read. Its two headers agree."""
    name = shown(entry.name)
    if entry.flags & ENCRYPTED:
        raise UnsupportedFileError(f"has an encrypted zip record: {name}")
    if entry.needed > NEWEST_VERSION:
        version = f"{entry.needed // 10}.{entry.needed % 10}"
        raise UnsupportedFileError(f"has a zip record for which version {version} is needed, 6.3 is read: {name}")
    if entry.flags & ~KNOWN_FLAGS:
        raise UnsafeFileError(f"has a zip record with unknown flags: {name}")
    if entry.method not in (STORED, DEFLATED):
        raise UnsupportedFileError(f"has a zip record packed by method {entry.method}, which is not read: {name}")
    if entry.unix_kind not in (0, 0o4, 0o10):
        raise UnsafeFileError(f"has a zip record that is a link or a device: {name}")


def zip64_extra(extra: bytes, name: str) -> tuple[int, ...]:
    """The 64-bit numbers of the zip64 extra field, () if there is none."""
    numbers = None
    position = fields = 0
    while position < len(extra):
        fields += 1
        if position + 4 > len(extra) or fields > LIMITS.zip_extra_fields:
            raise CorruptFileError(f"has a zip record with a damaged extra field: {shown(name)}")
        tag, size = struct.unpack_from("<2H", extra, position)
        position += 4 + size
        if position > len(extra):
            raise CorruptFileError(f"has a zip record with a damaged extra field: {shown(name)}")
        if tag == 1:
            if numbers is not None or size % 8:
                raise CorruptFileError(f"has a zip record with two or odd zip64 fields: {shown(name)}")
            numbers = struct.unpack_from(f"<{size // 8}Q", extra, position - size)
    return numbers or ()


def check_names(names: list[str]) -> None:
    """One record a name, and no name that could mean a place outside a folder."""
    seen = set()
    for name in names:
        parts = name.rstrip("/").split("/")
        if "\\" in name or "\0" in name or not all(parts) or "." in parts or ".." in parts or name.endswith("//"):
            raise UnsafeFileError(f"has a zip record with a bad path: '{shown(name)}'")
        if name.casefold() in seen:
            raise UnsafeFileError(f"has two zip records of the same name: {shown(name)}")
        seen.add(name.casefold())


def check_local(data: memoryview, entry: Entry) -> tuple[ZipRecord, int]:
    """Compare the record's own header, and its descriptor, with the directory. Returns it and the byte behind it."""
    name, start = shown(entry.name), entry.header + LOCAL.size
    if start > len(data) or data[entry.header : entry.header + 4] != b"PK\3\4":
        raise damaged(data, entry.header, f"there is no zip record where the directory announces {name}")
    fields = LOCAL.unpack_from(data, entry.header)
    _, _, flags, method, _, _, crc, stored, size, name_size, extra_size = fields
    offset = start + name_size + extra_size
    same = bytes(data[start : start + name_size]) == entry.raw_name and flags == entry.flags and method == entry.method
    extra = zip64_extra(bytes(data[start + name_size : offset]), entry.name) if same else ()
    if len(extra) >= 2:
        size = extra[0] if size == 0xFFFFFFFF else size
        stored = extra[1] if stored == 0xFFFFFFFF else stored
    expected = (entry.crc, entry.stored, entry.size)
    later = flags & DESCRIPTOR and (crc, stored, size) == (0, 0, 0)
    if not same or (not later and (crc, stored, size) != expected):
        raise damaged(data, entry.header, f"the two headers of the zip record {name} disagree")
    behind = offset + entry.stored
    described = None
    if flags & DESCRIPTOR:
        rest = bytes(data[behind : behind + 24])
        described = next((form for form in descriptors(expected) if rest.startswith(form)), None)
        if described is None:
            raise damaged(data, behind, f"the zip record {name} is without the descriptor it announces")
        behind += len(described)
    return ZipRecord(entry.name, offset, entry.stored, entry.size, entry.crc, method == DEFLATED), behind


def check_gap(data: memoryview, record: ZipRecord, behind: int, end: int) -> int:
    """The number of zeros between a record and the next one, at `end`. Nothing else may be there."""
    if behind > end:
        raise UnsafeFileError(f"has overlapping zip records: {shown(record.name)}")
    rest = bytes(data[behind : min(end, behind + MOST_PADDING)])
    if any(rest) or end - behind > MOST_PADDING:
        position = behind + len(rest) - len(rest.lstrip(b"\0"))
        raise damaged(data, position, f"bytes behind the zip record {shown(record.name)} belong to nothing")
    return end - behind


def damaged(data: memoryview, position: int, how: str) -> CorruptFileError:
    """The error for a place that is not as it should be. In a hole of zeros, it says where the hole begins."""
    while position > 0 and not any(hole := bytes(data[max(0, position - HOLE) : position + 1])):
        position = max(0, position - HOLE)
    if position and hole[-1:] == b"\0":
        position -= len(hole) - 1 - len(hole.rstrip(b"\0"))
    return CorruptFileError(f"is damaged at byte {position}: {how}")


def wrong_checksum(stored: memoryview, offset: int, name: str) -> CorruptFileError:
    """The error for a record's bytes from `offset` on: at a hole of zeros, as a failed download leaves it, if any."""
    hole = bytes(stored).find(bytes(HOLE))
    return CorruptFileError(f"is damaged at byte {offset + max(hole, 0)}: wrong checksum in its record {shown(name)}")


def descriptors(expected: tuple[int, int, int]) -> list[bytes]:
    """The forms a data descriptor takes: sizes of 4 or 8 bytes, with or without its signature."""
    crc, stored, size = expected
    forms = [struct.pack("<L2Q", crc, stored, size)]
    if max(stored, size) < 2**32:
        forms.append(struct.pack("<3L", crc, stored, size))
    return [b"PK\7\x08" + form for form in forms] + forms


def inflate(packed: memoryview, size: int, name: str) -> bytearray:
    """Inflate a deflated record of a known size; never holds more than that."""
    fault = CorruptFileError(f"has a zip record that does not inflate to the announced {size} bytes: {shown(name)}")
    result = bytearray(size)
    filled = fed = 0
    waiting: bytes | memoryview = b""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    while not inflater.eof:
        if not waiting:
            waiting = packed[fed : fed + INFLATE_STEP]
            fed += len(waiting)
        try:
            piece = inflater.decompress(waiting, INFLATE_STEP)
        except zlib.error:
            raise fault from None
        if filled + len(piece) > size or (not piece and not waiting):
            raise fault
        waiting = inflater.unconsumed_tail
        result[filled : filled + len(piece)] = piece
        filled += len(piece)
    if filled != size or inflater.unused_data or fed != len(packed):
        raise fault
    return result
