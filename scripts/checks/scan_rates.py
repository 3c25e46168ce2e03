"""How often `sd inspect --scan` misses a dangerous call, and how often it warns of a harmless file.

    python scripts/checks/scan_rates.py                     # with the names in tests/convert/scanner_names.txt
    SCANNERS/bin/python scripts/checks/scan_rates.py names  # writes those names again

Dangerous are the names that picklescan, modelscan, fickling and ModelAudit list, each called in every way that a pickle
has; where they list a whole module, some of its members. SCANNERS is an environment in which the four are installed.
Harmless are the objects of `tests/convert/test_pickle_names.py`. Prints JSON; fails for a miss or a false alarm.
"""

import argparse
import builtins
import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ROOT / "tests" / "convert" / "scanner_names.txt"
MEMBERS = 3  # of a module that is listed as a whole
ELSEWHERE = ("run", "Client")  # of a module that is not installed
PLAIN_VALUES = {"types.SimpleNamespace", "uuid.UUID", "uuid.SafeUUID"}  # harmless members of modules listed as a whole
COMPILED = {  # what modelaudit_picklescan's compiled part lists beside the tables, read from its texts
    "_aix_support": ["_read_cmd_output"],
    "_io": ["FileIO", "TextIOWrapper.write"],
    "_pyrepl.pager": ["pipe_pager"],
    "_tkinter": ["TkappType.call", "TkappType.eval"],
    "_xxsubinterpreters": ["run_string"],
    "codecs": ["StreamReaderWriter.write"],
    "configparser": ["ConfigParser.read", "RawConfigParser.read"],
    "contextlib": ["ExitStack.callback", "ExitStack.enter_context"],
    "contextvars": ["Context.run"],
    "csv": ["DictWriter.writerow"],
    "dataclasses": ["_create_fn"],
    "decimal": ["setcontext"],
    "dotenv": ["set_key"],
    "dotenv.main": ["set_key"],
    "functools": ["cached_property.__get__", "cmp_to_key", "lru_cache", "singledispatch"],
    "gc": ["get_objects", "get_referrers"],
    "inspect": ["currentframe", "getmembers"],
    "itertools": ["accumulate", "dropwhile", "filterfalse", "groupby", "starmap", "takewhile"],
    "joblib": ["_pickle_load"],
    "logging": ["StreamHandler.emit", "captureWarnings", "error"],
    "logging.handlers": ["RotatingFileHandler", "TimedRotatingFileHandler", "WatchedFileHandler"],
    "mailbox": ["Babyl", "Mailbox.add"],
    "mailcap": ["findmatch"],
    "numpy": ["load", "savetxt"],
    "pip._internal": ["main"],
    "pip._vendor.distlib.scripts": ["ScriptMaker"],
    "pipes": ["Template.open"],
    "sched": ["scheduler.run"],
    "setuptools._distutils.spawn": ["spawn"],
    "site": ["addpackage", "addsitedir"],
    "string": ["Formatter.get_field"],
    "tempfile": ["NamedTemporaryFile", "TemporaryDirectory", "mkdtemp", "mkstemp"],
    "torch": ["compile", "load"],
    "torch.hub": ["download_url_to_file", "load", "load_state_dict_from_url"],
    "torch.storage": ["_load_from_bytes"],
    "types": ["FrameType.f_globals.__get__", "FunctionType", "MethodType"],
    "typing": ["_eval_type", "get_type_hints"],
    "unittest.loader": ["TestLoader.discover", "defaultTestLoader.discover"],
    "unittest.mock": ["MagicMock", "_patch.start", "patch"],
    "warnings": ["filterwarnings", "simplefilter"],
    "yaml": ["unsafe_load", "UnsafeLoader"],
    "yaml.loader": ["Loader", "UnsafeLoader"],
    "__builtin__": ["filter", "hasattr", "map", "reload"],
}


def members(module: str) -> list[str]:
    """Some callables of a module of the standard library: its own first."""
    if hasattr(builtins, module):
        return list(ELSEWHERE[:1])
    if module.partition(".")[0] not in sys.stdlib_module_names:
        return list(ELSEWHERE)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = importlib.import_module(module)
    except Exception:
        return list(ELSEWHERE)
    names = [name for name in dir(found) if name[:1] != "_" and callable(getattr(found, name))]
    names.sort(key=lambda name: (getattr(getattr(found, name), "__module__", None) != module, name))
    return names[:MEMBERS] or list(ELSEWHERE)


def listed() -> dict[tuple[str, str], set[str]]:
    """(module, name) -> the scanners that list it."""
    from fickling.fickle import BUILTIN_MODULE_NAMES, SAFE_BUILTINS, UNSAFE_IMPORTS
    from modelaudit.detectors.suspicious_symbols import DANGEROUS_BUILTINS, SUSPICIOUS_GLOBALS
    from modelscan.settings import DEFAULT_SETTINGS
    from picklescan.scanner import _unsafe_globals

    tables = [("picklescan", _unsafe_globals), ("modelaudit", SUSPICIOUS_GLOBALS)]
    tables += [("modelscan", table) for table in DEFAULT_SETTINGS["unsafe_globals"].values()]
    tables += [("modelaudit", {"builtins": DANGEROUS_BUILTINS}), ("modelaudit", COMPILED)]
    tables += [("fickling", dict.fromkeys(UNSAFE_IMPORTS - BUILTIN_MODULE_NAMES, "*"))]
    unsafe = set(dir(builtins)) - SAFE_BUILTINS
    tables += [("fickling", {"builtins": [name for name in unsafe if name[:1].islower() or name == "__import__"]})]
    found: dict[tuple[str, str], set[str]] = {}
    for scanner, table in tables:
        for module, names in table.items():
            for name in members(module) if names == "*" else [names] if isinstance(names, str) else names:
                found.setdefault((module, name), set()).add(scanner)
    return found


def write_names() -> None:
    lines = [f"{module} {name} {','.join(sorted(found))}" for (module, name), found in sorted(listed().items())]
    head = "# module, name, who lists it; scripts/checks/scan_rates.py writes this file"
    NAMES.write_text("\n".join([head, *lines, ""]))


def read_names() -> list[tuple[str, str]]:
    lines = NAMES.read_text().splitlines()[1:]
    return [(line.split()[0], line.split()[1]) for line in lines]


MADE_EMPTY = ("REDUCE of nothing", "NEWOBJ and BUILD")


def ways(module: str, name: str) -> dict[str, bytes]:
    """A pickle for each way to call a name, beside a weight."""
    import hostile

    known, argument = hostile.name(module, name), hostile.text("x")
    calls = {
        "REDUCE": known + hostile.tuple_of(argument) + b"R",
        "REDUCE of nothing": known + b")R",
        "REDUCE of a name from the stack": hostile.stack_name(module, name) + hostile.tuple_of(argument) + b"R",
        "NEWOBJ": known + hostile.tuple_of(argument) + b"\x81",
        "NEWOBJ_EX": known + hostile.tuple_of(argument) + hostile.dict_of(a=argument) + b"\x92",
        "NEWOBJ and BUILD": known + b")\x81" + hostile.dict_of(a=argument) + b"b",
        "OBJ": b"(" + known + argument + b"o",
        "INST": b"(" + argument + f"i{module}\n{name}\n".encode(),
    }
    return {way: hostile.pickled(hostile.dict_of(weight=hostile.tensor(), other=call)) for way, call in calls.items()}


def is_safe(pickle: bytes) -> bool:
    """What `sd inspect --scan` would say of a file with this pickle."""
    from convert.errors import CheckpointError
    from convert.files.pickle_reader import read_pickle
    from convert.files.records import StorageRecord

    try:
        return not read_pickle(pickle, lambda key, *_: StorageRecord(key, 64, 16, "little", None)).calls
    except CheckpointError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", nargs="?", choices=["rates", "names"], default="rates", help="(default: rates)")
    if parser.parse_args().what == "names":
        write_names()
        return 0
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "convert")]
    names = read_names()
    called_safe = [
        f"{module}.{name} by {way}"
        for module, name in names
        for way, pickle in ways(module, name).items()
        if is_safe(pickle) and not (f"{module}.{name}" in PLAIN_VALUES and way in MADE_EMPTY)
    ]
    import torch
    from hostile import dict_of, pickled, tensor
    from test_pickle_names import HARMLESS, OBJECTS

    alarms, kinds = [], {kind: make for kind, (make, is_silent) in OBJECTS.items() if is_silent}
    for kind, make in kinds.items():
        out = io.BytesIO()
        torch.save({"state_dict": {"a": torch.ones(2)}, "beside": make()}, out, _use_new_zipfile_serialization=False)
        alarms += [] if is_silent_about(out.getvalue()) else [kind]
    alarms += [kind for kind, made in HARMLESS.items() if not is_safe(pickled(dict_of(weight=tensor(), other=made)))]
    found = {
        "names": len(names),
        "called safe": called_safe,
        "harmless kinds": len(kinds) + len(HARMLESS),
        "false alarms": alarms,
    }
    print(json.dumps(found, indent=1))
    return 1 if called_safe or alarms else 0


def is_silent_about(content: bytes) -> bool:
    from convert.files.torch_stream_reader import read_torch_stream

    return not read_torch_stream(memoryview(content)).calls


if __name__ == "__main__":
    sys.exit(main())
