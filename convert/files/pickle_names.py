"""Which names a pickle may mention, and which it may call.

Security does not rest on these tables: a name from the file is never imported or called, whatever it says. They decide
which few names stand for something we build ourselves, for which others the user is stopped, and which calls are worth
a warning, because other programs would make them.
"""

import re
import sys

from convert.files.records import DTYPE_WIDTHS, GlobalName


def _names(*rows: tuple[str, str]) -> frozenset[GlobalName]:
    """Every name of each row's second text in every module of its first."""
    return frozenset(GlobalName(m, name) for modules, names in rows for m in modules.split() for name in names.split())


# What we build

ORDERED_DICT = GlobalName("collections", "OrderedDict")
TENSOR_V1 = GlobalName("torch._utils", "_rebuild_tensor")  # of torch before 0.4
TENSOR_V2 = GlobalName("torch._utils", "_rebuild_tensor_v2")
TENSOR_V3 = GlobalName("torch._utils", "_rebuild_tensor_v3")
TENSORS = (TENSOR_V1, TENSOR_V2, TENSOR_V3)
FROM_CPU = GlobalName("torch._utils", "_rebuild_device_tensor_from_cpu_tensor")  # of a TPU and its like
PARAMETER = GlobalName("torch._utils", "_rebuild_parameter")
PARAMETER_WITH_STATE = GlobalName("torch._utils", "_rebuild_parameter_with_state")
OLD_PARAMETER = GlobalName("torch.nn.parameter", "Parameter")  # called by torch before 0.4, a type since
FROM_TYPE = _names(("torch._tensor", "_rebuild_from_type _rebuild_from_type_v2"))
TENSOR_TYPES = _names(
    ("torch", "Tensor"), ("torch.nn.parameter", "Parameter Buffer UninitializedParameter UninitializedBuffer")
)
PARAMETER_CONTAINERS = _names(("torch.nn.modules.container", "ParameterDict ParameterList"))  # dictionary and list
ENCODE = GlobalName("_codecs", "encode")
NUMPY_DTYPE = GlobalName("numpy", "dtype")
NUMPY_SCALARS = _names(("numpy.core.multiarray numpy._core.multiarray", "scalar"))
GETATTR = _names(("builtins __builtin__", "getattr"))  # how protocol 2 spells a class inside a class
TYPE = _names(("builtins __builtin__", "type"))  # of None, in `Optional[int]`
GETITEM = _names(("operator _operator", "getitem"))  # how `typing.Dict[str, int]` is pickled
CONSTRUCTORS = {
    *(ORDERED_DICT, *TENSORS, FROM_CPU, PARAMETER, PARAMETER_WITH_STATE, OLD_PARAMETER, *FROM_TYPE),
    *(ENCODE, NUMPY_DTYPE, *NUMPY_SCALARS),
}

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
        **{"QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4"},
    }.items()
} | {GlobalName("torch.storage", "UntypedStorage"): None}
QUANTISED_WIDTHS = {"qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}  # never the dtype of a weight

DTYPES = {GlobalName("torch", dtype): dtype for dtype in DTYPE_WIDTHS}
OTHER_DTYPES = _names(  # that no weight has: tensors of them stay unread
    ("torch", " ".join(QUANTISED_WIDTHS) + " float4_e2m1fn_x2 bits8 bits16 bits1x8 bits2x4 bits4x2"),
    ("torch", " ".join(f"int{bits} uint{bits}" for bits in range(1, 8))),
)

# What is a plain value in every program, whatever it is called with

BUILTIN_TYPES = _names(  # as values only: a default factory, the type of a configuration node
    ("builtins __builtin__", "int float str bool list dict tuple object unicode long Ellipsis NotImplemented")
)
BYTE_MAKERS = _names(("builtins __builtin__", "bytes bytearray"))  # with an integer they ask for that much memory
TYPING = _names(
    ("typing", "Annotated Any Callable ClassVar Dict Final FrozenSet Iterable List Literal Mapping Optional Sequence"),
    ("typing", "Set Tuple Type Union"),
)

_HARMLESS = (
    BUILTIN_TYPES
    | BYTE_MAKERS
    | OTHER_DTYPES
    | TYPING
    | TENSOR_TYPES
    | PARAMETER_CONTAINERS
    | _names(
        ("builtins __builtin__", "set frozenset complex slice range xrange"),
        ("builtins __builtin__", "abs all any enumerate iter len max min reversed round sorted sum zip"),
        ("array", "array _array_reconstructor"),
        ("itertools", "chain count cycle izip repeat"),
        ("inspect", "_empty"),
        ("dataclasses", "_MISSING_TYPE"),
        ("time", "struct_time"),
        ("argparse", "Namespace"),
        ("pathlib pathlib._local", "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath"),
        ("datetime", "datetime date time timedelta timezone"),
        ("collections", "Counter defaultdict deque ChainMap"),
        ("decimal", "Decimal"),
        ("fractions", "Fraction"),
        ("ipaddress", "IPv4Address IPv6Address IPv4Network IPv6Network"),
        ("re", "_compile Pattern RegexFlag"),
        ("random", "Random"),
        ("torch", "Size device per_tensor_affine per_tensor_symmetric per_channel_affine per_channel_symmetric"),
        ("torch", "per_channel_affine_float_qparams"),
        ("torch._utils", "_rebuild_qtensor _rebuild_sparse_tensor _rebuild_meta_tensor_no_storage"),
        ("torch._utils", "_rebuild_nested_tensor _rebuild_wrapper_subclass _rebuild_device_tensor_from_numpy"),
        ("torch._utils", "_rebuild_sparse_csr_tensor _rebuild_xla_tensor"),
        ("torch.serialization", "_get_layout"),
        ("torch.torch_version", "TorchVersion"),
        ("torch._dynamo.decorators", "_DimRange"),
        ("torch.nested._internal.nested_tensor", "NestedTensor _rebuild_njt"),
        ("torch.storage", "TypedStorage _TypedStorage"),
        ("torch._C", "Generator"),
        ("numpy", "ndarray matrix recarray record bool_ bool str_ bytes_ void datetime64 timedelta64 longdouble"),
        ("numpy", "float16 float32 float64 complex64 complex128 int8 int16 int32 int64 uint8 uint16 uint32 uint64"),
        ("numpy.core.multiarray numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.numeric numpy._core.numeric", "_frombuffer"),
        ("numpy.ma.core", "_mareconstruct MaskedArray"),
        ("numpy.ma", "MaskedArray"),
        ("numpy.random._pickle", "__randomstate_ctor __generator_ctor __bit_generator_ctor"),
        ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence SeedSequence"),
        ("numpy.random._mt19937 numpy.random._pcg64", "MT19937 PCG64 PCG64DXSM"),
        ("numpy.random._philox numpy.random._sfc64", "Philox SFC64"),
        ("zoneinfo", "ZoneInfo ZoneInfo._unpickle"),
    )
)
_PLAIN_CLASS = re.compile(  # tensors and results of torch, exceptions
    r"torch(\.cuda)?(\.sparse)?\.\w+(Tensor|Storage)|torch\.return_types\.\w+"
    r"|(builtins|__builtin__|exceptions)\.(\w+(Error|Exception|Interrupt|Iteration|Warning)|Exception|Warning)"
)
_HARMLESS_CLASSES = re.compile(  # enumerations and settings of the programs that train
    r"(pytorch_lightning|lightning\.pytorch)\.(callbacks|utilities|trainer\.(states|connectors))\b.*"
    r"|(lightning\.fabric|lightning_fabric)\.utilities\.(enums|data|types)|lightning_utilities\.core\.enums"
    r"|omegaconf\.(\w*config|nodes|base)"
    r"|torchmetrics\.utilities\.enums"
    r"|transformers\.(trainer_utils|trainer_pt_utils|training_args\w*|configuration_utils|generation\.configuration_utils)"
    r"|transformers\.models\.\w+\.configuration_\w+|transformers\.utils\.generic"
    r"|accelerate\.(state|utils\.dataclasses)|peft\.(utils\.peft_types|tuners\.\w+\.config)|numpy\.dtypes"
)

# Whom to stop

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
    urllib2 urlparse user UserDict UserList UserString uu whichdb xdrlib xmlrpclib _pyrepl _xxsubinterpreters
"""
_STANDARD_LIBRARY = sys.stdlib_module_names | set(_OLD_MODULES.split())
_INSTALLERS = {"pip", "setuptools", "pkg_resources", "_distutils_hack"}
_ONLY_LISTED = _STANDARD_LIBRARY | _INSTALLERS | {"torch", "numpy"}  # here only listed names are let through

_LET_THROUGH = _names(  # beside the harmless ones
    ("functools", "partial"),
    ("types", "SimpleNamespace"),
    ("builtins __builtin__", "print"),
    ("copy", "copy deepcopy"),
    ("uuid", "UUID SafeUUID"),
    ("logging", "getLogger Logger"),
    ("numpy", "mean median std var sum min max amin amax abs sqrt exp log random.RandomState"),
)
_TORCH_PARTS = re.compile(  # networks, losses, optimisers and their like; and the functions in them
    r"torch\.(nn|optim|distributions|amp|cuda\.amp|nested|sparse|ao\.(nn|quantization)|_C\._(nn|fft|linalg|special|sparse|nested)"
    r"|distributed\.(tensor|_tensor|_shard|fsdp|device_mesh|_mesh_layout|checkpoint\.metadata|algorithms))(\.\w+)*"
    r"|torch\.utils\.data(\.(dataset|dataloader|sampler|distributed))?"
)
_TORCH_FUNCTION = re.compile(  # as `torch.relu`, `torch.Tensor.relu` and `math.sqrt` are pickled
    r"torch\._C\.(_VariableFunctionsClass|TensorBase)(\.\w+)?|c?math\.\w+"
)
_ATTACKERS_TOOLS = {  # packages that no weights need; a mere object of their classes is worth a warning
    *("requests", "aiohttp", "httpx", "urllib3", "dill", "cloudpickle", "joblib", "pexpect", "paramiko", "fabric"),
    *("invoke", "sh", "plumbum", "click", "dotenv", "yaml", "_pytest", "IPython", "jinja2", "psutil"),
}

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_NAME = re.compile(r"(?=.*[^\W\d_])[^\W\d]\w*(\.([^\W\d]\w*|<locals>|<lambda>))*|<lambda>")


def is_known(name: GlobalName) -> bool:
    """Whether the name stands for something that we build, or for a type beside it."""
    return name in CONSTRUCTORS or name in STORAGE_DTYPES or name in DTYPES


def is_name(name: GlobalName) -> bool:
    """Whether Python would look it up."""
    return _MODULE.fullmatch(name.module) is not None and _NAME.fullmatch(name.name) is not None


def is_class(name: GlobalName) -> bool:
    """Whether it looks like a class: its last part starts with a capital."""
    return name.name.rpartition(".")[2].lstrip("_")[:1].isupper()


def is_harmless(name: GlobalName) -> bool:
    """Whether every program may call it, with any arguments: it makes a plain value."""
    if is_known(name) or name in _HARMLESS or _PLAIN_CLASS.fullmatch(str(name)):
        return True
    return is_class(name) and _HARMLESS_CLASSES.fullmatch(name.module) is not None


def is_let_through(name: GlobalName) -> bool:
    """Whether a name that we do not build ourselves may stay in the file as a placeholder.

    True for the listed names of the standard library, torch and numpy, and for everything of other packages: callbacks,
    configuration nodes, losses, training code, functions.
    """
    if is_harmless(name) or name in _LET_THROUGH or is_torch_function(name):
        return True
    if not is_name(name):
        return False
    return name.module.partition(".")[0] not in _ONLY_LISTED or _TORCH_PARTS.fullmatch(name.module) is not None


def warrants_warning(name: GlobalName, has_arguments: bool) -> bool:
    """Whether a scan tells the user that other programs would call it.

    has_arguments  False for an object as most pickles describe one: made empty, then given its attributes or items
    """
    if is_harmless(name) or name in GETITEM or name in TYPE:
        return False
    return has_arguments or not is_class(name) or name.module.partition(".")[0] in _ATTACKERS_TOOLS


def is_torch_function(name: GlobalName) -> bool:
    """Whether it is a function of torch by way of the class that has it; a mention of it calls nothing."""
    return _TORCH_FUNCTION.fullmatch(str(name)) is not None


def is_module_class(name: GlobalName) -> bool:
    """Whether the name is what a whole pickled network is made of, rather than its weights."""
    in_a_network = re.match(r"torch\.(nn$|nn\.modules\.|jit|fx|_C$)", name.module)
    return in_a_network is not None and is_class(name) and not (is_harmless(name) or is_torch_function(name))
