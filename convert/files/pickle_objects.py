"""The few objects of a pickle that we build ourselves, each checked against what really is in the file.

Everything here is arithmetic on integers: no tensor is made, no byte of a storage is read.
"""

import struct
from collections.abc import Callable
from dataclasses import replace

from convert.errors import UnsafeFileError, shown
from convert.files.limits import LIMITS, check_growth, check_limit
from convert.files.pickle_names import (
    BUILTIN_TYPES,
    BYTE_MAKERS,
    CONSTRUCTORS,
    DTYPES,
    ENCODE,
    FROM_CPU,
    FROM_TYPE,
    GETATTR,
    GETITEM,
    NUMPY_DTYPE,
    NUMPY_SCALARS,
    OLD_PARAMETER,
    OTHER_DTYPES,
    PARAMETER,
    PARAMETER_WITH_STATE,
    QUANTISED_WIDTHS,
    STORAGE_DTYPES,
    TENSOR_TYPES,
    TENSOR_V1,
    TENSOR_V3,
    TENSORS,
    TYPE,
    TYPING,
    is_let_through,
)
from convert.files.records import DTYPE_WIDTHS, GlobalName, Inert, StorageRecord, TensorRecord

NUMPY_NUMBERS = {  # numpy's name of a type -> struct's
    **{"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
    **{"f2": "e", "f4": "f", "f8": "d"},
}
NUMPY_ORDERS = {"<": "<", ">": ">", "|": "<"}
INT64_MAX = 2**63 - 1

# (key, elements, bytes of one, as the pickle claims) -> where it lies; raises CheckpointError for an unknown key
FindStorage = Callable[[str, int, int], StorageRecord]


class Objects:
    """Builds storages, tensors and numpy numbers; keeps count of what the pickle asked for."""

    def __init__(self, find_storage: FindStorage, views: bool = False):
        self.find_storage = find_storage
        self.views = views
        self.windows: dict[str, StorageRecord] = {}  # of storages that are part of another one
        self.storages: dict[str, StorageRecord] = {}
        self.types: dict[str, str | None] = {}  # key -> dtype of the storage, None if untyped
        self.networks: set[GlobalName] = set()  # classes whose source text stands in the file
        self.tensors = 0
        self.tensor_bytes = 0

    def storage(self, persistent_id: object) -> StorageRecord | GlobalName:
        """("storage", type, key, location, element count): the location (which GPU) does not matter.

        The stream format has a sixth field: None, or which part of the storage is meant. It may also name the class of
        a network, with its source text, which nobody runs: ("module", class, file, text).
        """
        fields = 6 if self.views else 5
        match persistent_id:
            case ("module", GlobalName() as network, *_) if self.views:
                self.networks.add(network)
                return network
            case ("storage", GlobalName() as storage_type, str(key), str(), int(count), *view) if (
                type(count) is int and 5 + len(view) == fields
            ):
                pass
            case _:
                raise UnsafeFileError(
                    f"has a persistent id that is not a storage of {'six' if self.views else 'five'} fields"
                )
        if storage_type not in STORAGE_DTYPES:
            raise UnsafeFileError(f"has a storage of the unknown type {shown(str(storage_type))}")
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise UnsafeFileError(f"has a storage whose key is not a plain number: '{shown(key)}'")
        dtype = STORAGE_DTYPES[storage_type]
        width = DTYPE_WIDTHS.get(dtype) or QUANTISED_WIDTHS.get(dtype, 1)
        if not 0 <= count <= INT64_MAX // width:
            raise UnsafeFileError(
                f"claims {shown(str(count * width), 40)} bytes for storage {key}, which is out of range"
            )
        if key not in self.storages:
            self.storages[key] = self.find_storage(key, count, width)
            self.types[key] = dtype
        record = self.storages[key]
        if self.types[key] != dtype:
            raise UnsafeFileError(f"gives storage {key} two types, {self.types[key]} and {dtype}")
        claimed = count * width
        if claimed != record.nbytes:
            raise UnsafeFileError(f"claims {claimed} bytes for storage {key}, which has {record.nbytes}")
        return record if view in ([], [None]) else self.window(record, width, view[0])

    def window(self, whole: StorageRecord, width: int, view: object) -> StorageRecord:
        """(key, offset, element count): a part of a storage with a key of its own."""
        match view:
            case (str(key), int(offset), int(count)) if type(offset) is int and type(count) is int:
                pass
            case _:
                raise UnsafeFileError(f"has a view of storage {whole.key} that is not a key and two numbers")
        if offset < 0 or count < 0 or (offset + count) * width > whole.nbytes:
            raise UnsafeFileError(
                f"has a view that claims elements {offset} to {offset + count} of storage {whole.key}, which has "
                f"{whole.nbytes // width}"
            )
        part = replace(whole, offset=whole.offset + offset * width, nbytes=count * width)
        if self.windows.setdefault(key, part) != part:
            raise UnsafeFileError(f"has two different views by the name '{shown(key)}'")
        return part

    def build(self, name: GlobalName, args: tuple) -> object:
        """Call one of the constructors that we know; for every other name a placeholder."""
        if name in TENSORS:
            return self.tensor(name, args)
        if name in (PARAMETER, PARAMETER_WITH_STATE, OLD_PARAMETER):
            return parameter(name, args)
        if name in FROM_TYPE:
            return self.from_type(name, args)
        if name == FROM_CPU:
            return from_cpu(name, args)
        if name == ENCODE:
            return encoded(name, args)
        if name == NUMPY_DTYPE:
            return Inert(name, args)  # a BUILD with the byte order follows
        if name in NUMPY_SCALARS:
            return numpy_scalar(name, args)
        if name in GETATTR:
            return attribute(name, args)
        if name in GETITEM:
            return subscript(name, args)
        if name in TYPE and args != (None,):
            raise UnsafeFileError(f"calls {name} for something other than None")
        return placeholder(name, args)

    def from_type(self, name: GlobalName, args: tuple) -> object:
        """_rebuild_from_type_v2(function, type, arguments, state): a tensor with attributes, or of its own class."""
        match args:
            case (GlobalName() as function, GlobalName() as kind, tuple(inner), _) if kind in TENSOR_TYPES:
                if function in TENSORS:
                    return self.tensor(function, inner)
                if function in (PARAMETER, PARAMETER_WITH_STATE):
                    return parameter(function, inner)
        return Inert(name, args)

    def tensor(self, name: GlobalName, args: tuple) -> TensorRecord | Inert:
        """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None)

        _rebuild_tensor_v3 has the dtype before the metadata; its storage is untyped. _rebuild_tensor ends after the
        stride. A tensor of a dtype that no weight has stays unread, and so does one that is to be conjugated or negated
        by whoever reads it, as its metadata say.
        """
        fixed = {TENSOR_V1: 4, TENSOR_V3: 7}.get(name, 6)
        most = fixed if name == TENSOR_V1 else fixed + 1
        if not fixed <= len(args) <= most or type(args[0]) is not StorageRecord:
            raise UnsafeFileError("has a tensor that is not built from a storage")
        storage, offset, size, stride = args[:4]
        requires_grad, hooks = args[4:6] or (False, None)
        dtype = self.types[storage.key]
        if name == TENSOR_V3:
            if dtype is not None or type(args[6]) is not GlobalName:
                raise UnsafeFileError("has a tensor with two dtypes")
            dtype = DTYPES.get(args[6])
            if args[6] in OTHER_DTYPES:
                return Inert(name, args)
        if dtype in QUANTISED_WIDTHS:
            return Inert(name, args)
        if dtype is None:
            raise UnsafeFileError("has a tensor without a dtype")
        if type(requires_grad) is not bool or not _is_empty(hooks):
            raise UnsafeFileError("has a tensor with hooks or other extras")
        if any(not _is_empty(metadata) for metadata in args[fixed:]):
            return Inert(name, args)
        if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
            raise UnsafeFileError("has a tensor whose sizes and strides do not go together")
        check_limit("dimensions of a tensor", len(size), LIMITS.dimensions)
        if not all(type(number) is int and 0 <= number <= INT64_MAX for number in (offset, *size, *stride)):
            raise UnsafeFileError("has a tensor with sizes, strides or offset out of range")
        self.tensors += 1
        check_limit("tensors", self.tensors, LIMITS.tensors)
        if 0 in size:
            return TensorRecord(dtype, size, stride, storage, 0)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        claimed = (last + 1) * DTYPE_WIDTHS[dtype]
        if claimed > storage.nbytes:
            raise UnsafeFileError(
                f"has a tensor that claims {claimed} bytes of storage {storage.key}, which has {storage.nbytes}"
            )
        record = TensorRecord(dtype, size, stride, storage, offset)
        self.tensor_bytes += record.nbytes
        return record

    def check_growth(self) -> None:
        """Stride 0 and shared storages are legitimate, but must not make gigabytes out of a small file."""
        stored = sum(storage.nbytes for storage in self.storages.values())
        check_growth("bytes of all tensors", self.tensor_bytes, stored)


def parameter(name: GlobalName, args: tuple) -> TensorRecord | Inert:
    """_rebuild_parameter(data, requires_grad, hooks), with a state behind it in _rebuild_parameter_with_state

    Parameter(data, requires_grad=True) in torch before 0.4.
    """
    data = args[0] if args else None
    if type(data) is Inert and is_tensor_name(data.name):
        return Inert(name, args)  # a quantised or sparse one
    if type(data) is not TensorRecord or len(args) not in {OLD_PARAMETER: (1, 2), PARAMETER: (3,)}.get(name, (4,)):
        raise UnsafeFileError("has a parameter that holds no tensor")
    if not all(type(flag) is bool for flag in args[1:2]) or not all(_is_empty(hooks) for hooks in args[2:3]):
        raise UnsafeFileError("has a parameter with hooks or other extras")
    return data


def is_tensor_name(name: GlobalName) -> bool:
    return name.module in ("torch._utils", "torch._tensor")


def from_cpu(name: GlobalName, args: tuple) -> TensorRecord | Inert:
    """_rebuild_device_tensor_from_cpu_tensor(data, dtype, device, requires_grad)"""
    match args:
        case (TensorRecord() as data, GlobalName() as dtype, _, _) if DTYPES.get(dtype) == data.dtype:
            return data
    return Inert(name, args)


def attribute(name: GlobalName, args: tuple) -> GlobalName | Inert:
    """getattr(Class, "Inner"): a name again. Of an object, something that stays unread."""
    match args:
        case (GlobalName() as owner, str(inner)) if is_let_through(
            found := replace(owner, name=f"{owner.name}.{inner}")
        ):
            return found
        case (Inert(), str()):
            return Inert(name, args)
    raise UnsafeFileError(f"calls {name} for something other than a part of a class")


def subscript(name: GlobalName, args: tuple) -> Inert:
    """getitem(Dict, (str, int)): a type."""
    match args:
        case (GlobalName() as generic, _) if generic in TYPING:
            return Inert(name, args)
    raise UnsafeFileError(f"calls {name} for something other than a type")


def encoded(name: GlobalName, args: tuple) -> bytes | Inert:
    """_codecs.encode(text, "latin1"): how protocol 2 writes bytes. Long ones (old arrays) stay unread."""
    if len(args) != 2 or type(args[0]) is not str or args[1] not in ("latin1", "latin-1"):
        raise UnsafeFileError("encodes something other than text as latin1")
    if len(args[0]) > LIMITS.encoded_characters:
        return Inert(name, args)
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError:
        raise UnsafeFileError("encodes text that is not latin1") from None


def numpy_scalar(name: GlobalName, args: tuple) -> int | float | bool | Inert:
    """numpy.core.multiarray.scalar(dtype, bytes): a score or a counter. Text, dates and the like stay unread."""
    match args:
        case (Inert(name=GlobalName("numpy", "dtype"), args=(str(kind), *_), state=(_, str(order), *_)), bytes(data)):
            if kind in NUMPY_NUMBERS and order in NUMPY_ORDERS:
                layout = NUMPY_ORDERS[order] + NUMPY_NUMBERS[kind]
                if len(data) == struct.calcsize(layout):
                    return struct.unpack(layout, data)[0]
    return Inert(name, args)


def placeholder(name: GlobalName, args: tuple) -> Inert:
    """What every unknown class becomes. Of the names we know, some may be mentioned but not called."""
    if name in CONSTRUCTORS or name in STORAGE_DTYPES or name in DTYPES or (name in BUILTIN_TYPES and args):
        raise UnsafeFileError(f"makes an object of {name}, which may only be mentioned")
    if name in BYTE_MAKERS and any(type(argument) is int for argument in args):
        raise UnsafeFileError(f"calls {name} with an integer, which asks for memory")
    return Inert(name, args)


def described_call(name: GlobalName, args: tuple) -> str:
    """A call as the user is told of it, safe to print: pkg.ProxyCommand("nc host", ...)."""
    pieces = []
    for value in args[:4]:
        if type(value) is str:
            pieces.append(f'"{shown(value, 40)}"')
        elif type(value) in (bool, float, type(None)) or (type(value) is int and abs(value) < 2**64):
            pieces.append(str(value))
        else:
            pieces.append(shown(str(value), 60) if type(value) is GlobalName else "...")
    return f"{shown(str(name), 100)}({', '.join(pieces + ['...'] * (len(args) > 4))})"


def _is_empty(value: object) -> bool:
    """No hooks: an empty dictionary, or None as old torch wrote it. No metadata: also flags that are all off."""
    return value is None or (type(value) is dict and all(flag is False for flag in value.values()))
