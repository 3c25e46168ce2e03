"""A pickle is a program for a small stack machine. This is that machine with everything that runs code left out.

It knows the opcodes that checkpoints use: constants, containers, a memo, and the three that make objects. Those three
take a name and a tuple; names in our own table make a tensor record or a number, all others an inert placeholder.
Nothing is imported, nothing is looked up, nothing from the file is called.

The opcodes are those of Python's pickle protocols 2 to 5, by the names in `pickletools`.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from convert.errors import CheckpointError, CorruptFileError, UnsafeFileError, UnsupportedFileError, shown, shown_list
from convert.files.limits import LIMITS, check_limit
from convert.files.pickle_names import (
    GETATTR,
    GETITEM,
    OLD_PARAMETER,
    ORDERED_DICT,
    PARAMETER_CONTAINERS,
    TYPE,
    is_harmless,
    is_known,
    is_let_through,
    is_module_class,
    is_name,
    is_torch_function,
    warrants_warning,
)
from convert.files.pickle_objects import FindStorage, Objects, described_call, placeholder
from convert.files.records import GlobalName, Inert, StorageRecord, TensorRecord

OPCODES = {
    **{b"\x80": "PROTO", b"\x95": "FRAME", b".": "STOP"},
    **{b"N": "NONE", b"\x88": "NEWTRUE", b"\x89": "NEWFALSE"},
    **{b"J": "BININT", b"K": "BININT1", b"M": "BININT2", b"\x8a": "LONG1", b"G": "BINFLOAT"},
    **{b"X": "BINUNICODE", b"\x8c": "SHORT_BINUNICODE", b"\x8d": "BINUNICODE8"},
    **{b"T": "BINSTRING", b"U": "SHORT_BINSTRING"},  # the texts of Python 2
    **{b"B": "BINBYTES", b"C": "SHORT_BINBYTES", b"\x96": "BYTEARRAY8"},
    **{b"(": "MARK", b")": "EMPTY_TUPLE", b"t": "TUPLE", b"\x85": "TUPLE1", b"\x86": "TUPLE2", b"\x87": "TUPLE3"},
    **{b"]": "EMPTY_LIST", b"a": "APPEND", b"e": "APPENDS"},
    **{b"}": "EMPTY_DICT", b"s": "SETITEM", b"u": "SETITEMS"},
    **{b"\x8f": "EMPTY_SET", b"\x90": "ADDITEMS", b"\x91": "FROZENSET"},
    **{b"q": "BINPUT", b"r": "LONG_BINPUT", b"\x94": "MEMOIZE", b"h": "BINGET", b"j": "LONG_BINGET"},
    **{b"c": "GLOBAL", b"\x93": "STACK_GLOBAL", b"Q": "BINPERSID"},
    **{b"R": "REDUCE", b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"b": "BUILD"},
}
FORBIDDEN = {  # the rest of the list, to call them by name
    **{b"I": "INT", b"L": "LONG", b"\x8b": "LONG4", b"F": "FLOAT", b"S": "STRING"},
    **{b"V": "UNICODE", b"\x8e": "BINBYTES8"},
    **{b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER", b"l": "LIST", b"d": "DICT", b"0": "POP", b"1": "POP_MARK"},
    **{b"2": "DUP", b"g": "GET", b"p": "PUT", b"P": "PERSID", b"i": "INST", b"o": "OBJ"},
    **{b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4"},
}
OPCODE_NAMES = {opcode[0]: name for opcode, name in (FORBIDDEN | OPCODES).items()}
WIDTHS = {  # bytes of an opcode's number, or of the length in front of its text
    **{"BINPUT": 1, "LONG_BINPUT": 4, "BINGET": 1, "LONG_BINGET": 4, "BININT1": 1, "BININT2": 2},
    **{"SHORT_BINUNICODE": 1, "BINUNICODE": 4, "BINUNICODE8": 8, "SHORT_BINSTRING": 1, "BINSTRING": 4},
    **{"SHORT_BINBYTES": 1, "BINBYTES": 4, "BYTEARRAY8": 8},
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
WEIGHTS_WITHIN = 3  # dictionaries: {"model": {"state_dict": {name: tensor}}}; the moments of an optimiser lie deeper
SET, FROZEN_SET = GlobalName("builtins", "set"), GlobalName("builtins", "frozenset")


@dataclass(frozen=True)
class PickleContents:
    root: object
    foreign: tuple[str, ...]  # names of the placeholders, sorted
    calls: tuple[str, ...]  # what other programs would call, one call for each name
    storages: dict[str, StorageRecord]  # every storage that the pickle refers to
    end: int  # the byte after STOP


def read_pickle(data: bytes, find_storage: FindStorage, *, views: bool = False) -> PickleContents:
    """Read one pickle as data.

    data          starts with the pickle; may go on after it
    find_storage  maps the key of a storage to its record, or raises CheckpointError
    views         whether its storages may be parts of others, as in the stream format
    raises        UnsafeFileError, CorruptFileError, UnsupportedFileError; the text has no file name yet
    """
    machine = Machine(data, Objects(find_storage, views))
    try:
        machine.run()
        machine.objects.check_growth()
    except CheckpointError:
        machine.refuse_names()  # the names say more about such a file than where it went wrong
        raise
    machine.refuse_names()
    root = machine.stack.pop()
    networks = machine.objects.networks | set(filter(is_module_class, machine.ignored))
    networks -= PARAMETER_CONTAINERS  # which hold data and no layers
    if networks and not holds_weights(root):
        raise program(networks)
    foreign = tuple(sorted(map(str, machine.ignored)))
    calls = tuple(machine.calls[name] for name in sorted(machine.calls, key=str))
    return PickleContents(root, foreign, calls, machine.objects.storages, machine.position)


def holds_weights(root: object) -> bool:
    """Whether tensors lie in a dictionary near the root, as a state dict does, rather than inside an object."""
    level = [root]
    for _ in range(WEIGHTS_WITHIN):
        level = [value for outer in level if type(outer) is dict for value in outer.values()]
        if any(type(value) is TensorRecord for value in level):
            return True
    return False


def program(names: Iterable[GlobalName]) -> UnsafeFileError:
    """The error for a network that was pickled whole."""
    listed = tuple(sorted(map(str, names)))
    what = "contains a program (a whole pickled network; its author should save the state_dict instead)"
    return UnsafeFileError(f"{what}: {shown_list(listed)}", listed)


def old_names(data: bytes) -> list[GlobalName]:
    """The names of code in a pickle of protocol 0 or 1, as far as it can be read; [] where it would call nothing."""
    import pickletools  # only for such files; it executes nothing

    names, is_marked, runs = [], False, False
    try:
        for opcode, argument, _ in islice(pickletools.genops(data), LIMITS.opcodes):
            is_marked |= opcode.name == "MARK"
            if opcode.name in ("GLOBAL", "INST"):
                names.append(GlobalName(*argument.split(" ", 1)))
            runs |= opcode.name in ("REDUCE", "OBJ", "STOP") or (opcode.name == "INST" and is_marked)
    except (ValueError, TypeError):  # cut off, or no pickle at all
        pass
    return names if runs and all(map(is_name, names)) else []


class Machine:
    def __init__(self, data: bytes, objects: Objects):
        self.data = data
        self.position = 0
        self.frame_end = 0  # of the latest frame; opcodes may stand outside of any
        self.work = 0  # opcodes so far
        self.stack: list = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, object] = {}
        self.objects = objects
        self.ordered: dict[int, dict] = {}  # id -> dict that stands for an OrderedDict
        self.number_keys = 0
        self.names: dict[GlobalName, GlobalName] = {}  # one object each
        self.ignored: set[GlobalName] = set()
        self.refused: set[GlobalName] = set()
        self.calls: dict[GlobalName, str] = {}  # that other programs would make

    def run(self) -> None:
        """One opcode after the other until STOP, which leaves one object on the stack."""
        check_limit("bytes of the pickle", len(self.data), LIMITS.pickle_bytes)
        opcode = ""
        while opcode != "STOP":
            start = self.position
            code = self.take(1)
            opcode = OPCODES.get(code, "")
            try:
                if start == 0 and opcode != "PROTO":
                    self.refuse_old()
                if not opcode:
                    raise UnsafeFileError("holds a forbidden pickle opcode")
                if (opcode == "PROTO") != (start == 0):
                    raise UnsafeFileError("holds a pickle that does not have PROTO first and only there")
                self.spend(1)
                self.step(opcode)
                if start < self.frame_end < self.position:
                    raise UnsafeFileError("holds a pickle frame that ends inside an opcode")
                check_limit("objects on the pickle stack", len(self.stack), LIMITS.stack)
            except UnsafeFileError as error:
                name = OPCODE_NAMES.get(code[0], f"0x{code.hex()}")
                raise UnsafeFileError(f"{error} (opcode {name} at byte {start})") from None

    def step(self, opcode: str) -> None:
        """What each opcode does. The frequent ones come first."""
        match opcode:
            case "BINPUT" | "LONG_BINPUT":
                self.put(self.number(WIDTHS[opcode]))
            case "BINGET" | "LONG_BINGET":
                self.get(self.number(WIDTHS[opcode]))
            case "MEMOIZE":
                self.put(len(self.memo))

            case "BININT1" | "BININT2":
                self.stack.append(self.number(WIDTHS[opcode]))
            case "BININT":
                self.stack.append(int.from_bytes(self.take(4), "little", signed=True))
            case "LONG1":
                self.stack.append(int.from_bytes(self.take(self.number(1)), "little", signed=True))
            case "BINFLOAT":
                self.stack.append(struct.unpack(">d", self.take(8))[0])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append(CONSTANTS[opcode])
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                self.stack.append(self.text(self.counted(WIDTHS[opcode])))
            case "SHORT_BINSTRING" | "BINSTRING":  # bytes where they are no text, as Python 2 kept both in one type
                self.stack.append(text_or_bytes(self.counted(WIDTHS[opcode])))
            case "BINBYTES" | "SHORT_BINBYTES" | "BYTEARRAY8":
                self.stack.append(self.counted(WIDTHS[opcode]))

            case "MARK":
                self.marks.append(len(self.stack))
                check_limit("open pickle marks", len(self.marks), LIMITS.marks)
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "TUPLE":
                self.stack.append(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self.pop(TUPLES[opcode])))

            case "GLOBAL":
                self.push_name(self.line(), self.line())
            case "STACK_GLOBAL":
                self.push_name(*self.pop(2))
            case "BINPERSID":
                self.stack.append(self.objects.storage(*self.pop(1)))
            case "REDUCE":
                self.stack.append(self.call(*self.pop(2)))
            case "NEWOBJ":
                self.stack.append(self.new(*self.pop(2)))
            case "NEWOBJ_EX":
                name, args, options = self.pop(3)
                if type(args) is not tuple or type(options) is not dict:
                    raise UnsafeFileError("makes an object of something that is not a name, a tuple and a dict")
                self.stack.append(self.new(name, (*args, options) if options else args))
            case "BUILD":
                self.build(*self.pop(2))

            case "EMPTY_DICT":
                self.stack.append({})
            case "SETITEM":
                self.set_items(self.pop(2))
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "EMPTY_LIST":
                self.stack.append([])
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS":
                self.extend(self.pop_to_mark())
            # Sets stay unread: nothing we need is in one, and their items would have to be hashed.
            case "EMPTY_SET":
                self.stack.append(Inert(SET, ()))
            case "ADDITEMS":
                self.add_items(self.pop_to_mark())
            case "FROZENSET":
                self.stack.append(Inert(FROZEN_SET, (self.pop_to_mark(),)))

            case "PROTO":
                protocol = self.number(1)
                if not 2 <= protocol <= 5:
                    raise UnsupportedFileError(f"holds a pickle of protocol {protocol}; 2 to 5 are read")
            case "FRAME":
                self.begin_frame(self.number(8))
            case "STOP":
                if self.marks or len(self.stack) != 1:
                    raise UnsafeFileError(f"ends its pickle with {len(self.stack)} objects on the stack, not one")

    # Bytes of the pickle

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise CorruptFileError(f"holds an incomplete pickle: byte {end} is wanted, it has {len(self.data)}")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def begin_frame(self, size: int) -> None:
        """So many bytes belong together. Python's unpickler reads something else where a frame parts an opcode."""
        if self.position - 9 < self.frame_end:
            raise UnsafeFileError("holds a pickle frame inside a pickle frame")
        self.frame_end = self.position + size
        if self.frame_end > len(self.data):
            raise CorruptFileError("holds an incomplete pickle: it ends before the frame it announces")

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def counted(self, width: int) -> bytes:
        length = self.number(width)
        if length <= len(self.data) - self.position:  # else it is incomplete
            check_limit("bytes of one text in the pickle", length, LIMITS.text_bytes)
        return self.take(length)

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + LIMITS.name_bytes + 1)
        if end < 0 and len(self.data) - self.position <= LIMITS.name_bytes:
            raise CorruptFileError("holds an incomplete pickle: it ends inside a name")
        if end < 0:
            raise UnsafeFileError(f"names code by a name that does not end within {LIMITS.name_bytes} bytes")
        return self.text(self.take(end + 1 - self.position)[:-1])

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise UnsafeFileError("holds text in its pickle that is not UTF-8") from None

    def spend(self, work: int) -> None:
        self.work += work
        check_limit("pickle opcodes", self.work, LIMITS.opcodes)

    # Stack and memo

    def pop(self, count: int) -> list:
        height = len(self.stack) - count
        if height < (self.marks[-1] if self.marks else 0):
            raise UnsafeFileError("takes more from the pickle stack than there is")
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def pop_to_mark(self) -> list:
        if not self.marks:
            raise UnsafeFileError("goes back to a pickle mark that was not set")
        return self.pop(len(self.stack) - self.marks.pop())

    def top(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise UnsafeFileError("takes more from the pickle stack than there is")
        return self.stack[-1]

    def put(self, index: int) -> None:
        # Picklers number the entries from 0 or 1. If the file could choose freely, it would choose colliding ones.
        if index > len(self.memo) + 1:
            raise UnsafeFileError(f"puts memo entry {index} after {len(self.memo)} entries")
        self.memo[index] = self.top()
        check_limit("memo entries", len(self.memo), LIMITS.memo)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise UnsafeFileError(f"gets memo entry {index}, which was not put")
        self.stack.append(self.memo[index])

    # Containers

    def extend(self, items: list) -> None:
        target = self.top()
        if type(target) is Inert:  # a deque, a set, ...
            target.items = target.items or []
            target.items.extend(items)
        elif type(target) is list:
            target.extend(items)
        else:
            raise UnsafeFileError("appends to something that is not a list")

    def add_items(self, items: list) -> None:
        if type(self.top()) is not Inert:
            raise UnsafeFileError("adds items to something that is not a set")
        self.extend(items)

    def set_items(self, items: list) -> None:
        target = self.top()
        if len(items) % 2:
            raise UnsafeFileError("sets a dict key without a value")
        if type(target) is Inert:  # a defaultdict, ...
            self.extend(items)
        elif type(target) is dict:
            self.fill(target, zip(items[::2], items[1::2], strict=True))
        else:
            raise UnsafeFileError("sets items of something that is not a dict")

    def fill(self, target: dict, pairs: Iterable) -> None:
        for key, value in pairs:
            self.check_key(key)
            if key in target:
                raise UnsafeFileError(
                    f"sets a dict key twice: {shown(key if type(key) is str else type(key).__name__)}"
                )
            target[key] = value

    def check_key(self, key: object) -> None:
        """Only keys that are hashed at once, and few whose hash the file chooses: it would choose colliding ones."""
        if type(key) in (str, bytes, GlobalName, Inert):  # a placeholder is itself and nothing else
            return
        items, todo = 0, [key]
        while todo:
            part = todo.pop()
            if type(part) is tuple:
                items += len(part)
                check_limit("items of a tuple used as a dict key", items, LIMITS.key_items)
                todo.extend(part)
            elif type(part) not in (str, bytes, GlobalName, Inert, TensorRecord, int, float, bool, type(None)):
                raise UnsafeFileError("has a dict key that is not text, a number or a name")
            elif type(part) is int and not -(2**63) <= part < 2**63:
                raise UnsafeFileError("has a dict key that is an integer of more than 64 bits")
        self.number_keys += 1
        check_limit("dict keys that are not text", self.number_keys, LIMITS.number_keys)

    # Names and objects

    def push_name(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise UnsafeFileError("names code by something that is not text")
        check_limit("characters in a name of code", max(len(module), len(name)), LIMITS.name_bytes)
        found = GlobalName(module, name)
        found = self.names.setdefault(found, found)
        check_limit("different names of code", len(self.names), LIMITS.names)
        self.stack.append(found)
        if not is_known(found):
            (self.ignored if is_let_through(found) else self.refused).add(found)

    def refuse_names(self) -> None:
        """Raise if the pickle names anything that has no business in a checkpoint, even if nothing was made of it."""
        if not self.refused:
            return
        if any(map(is_module_class, self.refused)):
            raise program(self.refused)
        names = tuple(sorted(map(str, self.refused)))
        raise UnsafeFileError(f"names code that does not belong in a checkpoint: {shown_list(names)}", names)

    def refuse_old(self) -> None:
        """Raise if it is a pickle of protocol 0 or 1."""
        if names := old_names(self.data):
            self.refused.update(name for name in names if not (is_known(name) or is_let_through(name)))
            raise UnsupportedFileError("holds a pickle of protocol 0 or 1; 2 to 5 are read. Save it with a newer torch")

    def call(self, name: object, args: object) -> object:
        if type(name) is not GlobalName or type(args) is not tuple:
            raise UnsafeFileError("calls something that is not a name with a tuple")
        if name == ORDERED_DICT:
            return self.ordered_dict(args)
        try:
            result = self.objects.build(name, args)
        except UnsafeFileError as error:
            raise UnsafeFileError(f"{error}, at {self.weight_name()}") from None
        if name in GETATTR or name in GETITEM or name in TYPE:  # for a type or its part: elsewhere they stay refused
            self.refused.discard(name)
            self.ignored.add(name)
        if not (type(result) is GlobalName and is_torch_function(result)):
            self.note_call(name, args)
        return result

    def note_call(self, name: GlobalName, args: tuple) -> None:
        """Keep what a scan tells of: a call, also by way of a harmless function that is handed another one."""
        if warrants_warning(name, has_arguments=bool(args)):
            self.calls.setdefault(name, described_call(name, args))
        elif is_harmless(name) and name.module != "collections":  # these keep what they are given
            for handed in args:
                if type(handed) is GlobalName and warrants_warning(handed, has_arguments=False):
                    self.calls.setdefault(handed, described_call(name, args))

    def new(self, name: object, args: object) -> object:
        if type(name) is not GlobalName or type(args) is not tuple:
            raise UnsafeFileError("makes an object of something that is not a name and a tuple")
        if name == OLD_PARAMETER:
            return self.call(name, args)
        if name != ORDERED_DICT:
            self.note_call(name, args)
            return placeholder(name, args)
        if args:  # its constructor ignores them, so what they hold would be read by us and by nobody else
            raise UnsafeFileError("makes an OrderedDict without a call, but with arguments")
        return self.ordered_dict(args)

    def ordered_dict(self, args: tuple) -> dict:
        """OrderedDict() or, as Python 2 wrote it, OrderedDict([[key, value], ...])."""
        pairs = args[0] if args else []
        if len(args) > 1 or type(pairs) is not list:
            raise UnsafeFileError("makes an OrderedDict of something that is not a list")
        self.spend(len(pairs))
        if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            raise UnsafeFileError("makes an OrderedDict of something that is not a list of pairs")
        result: dict = {}
        self.fill(result, pairs)
        self.ordered[id(result)] = result
        return result

    def build(self, target: object, state: object) -> None:
        """Set an object's state: kept on placeholders, dropped from an OrderedDict (the version numbers _metadata)."""
        if type(target) is Inert:
            target.state = state
        elif type(target) is TensorRecord and is_old_parameter_state(state):
            pass
        elif id(target) not in self.ordered or type(state) is not dict:
            raise UnsafeFileError("sets the state of something that is not a placeholder")
        self.stack.append(target)

    def weight_name(self) -> str:
        """The dict key under which the object in the making will be put: the last text on the stack."""
        for value in reversed(self.stack[-4:]):
            if type(value) is str:
                return f"weight '{shown(value)}'"
        return "an object without a name"


def is_old_parameter_state(state: object) -> bool:
    """(requires_grad, volatile, hooks), as torch before 0.4 set them."""
    return type(state) is tuple and len(state) == 3 and type(state[0]) is bool and state[2] in (None, {})


def text_or_bytes(raw: bytes) -> str | bytes:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw
