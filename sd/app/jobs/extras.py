"""Packages that only some commands need, and which of this package's extras installs them."""

from importlib.util import find_spec

from convert.errors import joined
from sd.app.errors import UsageError

EXTRAS = {  # module -> package
    "server": {"starlette": "starlette", "uvicorn": "uvicorn", "multipart": "python-multipart"},
    "onnx": {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
}


def missing_packages(extra: str) -> list[str]:
    return [package for module, package in EXTRAS[extra].items() if find_spec(module) is None]


def require(extra: str, command: str) -> None:
    """Raise UsageError where a command's packages are missing."""
    if missing := missing_packages(extra):
        raise UsageError(f"{command} needs {joined(missing)}. Install them: pip install 'sd-zoo[{extra}]'.")
