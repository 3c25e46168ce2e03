"""Open a foreign model, a file or a folder: decide what it is, check it, locate its tensors.

    with open_checkpoint("v1-5-pruned-emaonly.ckpt") as file:
        record = file.root["state_dict"]["betas"]
        file.verify(record)
        values = numpy.frombuffer(file.storage_bytes(record), record.dtype)

The file is mapped once; what was checked is what is used. Weights are read only when asked for.
"""

import mmap
import os
import stat
import threading
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from convert.errors import CheckpointError, CorruptFileError, UnsupportedFileError, named, shown
from convert.files.limits import LIMITS
from convert.files.records import DTYPE_WIDTHS, Contents, StorageRecord, TensorRecord
from convert.files.safetensors_reader import is_safetensors, read_safetensors
from convert.files.torch_stream_reader import is_torch_stream, read_torch_stream
from convert.files.torch_zip_reader import is_zip, read_torch_zip
from convert.files.zip_reader import inflate, wrong_checksum

if TYPE_CHECKING:
    from convert.files.diffusers_folder import FolderContents

READERS: tuple[tuple[Callable[[bytes, int], bool], Callable[[memoryview], Contents]], ...] = (
    # whether the first bytes (and the size) are of this kind, how to read it
    (is_zip, read_torch_zip),
    (is_torch_stream, read_torch_stream),
    (is_safetensors, read_safetensors),
)


SHORTER = "became shorter while it was read"
MAPPED: "weakref.WeakKeyDictionary[mmap.mmap, str]" = weakref.WeakKeyDictionary()  # what to call each in errors


class Span(NamedTuple):
    """Bytes of an open file."""

    descriptor: int
    offset: int
    nbytes: int


class CheckpointFile:
    """An open checkpoint. `root` is plain data with the leaves described in `convert/files/records.py`."""

    def __init__(
        self,
        path: Path,
        mapping: mmap.mmap,
        contents: Contents,
        called: str | None = None,
        descriptor: int | None = None,
    ):
        self.path = path
        self.called = called or path.name  # in errors
        self.size = len(mapping)
        self.container = contents.container  # "torch zip", "torch stream" or "safetensors"
        self.root = contents.root
        self.metadata = contents.metadata  # of safetensors; {} otherwise
        self.foreign = contents.foreign  # names of the placeholders, sorted
        self.calls = contents.calls  # what other programs would call
        self.passed_over = contents.passed_over  # what changes no weight
        self.configs: dict[str, dict] = {}  # of a folder's components
        self.component: str | None = None  # of diffusers' layout, alone in its folder
        self.absent: dict[str, str] = {}  # component that a folder lacks -> why
        self.notes: tuple[str, ...] = ()  # which of several weights in a folder were taken
        self._descriptor = descriptor
        self._close_descriptor = weakref.finalize(self, os.close, descriptor) if descriptor is not None else None
        self._mapping = mapping
        self._view = memoryview(mapping)
        self._lock = threading.Lock()  # for the two tables below
        self._storage_locks: dict[int, threading.Lock] = {}  # by offset in the file
        self._verified: set[int] = set()
        self._inflated: dict[int, bytearray] = {}

    def storage_bytes(self, record: TensorRecord) -> memoryview:
        """All bytes of the tensor's storage. Writable; writing changes this process's copy, never the file."""
        storage = record.storage
        if storage.deflated is None:
            return self._view[storage.offset : storage.offset + storage.nbytes]
        with self._storage_lock(storage):
            if storage.offset not in self._inflated:
                packed = self._view[storage.offset : storage.offset + storage.deflated]
                try:
                    self._inflated[storage.offset] = inflate(packed, storage.nbytes, f"data/{storage.key}")
                except CheckpointError as error:
                    raise named(error, self.called) from None
            return memoryview(self._inflated[storage.offset])

    def span(self, record: TensorRecord) -> Span | None:
        """Where a tensor's bytes lie in the file, if they are stored row by row and little-endian."""
        storage, width = record.storage, DTYPE_WIDTHS[record.dtype]
        as_they_are = storage.deflated is None and record.is_contiguous
        if self._descriptor is None or not as_they_are or (storage.byteorder != "little" and width > 1):
            return None
        return Span(self._descriptor, storage.offset + record.offset * width, record.nbytes)

    def kept(self) -> "CheckpointFile":
        """The same bytes, to be read on after this one is closed."""
        other = copy(self)
        other._descriptor = None if self._descriptor is None else os.dup(self._descriptor)
        other._close_descriptor = other._descriptor and weakref.finalize(other, os.close, other._descriptor)
        other._view, other._inflated = memoryview(self._mapping), {}
        return other

    def check_length(self) -> None:
        """Raise CorruptFileError if another program has made the file shorter."""
        if self._mapping in MAPPED and is_shorter(self._mapping):  # the rest of its last page reads as zeros
            raise named(CorruptFileError(SHORTER), self.called)

    def verify(self, record: TensorRecord) -> None:
        """Check the file's length and the storage's CRC-32, the latter once; may be called from several threads."""
        self.check_length()
        storage = record.storage
        if storage.crc is None:
            return
        data = self.storage_bytes(record)
        with self._storage_lock(storage):
            if storage.offset in self._verified:
                return
            if zlib.crc32(data) != storage.crc:
                stored = self._view[storage.offset : storage.offset + (storage.deflated or storage.nbytes)]
                raise named(wrong_checksum(stored, storage.offset, f"data/{storage.key}"), self.called)
            self._verified.add(storage.offset)

    def release(self, record: TensorRecord) -> None:
        """Give the memory of a storage back. Bytes written to it are lost."""
        storage = record.storage
        if storage.deflated is not None:
            self._inflated.pop(storage.offset, None)
            return
        page = mmap.PAGESIZE
        start = -(-storage.offset // page) * page
        length = (storage.offset + storage.nbytes) // page * page - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED, start, length)

    def close(self) -> None:
        """Unmap the file, or as soon as no view of its bytes is left."""
        self._inflated.clear()
        if self._close_descriptor:
            self._close_descriptor()
        try:
            self._view.release()
            self._mapping.close()
        except BufferError:
            pass

    def __enter__(self) -> "CheckpointFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        """Close; a CheckpointError raised inside the `with` block gets the file's name in front.

        Raises CorruptFileError if the file has become shorter in the block.
        """
        try:
            if error is None:
                self.check_length()
        finally:
            self.close()
        if isinstance(error, CheckpointError) and not error.named:
            raise named(error, self.called) from None

    def _storage_lock(self, storage: StorageRecord) -> threading.Lock:
        with self._lock:
            return self._storage_locks.setdefault(storage.offset, threading.Lock())


def release_after_last(file: CheckpointFile, records: Iterable[TensorRecord]) -> Callable[[TensorRecord], None]:
    """Returns a function to call once with each record when its tensor is no longer needed, from any thread.

    A storage that several tensors share is released after the last of them, so that it is read and inflated once.
    """
    users = Counter(record.storage for record in records)
    lock = threading.Lock()

    def release(record: TensorRecord) -> None:
        with lock:
            users[record.storage] -= 1
            last = users[record.storage] == 0
        if last:
            file.release(record)

    return release


@contextmanager
def checksums_ahead(file: CheckpointFile, records: Iterable[TensorRecord]) -> Iterator[None]:
    """Check checksums in a background thread, the largest tensors first, while the block runs.

    No checksum is checked twice; a wrong one is raised where its tensor is used. Inside the block, do not write to the
    tensors' bytes.
    """
    ended = threading.Event()
    order = sorted((record for record in records if record.storage.deflated is None), key=lambda record: -record.nbytes)

    def check() -> None:
        for record in order:
            if ended.is_set():
                return
            with suppress(CheckpointError):
                file.verify(record)
            file.release(record)  # or all of the file would be in memory before anything is used

    thread = threading.Thread(target=check, daemon=True)
    try:
        with suppress(RuntimeError):  # where no further thread can be started
            thread.start()
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


@contextmanager
def errors_named(file: CheckpointFile) -> Iterator[None]:
    """Put this file's name in front of a CheckpointError raised inside, where several files are open."""
    try:
        yield
    except CheckpointError as error:
        raise error if error.named else named(error, file.called) from None


class CheckpointFiles(CheckpointFile):
    """Several open files used as one: `StorageRecord.file` is the index of each."""

    files: list[CheckpointFile]

    def storage_bytes(self, record: TensorRecord) -> memoryview:
        return self.files[record.storage.file].storage_bytes(record)

    def span(self, record: TensorRecord) -> Span | None:
        return self.files[record.storage.file].span(record)

    def kept(self) -> "CheckpointFiles":
        other = copy(self)
        other.files = [file.kept() for file in self.files]
        return other

    def check_length(self) -> None:
        for file in self.files:
            file.check_length()

    def verify(self, record: TensorRecord) -> None:
        self.files[record.storage.file].verify(record)

    def release(self, record: TensorRecord) -> None:
        self.files[record.storage.file].release(record)

    def close(self) -> None:
        for file in self.files:
            file.close()


class CheckpointFolder(CheckpointFiles):
    """An open folder of diffusers' layout."""

    def __init__(self, path: Path, contents: "FolderContents", called: str):
        self.path = path
        self.called = called
        self.files: list[CheckpointFile] = contents.files
        self.size = sum(file.size for file in self.files)
        self.container = "diffusers folder"
        self.root = contents.root
        self.metadata = {}
        self.foreign = tuple(sorted({name for file in self.files for name in file.foreign}))
        self.calls = tuple(sorted({call for file in self.files for call in file.calls}))
        self.passed_over = tuple(f"{file.called}: {what}" for file in self.files for what in file.passed_over)
        self.configs = contents.configs
        self.component = contents.component
        self.absent, self.notes = contents.absent, contents.notes


class JoinedFiles(CheckpointFiles):
    """Two open files or folders as one: the contents of the first, and access to the tensors of the second."""

    def __init__(self, first: CheckpointFile, second: CheckpointFile):
        own, lent = (file.files if isinstance(file, CheckpointFiles) else [file] for file in (first, second))
        self.files = [*own, *lent]
        self.first, self.second = first, second
        self.path, self.called = first.path, f"{first.called}, with {second.called},"
        self.size, self.container, self.root = first.size, first.container, first.root
        self.metadata, self.foreign, self.configs = first.metadata, first.foreign, first.configs
        self.calls, self.passed_over = first.calls, first.passed_over
        self.component, self.absent, self.notes = first.component, first.absent, first.notes
        self._shift = len(own)

    def of_second(self, record: TensorRecord) -> TensorRecord:
        """Where a tensor of the second file is in this one."""
        return replace(record, storage=replace(record.storage, file=record.storage.file + self._shift))


def open_checkpoint(path: str | os.PathLike, *, variant: str | None = None) -> CheckpointFile:
    """Open and check a checkpoint: everything but the weights' checksums, which `verify` checks as they are used.

    path    a file, or a folder that the diffusers library has saved, or the cache of one
    variant of a folder's weights: "fp16", "non_ema", ...; None: the plain ones, or those that there are
    raises  UnsafeFileError, CorruptFileError, UnsupportedFileError (all CheckpointError)
    """
    path = Path(path)
    if not path.is_dir():
        if variant and path.is_file():
            fault = UnsupportedFileError("is a single file, which has no variants. Leave --variant out")
            raise named(fault, path.name)
        return open_file(path, path.name or str(path))
    from convert.files.diffusers_folder import read_folder
    from convert.files.folder_kinds import snapshot_of

    try:
        folder = snapshot_of(path)
        return CheckpointFolder(folder, read_folder(folder, open_file, variant), path.resolve().name or str(path))
    except CheckpointError as error:
        raise error if error.named else named(error, path.resolve().name or str(path)) from None


def open_file(path: Path, called: str) -> CheckpointFile:
    """Open and check one file; errors call it `called`."""
    try:
        descriptor = open_regular(path)
        try:
            mapping = map_file(descriptor, called)
            with memoryview(mapping) as data:
                contents = read_contents(path, data)
        except BaseException:
            os.close(descriptor)
            raise
        return CheckpointFile(path, mapping, contents, called, descriptor)  # which closes it
    except CheckpointError as error:
        raise named(error, called) from None


def map_file(descriptor: int, called: str) -> mmap.mmap:
    """The bytes of a file. Writing to them leaves the file alone. Raises CorruptFileError for one just emptied."""
    try:
        mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    except ValueError:
        raise CorruptFileError(SHORTER) from None
    MAPPED[mapping] = called
    return mapping


def is_shorter(mapping: mmap.mmap) -> bool:
    """Whether another program has made the file shorter. What reads the bytes that are gone gets a signal."""
    return not mapping.closed and mapping.size() < len(mapping)


def open_regular(path: Path) -> int:
    """The descriptor of a regular file that is not empty."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe must not block
    if path.is_dir():
        raise UnsupportedFileError("is a folder, not a checkpoint file. Give the file itself")
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        if path.is_symlink():
            target = shown(os.readlink(path))
            raise UnsupportedFileError(
                f"is a link to {target}, which does not exist. Download the file again"
            ) from None
        raise UnsupportedFileError("does not exist. Check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnsupportedFileError(f"cannot be opened: {shown(reason)}") from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size > 0:
        return descriptor
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UnsupportedFileError("is a pipe or a device, not a checkpoint file")
    raise UnsupportedFileError("is empty (0 bytes): the download failed. Download the file itself")


def read_contents(path: Path, data: memoryview) -> Contents:
    """Pick the reader by content. A file named .safetensors is only read as safetensors."""
    head = bytes(data[: LIMITS.head_bytes])
    only_safetensors = path.name.casefold().endswith(".safetensors")
    for is_kind, read in READERS:
        if is_kind(head, len(data)):
            if only_safetensors and read is not read_safetensors:
                kind = "zip archive, perhaps a pickle checkpoint" if read is read_torch_zip else "pickle checkpoint"
                raise UnsupportedFileError(
                    f"is named .safetensors, but is a {kind}. Get the model's real .safetensors file"
                )
            return read(data)
    from convert.files.kinds import other_kind

    raise other_kind(data)
