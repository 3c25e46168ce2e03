"""The format of torch.save before 1.6: five pickles in a row, then the bytes of one storage after the other.

    magic number
    1001              version of the protocol
    {...}             the machine that wrote it
    the object        its tensors refer to storages by key and element count
    [key, ...]        the order of the storages
    per storage: its element count (8 bytes, little-endian), its bytes (little-endian on every machine)

Nothing says where a storage lies before the object has been read. So the object's pickle is run twice: once to learn
which storages there are and how long, once more with each in its place, and with every check.

torch/serialization.py, `_legacy_save`; torch/csrc/serialization.cpp writes the storages.
"""

import re

from convert.errors import CorruptFileError, UnsafeFileError, UnsupportedFileError, part_text, shown
from convert.files.limits import LIMITS, check_limit
from convert.files.pickle_names import CONSTRUCTORS, DTYPES, STORAGE_DTYPES
from convert.files.pickle_reader import PickleContents, read_pickle
from convert.files.records import Contents, StorageRecord
from convert.files.zip_reader import bytes_behind

MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # a whole number of ten bytes
MAGIC_PICKLE = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\x0a" + re.escape(MAGIC) + rb"\x94?\.", re.DOTALL)
HOSTILE = re.compile("exceeds the limit for bytes|a pickle behind")
OLD_CALL = re.compile(r"\(opcode (INST|OBJ) ")  # these make an object of a class that is named like this:
NAMED = re.compile(rb"[ci]([A-Za-z_][\w.]*)\n([A-Za-z_][\w.]*)\n|\x93")
MOST_SEARCHED = 64 << 20  # bytes
NAME = re.compile(r"[\w.<>]+", re.ASCII)
KNOWN_NAMES = tuple(str(name) for name in (*CONSTRUCTORS, *STORAGE_DTYPES, *DTYPES))
PROTOCOL = 1001
COUNT_BYTES = 8
SMALL_PICKLE_BYTES = 4096  # of each of the first three


def is_torch_stream(head: bytes, size: int) -> bool:
    return MAGIC_PICKLE.match(head) is not None


def read_torch_stream(data: memoryview) -> Contents:
    """Read everything but the storages; check that each has its place.

    The format has no checksums. What no writer makes and no program would run is damage, not danger.
    """
    try:
        return read_whole(data)
    except UnsafeFileError as error:
        is_code = error.names and not all(map(is_misspelt, error.names))
        if is_code or HOSTILE.search(str(error)) or (OLD_CALL.search(str(error)) and names_others(data)):
            raise
        raise CorruptFileError(f"is damaged: it {error}") from None


def names_others(data: memoryview) -> bool:
    """Whether text in the file names code that is not known to be harmless."""
    found = ((m[1] or b"").decode() + "." + (m[2] or b"").decode() for m in NAMED.finditer(data, 0, MOST_SEARCHED))
    return any(not full.endswith(KNOWN_NAMES) and not is_misspelt(full) for full in found)  # text may stand before it


def is_misspelt(name: str) -> bool:
    """Whether a name of code is one of those we know with a damaged byte or two, or no name at all."""
    near = (known for known in KNOWN_NAMES if len(known) == len(name))
    return not NAME.fullmatch(name) or any(sum(map(str.__ne__, known, name)) <= 2 for known in near)


def read_whole(data: memoryview) -> Contents:
    magic = MAGIC_PICKLE.match(bytes(data[:64]))
    assert magic is not None  # `is_torch_stream` has looked
    position = read_preamble(data, magic.end())
    pickle = bytes(data[position : position + LIMITS.pickle_bytes])
    is_cut = len(pickle) == LIMITS.pickle_bytes
    sizes: dict[str, tuple[int, int]] = {}  # key -> elements, bytes of one

    def note_storage(key: str, count: int, width: int) -> StorageRecord:
        sizes[key] = count, width
        return StorageRecord(key, 0, count * width, "little", crc=None)

    try:
        first = read_pickle(pickle, note_storage, views=True)
    except CorruptFileError:
        if is_cut:
            check_limit("bytes of the pickle", len(data) - position, LIMITS.pickle_bytes)
        raise
    keys, position = read_keys(data, position + first.end)
    if missing := sorted(sizes.keys() - set(keys)):
        raise UnsafeFileError(f"refers to storage {missing[0]}, which is not in its list of storages")
    if unused := sorted(set(keys) - sizes.keys()):
        raise UnsafeFileError(f"has {len(unused)} storages that its pickle does not refer to, first {shown(unused[0])}")
    announced = position + sum(COUNT_BYTES + count * width for count, width in sizes.values())
    if announced > len(data):
        raise CorruptFileError(f"ends after {part_text(len(data), announced)} that it announces")
    places: dict[str, StorageRecord] = {}
    for key in keys:
        count, width = sizes[key]
        found = int.from_bytes(data[position : position + COUNT_BYTES], "little")
        if found != count:
            raise UnsafeFileError(f"gives storage {key} two lengths: {count} in its pickle, {found} before its bytes")
        places[key] = StorageRecord(key, position + COUNT_BYTES, count * width, "little", crc=None)
        position += COUNT_BYTES + count * width
    second = read_pickle(pickle, lambda key, count, width: places[key], views=True)
    return Contents(
        "torch stream",
        second.root,
        foreign=second.foreign,
        calls=second.calls,
        passed_over=tuple(bytes_behind(data, announced)),
    )


def read_preamble(data: memoryview, position: int) -> int:
    """Check the version and the description of the machine. Returns the position after them."""
    version = small_pickle(data, position)
    if type(version.root) is not int or version.root != PROTOCOL:
        raise UnsupportedFileError(
            f"is in torch's stream format of version {shown(str(version.root), 40)}; {PROTOCOL} is read"
        )
    position += version.end
    machine = small_pickle(data, position)
    # The storages are little-endian whatever `little_endian` says: it is about the machine, and torch ignores it, too.
    if type(machine.root) is not dict or machine.root.get("protocol_version") != PROTOCOL:
        raise UnsafeFileError("does not say which version of torch's stream format its object is in")
    if type(machine.root.get("little_endian")) is not bool:
        raise UnsafeFileError("has an unknown byte order in its description of the machine that wrote it")
    return position + machine.end


def read_keys(data: memoryview, position: int) -> tuple[list[str], int]:
    """The keys of the storages in the order of their bytes, and the position after the list."""
    listed = read_pickle(bytes(data[position : position + LIMITS.text_bytes]), no_storage)
    keys = listed.root
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise UnsafeFileError("has a list of storages that is not a list of texts")
    if len(set(keys)) != len(keys):
        raise UnsafeFileError("has a storage twice in its list of storages")
    return keys, position + listed.end


def small_pickle(data: memoryview, position: int) -> PickleContents:
    return read_pickle(bytes(data[position : position + SMALL_PICKLE_BYTES]), no_storage)


def no_storage(key: str, count: int, width: int) -> StorageRecord:
    raise UnsafeFileError(f"refers to storage {key} where no weights can be")
