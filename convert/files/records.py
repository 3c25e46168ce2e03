"""The results of the readers: where each tensor lies in the file, and the names of objects that are not built.

A checkpoint read by us is plain data (dict, list, tuple, str, bytes, int, float, bool, None) with these leaves:

TensorRecord   a tensor, described but not read
StorageRecord  bytes of the file; rarely a leaf of its own, never a weight
Inert          an object of somebody else's class, kept unread
GlobalName     a name of somebody else's class, function or type, not looked up
"""

from dataclasses import dataclass, field
from math import prod

DTYPE_WIDTHS = {  # bytes of one element
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex128": 16,
    "complex64": 8,
    "complex32": 4,
}


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """A run of bytes that one or more tensors look at."""

    key: str  # name within its container: "17" for data/17 of a torch zip, the tensor's name in safetensors
    offset: int  # first byte in the file
    nbytes: int  # once inflated
    byteorder: str  # "little" or "big"
    crc: int | None  # CRC-32 of the inflated bytes; None: the container has none
    deflated: int | None = None  # bytes in the file if they are deflated; None: stored as they are
    file: int = 0  # which of the files of a folder it is in


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor: which elements of a storage, in which order. Every element lies inside the storage."""

    dtype: str  # a key of DTYPE_WIDTHS
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    storage: StorageRecord
    offset: int  # in elements; 0 for a tensor without elements

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of a contiguous copy; more than the storage has where a stride is 0."""
        return self.numel * DTYPE_WIDTHS[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps; strides of size-1 dimensions do not matter."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class GlobalName:
    """A name that a pickle mentions. It is a pair of strings: nothing is imported, nothing is looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Inert:
    """An object that a pickle describes and that is not built: its arguments, kept unread.

    Never walk, print or compare args, state or items as a whole: they may be cyclic or exponentially large.
    """

    name: GlobalName
    args: tuple = field(repr=False)
    state: object = field(default=None, repr=False)
    items: tuple | list = field(default=(), repr=False)  # appended, added or set afterwards (deque, set, defaultdict)


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the axes of length 1 at its end: layouts disagree about those."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


@dataclass(frozen=True)
class Contents:
    """The result of reading a container."""

    container: str
    root: object  # plain data with the leaves described above
    metadata: dict[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()  # names of the placeholders, sorted
    calls: tuple[str, ...] = ()  # what other programs would call on loading it
    passed_over: tuple[str, ...] = ()  # what is in the file and changes no weight: stray records, bytes behind the end
