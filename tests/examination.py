"""What must hold of every file, whatever is in it: the examination that fuzzing puts the readers through.

`examine` reads a file as `open_checkpoint` does, only from memory. A file may be refused, by an error of ours whose
text can be shown. If it is accepted, each weight must lie inside the file, and other programs must find the same in it:
Python's zipfile the same bytes, Python's unpickler (with a class lookup that finds nothing but stand-ins) the same
tensors, the safetensors library the same header and data.

It is no test of its own: `test_fuzzing.py` calls it on a few hundred files, `scripts/checks/fuzz_readers.py` on
millions.
"""

import codecs
import io
import mmap
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostile import MAGIC, assert_showable

import convert.files.kinds  # noqa: F401 - imported when it is needed, which is no event of the file's
from convert.actions.tensor_set import tensors_of
from convert.errors import CheckpointError, named
from convert.files.pickle_reader import read_pickle
from convert.files.reader import CheckpointFile, read_contents
from convert.files.records import DTYPE_WIDTHS, GlobalName, Inert, StorageRecord, TensorRecord

HARMLESS = {"mmap.__new__", "builtins.id"}  # events that reading causes, whatever the file holds


def examine(data: bytes) -> str:
    """Read a file and hold it against what must be true. Returns its container, or why it was not read in one word.

    Raises AssertionError for a fault of the reader, or whatever error it let through.
    """
    outcome = examine_file(data)
    if data[:1] == b"\x80" and not data.startswith(MAGIC):  # a pickle alone is no checkpoint, but it can be read
        return examine_pickle(data)
    return outcome


def examine_file(data: bytes) -> str:
    with watched():
        try:
            file = open_in_memory(data)
            records = list(tensors_in(file.root))
            for record in records:
                file.verify(record)
                assert len(file.storage_bytes(record)) == record.storage.nbytes
            tensors_of(file.root)
        except CheckpointError as error:
            assert_showable(str(error if error.named else named(error, "model.ckpt")))
            return "refused"
    for record in records:
        assert_inside(record, len(data))
    if file.container == "torch zip":
        assert_zipfile_agrees(file, data)
    elif file.container == "torch stream":
        assert_same_pickle(file.root, data, before=3)  # the magic number, the version and the machine
    else:
        assert_library_agrees(file, data)
    file.close()
    return file.container


def examine_pickle(data: bytes) -> str:
    """The same of a pickle without a container: whatever storages it asks for are there."""

    def find_storage(key: str, count: int, width: int) -> StorageRecord:
        return StorageRecord(key, 0, min(count, 64) * width, "little", crc=None)

    with watched():
        try:
            contents = read_pickle(data, find_storage)
        except CheckpointError as error:
            assert_showable(str(named(error, "model.ckpt")))
            return "refused"
    for record in tensors_in(contents.root):
        assert_inside(record, sys.maxsize)
    assert_same_pickle(contents.root, data[: contents.end])
    return "pickle"


def open_in_memory(data: bytes) -> CheckpointFile:
    mapping = mmap.mmap(-1, max(1, len(data)))
    mapping[: len(data)] = data
    with memoryview(mapping) as view, view[: len(data)] as file:
        return CheckpointFile(Path("model.ckpt"), mapping, read_contents(Path("model.ckpt"), file))


def tensors_in(root: object) -> Iterator[TensorRecord]:
    """All tensors, those inside placeholders included, each once; the data may be cyclic or exponentially large."""
    seen, todo = set(), [root]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, TensorRecord):
            yield value
        elif isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, (list, tuple)):
            todo.extend(value)
        elif isinstance(value, Inert):
            todo.extend((value.args, value.state, value.items))


def assert_inside(record: TensorRecord, size: int) -> None:
    """Every element lies inside its storage, and the storage inside the file."""
    storage = record.storage
    in_file = storage.nbytes if storage.deflated is None else storage.deflated
    assert 0 <= storage.offset <= storage.offset + in_file <= size, record
    assert record.dtype in DTYPE_WIDTHS
    assert len(record.shape) == len(record.stride)
    assert min((0, *record.shape, *record.stride)) == 0 <= record.offset
    if 0 not in record.shape:
        last = record.offset
        for length, step in zip(record.shape, record.stride, strict=True):
            last += (length - 1) * step
        assert (last + 1) * DTYPE_WIDTHS[record.dtype] <= storage.nbytes, record


# Nothing may happen while a file is read

_events: list[str] | None = None
_is_hooked = False


def _note(event: str, args: tuple) -> None:
    if _events is not None and event not in HARMLESS:
        _events.append(f"{event}{args!r:.200}")


@contextmanager
def watched() -> Iterator[None]:
    """No import, no compiled or executed code, no opened file, no process, no socket inside the block.

    The interpreter reports those and many others as audit events (PEP 578); none but the mapping of memory is expected.
    """
    global _events, _is_hooked
    if not _is_hooked:
        for codec in ("ascii", "latin-1", "unicode_escape", "raw_unicode_escape"):  # imported when they are first used
            codecs.lookup(codec)
        sys.addaudithook(_note)  # there is no way to take it away again
        _is_hooked = True
    _events = []
    try:
        yield
        assert not _events, f"reading a file caused {_events[:3]}"
    finally:
        _events = None


# Other programs must find the same


def assert_zipfile_agrees(file: CheckpointFile, data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        by_place = {info.header_offset: info for info in archive.infolist()}
        assert len(by_place) == len(archive.namelist()) == len(set(archive.namelist()))
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
        folder = pickled.partition("/")[0]
        checked = any(info.CRC for info in archive.infolist())
        for record in tensors_in(file.root):
            info = archive.getinfo(f"{folder}/data/{record.storage.key}")
            if checked:
                assert archive.read(info) == bytes(file.storage_bytes(record))
            else:
                assert info.file_size == record.storage.nbytes
        if checked:
            assert_same_pickle(file.root, archive.read(pickled))


def assert_library_agrees(file: CheckpointFile, data: bytes) -> None:
    import safetensors

    theirs = dict(safetensors.deserialize(data))
    assert theirs.keys() == file.root.keys()
    for name, record in file.root.items():
        assert tuple(theirs[name]["shape"]) == record.shape
        assert bytes(theirs[name]["data"]) == bytes(file.storage_bytes(record))


def assert_same_pickle(ours: object, data: bytes, before: int = 0) -> None:
    """Python's own machine must make the same of it. Called with what we have accepted only.

    before  how many pickles come first
    """
    stream = io.BytesIO(data)
    try:
        theirs = [Unpickler(stream).load() for _ in range(before + 1)][before]
    except (pickle.UnpicklingError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
        return  # inside a placeholder we keep what Python cannot make: a set of lists, a state that is no dict
    assert_same(ours, theirs)


class StandIn:
    """An object of a class that the pickle names: keeps what it was made from."""

    module = name = ""

    def __new__(cls, *args: object) -> "StandIn":
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def add(self, item: object) -> None:
        pass


class Unpickler(pickle.Unpickler):
    """Python's unpickler without any of its powers: no class is looked up, names give stand-ins of our own."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.classes: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        made = type("Named", (StandIn,), {"module": module, "name": name})
        return self.classes.setdefault((module, name), made)

    def persistent_load(self, pid: object) -> tuple:
        return ("persistent", pid)


def assert_same(ours: object, theirs: object) -> None:
    """Compare what we read with what Python's unpickler made of it; both may be cyclic or exponentially large."""
    seen, todo = set(), [(ours, theirs)]
    while todo:
        mine, other = todo.pop()
        if (id(mine), id(other)) in seen:
            continue
        seen.add((id(mine), id(other)))
        if isinstance(mine, TensorRecord):
            assert_same_tensor(mine, other)
        elif isinstance(mine, StorageRecord):
            assert other[0] == "persistent"
            assert other[1][2] == mine.key or len(other[1]) == 6
        elif isinstance(mine, GlobalName):
            if mine != GlobalName("collections", "OrderedDict"):
                assert (other.module, other.name) == (mine.module, mine.name)
        elif isinstance(mine, Inert):
            if isinstance(other, StandIn):
                assert (other.module, other.name) == (mine.name.module, mine.name.name)
            else:
                assert mine.name in (GlobalName("builtins", "set"), GlobalName("builtins", "frozenset"))
        elif isinstance(other, StandIn):  # a number of numpy, or bytes as protocol 2 writes them
            assert other.name in ("scalar", "encode")
            assert other.name != "encode" or other.args[0].encode("latin-1") == mine
        elif isinstance(mine, dict):
            assert isinstance(other, dict)
            assert len(mine) == len(other)
            todo.extend(zip(mine.keys(), other.keys(), strict=True))
            todo.extend(zip(mine.values(), other.values(), strict=True))
        elif isinstance(mine, (list, tuple)):
            assert type(mine) is type(other)
            todo.extend(zip(mine, other, strict=True))
        else:
            assert type(mine) is type(other)
            assert mine == other or (mine != mine and other != other)


def assert_same_tensor(record: TensorRecord, stand_in: StandIn) -> None:
    if stand_in.name == "_rebuild_parameter":
        stand_in = stand_in.args[0]
    (_, pid), offset, size, stride = stand_in.args[:4]
    assert stand_in.name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3")
    assert (record.shape, record.stride, record.storage.key) == (size, stride, pid[2])
    assert record.offset == (offset if record.numel else 0)
