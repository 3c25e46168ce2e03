"""Which names a pickle may mention.

Security does not rest on these tables: a name from the file is never imported or called, whatever it says. They decide
which few names stand for something we build ourselves, and for which others the user is stopped.
"""

import re
import sys

from convert.files.records import DTYPE_WIDTHS, GlobalName

ORDERED_DICT = GlobalName("collections", "OrderedDict")
TENSOR_V2 = GlobalName("torch._utils", "_rebuild_tensor_v2")
TENSOR_V3 = GlobalName("torch._utils", "_rebuild_tensor_v3")
PARAMETER = GlobalName("torch._utils", "_rebuild_parameter")
ENCODE = GlobalName("_codecs", "encode")
NUMPY_DTYPE = GlobalName("numpy", "dtype")
NUMPY_SCALARS = frozenset(
    GlobalName(module, "scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")
)
CONSTRUCTORS = {ORDERED_DICT, TENSOR_V2, TENSOR_V3, PARAMETER, ENCODE, NUMPY_DTYPE, *NUMPY_SCALARS}

STORAGE_DTYPES = {  # None: bytes whose dtype stands beside each tensor
    GlobalName("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Float": "float32",
        "Half": "float16",
        "Double": "float64",
        "BFloat16": "bfloat16",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
        "ComplexFloat": "complex64",
        "ComplexDouble": "complex128",
        "Untyped": None,
    }.items()
} | {GlobalName("torch.storage", "UntypedStorage"): None}

DTYPES = {GlobalName("torch", dtype): dtype for dtype in DTYPE_WIDTHS}

# Modules of Python 2, of later versions that dropped them, of private parts, and "test": not in every
# sys.stdlib_module_names.
_OLD_MODULES = """
    __builtin__ __builtins__ _winreg aifc annotationlib anydbm asynchat asyncore audiodev audioop BaseHTTPServer Bastion
    binhex _bootlocale bsddb cgi CGIHTTPServer cgitb chunk cl commands compiler compression ConfigParser Cookie
    cookielib copy_reg cPickle crypt cStringIO dbhash distutils dl DocXMLRPCServer dumbdbm dummy_thread dummy_threading
    exceptions formatter fpformat gdbm htmlentitydefs htmllib HTMLParser httplib ihooks imghdr imp imputil lib2to3
    linuxaudiodev macpath macurl2path mailcap md5 mhlib mimetools MimeWriter mimify msilib multifile new nis nntplib os2
    ossaudiodev parser pipes popen2 posixfile Queue repr rexec rfc822 robotparser ScrolledText sets sgmllib sha
    SimpleHTTPServer SimpleXMLRPCServer smtpd sndhdr SocketServer spwd statvfs StringIO stringold strop sunau sunaudio
    symbol telnetlib test thread Tix tkColorChooser tkFileDialog Tkinter tkMessageBox tkSimpleDialog toaiff ttk
    urllib2 urlparse user UserDict UserList UserString uu whichdb xdrlib xmlrpclib
"""
_STANDARD_LIBRARY = sys.stdlib_module_names | set(_OLD_MODULES.split())
_OUR_PACKAGES = _STANDARD_LIBRARY | {"torch", "numpy"}  # here only listed names are ignored

BUILTIN_TYPES = frozenset(  # as values only: a default factory, the type of a configuration node
    GlobalName(module, name)
    for module in ("builtins", "__builtin__")
    for name in ("int", "float", "str", "bool", "list", "dict", "tuple", "object", "slice", "range", "unicode", "long")
)
BYTE_MAKERS = frozenset(  # with an integer they ask for that much memory
    GlobalName(module, name) for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")
)

_IGNORED = (
    BUILTIN_TYPES
    | BYTE_MAKERS
    | {
        GlobalName(module, name)
        for modules, names in (
            ("builtins __builtin__", "set frozenset complex"),
            ("argparse", "Namespace"),
            ("pathlib pathlib._local", "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath"),
            ("datetime", "datetime date time timedelta timezone"),
            ("collections", "Counter defaultdict deque"),
            ("typing", "Any"),
            ("torch", "Size device"),
            ("torch.nn.modules.container", "ParameterDict"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray numpy._core.multiarray", "_reconstruct"),
        )
        for module in modules.split()
        for name in names.split()
    }
)

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_known(name: GlobalName) -> bool:
    """Whether the name stands for something that we build, or for a type beside it."""
    return name in CONSTRUCTORS or name in STORAGE_DTYPES or name in DTYPES


def is_ignored(name: GlobalName) -> bool:
    """Whether a name that we do not build ourselves may stay in the file as a placeholder.

    True for the listed names of the standard library, torch and numpy, and for the classes of every other package
    (Lightning callbacks, OmegaConf nodes, training code): an identifier that starts with a capital, without dots.
    """
    if name in _IGNORED:
        return True
    if not _MODULE.fullmatch(name.module) or name.module.partition(".")[0] in _OUR_PACKAGES:
        return False
    return name.name.isidentifier() and name.name.lstrip("_")[:1].isupper()


def is_module_class(name: GlobalName) -> bool:
    """Whether the name is what a whole pickled network is made of, rather than its weights."""
    return name.module.startswith(("torch.nn.", "torch.jit", "torch.fx", "torch._C")) and name not in _IGNORED
