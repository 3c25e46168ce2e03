"""Name files that are not checkpoints, by their first bytes, in one sentence."""

import re

from convert.errors import (
    CheckpointError,
    CorruptFileError,
    UnsafeFileError,
    UnsupportedFileError,
    shown,
    shown_list,
    size_text,
)
from convert.files.limits import LIMITS
from convert.files.pickle_names import is_known, is_let_through
from convert.files.pickle_reader import old_names, read_pickle
from convert.files.records import StorageRecord
from convert.files.zip_reader import bytes_behind

GGML = (b"lmgg", b"tjgg", b"fmgg", b"algg")
SQLITE = (
    "is an SQLite database, which Draw Things keeps its models in, not a checkpoint. Get the model's .safetensors or "
    ".ckpt file"
)
MAGIC = (  # offset, bytes, what it is
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive. Unpack it first"),
    (0, b"Rar!\x1a\x07", "is a rar archive. Unpack it first"),
    (0, b"\x1f\x8b", "is compressed with gzip. Unpack it first"),
    (0, b"\xfd7zXZ\0", "is compressed with xz. Unpack it first"),
    (0, b"BZh", "is compressed with bzip2. Unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "is compressed with zstd. Unpack it first"),
    (0, b"PK\5\6", "is an empty zip archive, not a checkpoint"),
    (0, b"PK\7\x08", "is one part of a split zip archive, not a checkpoint"),
    (257, b"ustar", "is a tar archive. Unpack it first; torch's own tar format of 2016 is not read"),
    (0, b"\x04\x22\x4d\x18", "is compressed with lz4. Unpack it first"),
    (0, b"GGUF", "is a GGUF file, which belongs to other programs, not a checkpoint"),
    *((0, magic, "is a GGML file, which belongs to other programs, not a checkpoint") for magic in GGML),
    (0, b"SQLite format 3\0", SQLITE),
    (4, b"TFL3", "is a TensorFlow Lite model, not a checkpoint. Get the model's .safetensors or .ckpt file"),
    (0, b"ftrt", "is a TensorRT engine, not a checkpoint. Get the model's .safetensors or .ckpt file"),
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file, not a checkpoint of this model"),
    (0, b"\x93NUMPY", "is a single NumPy array (npy), not a checkpoint"),
    (0, b"\x89PNG\r\n\x1a\n", "is a picture (PNG), not a checkpoint"),
    (0, b"\xff\xd8\xff", "is a picture (JPEG), not a checkpoint"),
    (0, b"GIF8", "is a picture (GIF), not a checkpoint"),
    (8, b"WEBP", "is a picture (WebP), not a checkpoint"),
    (0, b"BM", "is a picture (BMP), not a checkpoint"),
    (0, b"II*\0", "is a picture (TIFF), not a checkpoint"),
    (0, b"MM\0*", "is a picture (TIFF), not a checkpoint"),
    (0, b"8BPS", "is a picture (Photoshop), not a checkpoint"),
    (4, b"ftypavif", "is a picture (AVIF), not a checkpoint"),
    (4, b"ftyphei", "is a picture (HEIC), not a checkpoint"),
    (4, b"ftyp", "is a video (MP4), not a checkpoint"),
    (0, b"\x1aE\xdf\xa3", "is a video (WebM or Matroska), not a checkpoint"),
    (8, b"WAVE", "is sound (WAV), not a checkpoint"),
    (0, b"PAR1", "is a table (Parquet), not a checkpoint"),
    (0, b"bplist00", "is an Apple property list, not a checkpoint"),
    (0, b"%PDF-", "is a PDF document, not a checkpoint"),
    (0, b"\x7fELF", "is a program (ELF), not a checkpoint"),
    (0, b"\xcf\xfa\xed\xfe", "is a program (macOS), not a checkpoint"),
    (0, b"MZ", "is a program (Windows), not a checkpoint"),
)
# Protocol buffers: the version, then a text (the producer's name), or a message
SAVED_MODEL = re.compile(rb"\x08\x01\x12")
ONNX = re.compile(rb"\x08[\x02-\x20](?:[\x12\x1a\x22\x32].[\x20-\x7e]{1,40}|:)", re.DOTALL)
CORE_ML = re.compile(rb"\x08[\x01-\x10][\x12\xa2]")
MESSAGE_PACK = re.compile(rb"(?:[\x81-\x8f]|\xde..)(?:[\xa1-\xbf]|\xd9.)[\x20-\x7e]", re.DOTALL)  # a map with text keys
SETTINGS = re.compile(r'"(_class_name|architectures|weight_map)"')  # of model_index.json, config.json and the like
OLD_PICKLE = re.compile(rb"[(\]}lcidSVNIFLKMGUTXJ]")  # how one of protocol 0 or 1 begins
MOST_OLD = 1 << 20  # bytes of one that are looked at
NO_WEIGHTS = "is a bare pickle without any weights, not a checkpoint"


def other_kind(data: memoryview) -> CheckpointError:
    """The error that says what this file is; it is neither a torch zip nor safetensors."""
    head = bytes(data[: LIMITS.head_bytes])
    for offset, magic, sentence in MAGIC:
        if head.startswith(magic, offset):
            return UnsupportedFileError(sentence)
    if kind := other_framework(head):
        return UnsupportedFileError(f"is {kind}, not a checkpoint. Get the model's .safetensors or .ckpt file")
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return bare_pickle(data)
    if OLD_PICKLE.match(head) and (names := old_names(bytes(data[:MOST_OLD]))):
        code = tuple(sorted({str(name) for name in names if not (is_known(name) or is_let_through(name))}))
        if not code:
            return UnsupportedFileError(NO_WEIGHTS)
        return UnsafeFileError(f"is a bare pickle that names code: {shown_list(code)}", code)
    if not head.strip(b"\0"):
        return UnsupportedFileError(
            f"begins with {len(head)} zero bytes: a failed download or an unfilled file. Download the file itself"
        )
    return text_kind(head, len(data)) or UnsupportedFileError(
        f"is not a checkpoint of a known kind; it begins with the bytes {head[:8].hex(' ')}"
    )


def other_framework(head: bytes) -> str | None:
    """The model format of another framework that starts with numbers, not with a word of its own."""
    if SAVED_MODEL.match(head):
        return "a TensorFlow SavedModel"
    if ONNX.match(head):
        return "an ONNX model"
    if CORE_ML.match(head):
        return "a Core ML model"
    if MESSAGE_PACK.match(head):
        return "a MessagePack file, such as Flax writes"
    return None


def bare_pickle(data: memoryview) -> CheckpointError:
    """A pickle without a container has no place for weights; it is parsed only for the names in it."""

    def no_storage(key: str, count: int, width: int) -> StorageRecord:
        raise UnsupportedFileError(f"is a bare pickle without the storage {key} it refers to, not a checkpoint")

    try:
        contents = read_pickle(bytes(data[: LIMITS.pickle_bytes]), no_storage)
        bytes_behind(data, contents.end)
    except CorruptFileError as error:
        if len(data) <= LIMITS.pickle_bytes:
            return error
    except CheckpointError as error:
        return error
    if contents.calls:
        return UnsafeFileError(f"is a bare pickle, with which other programs would call {shown_list(contents.calls)}")
    return UnsupportedFileError(NO_WEIGHTS)


def text_kind(head: bytes, size: int) -> CheckpointError | None:
    """Pointers, web pages and error messages that were saved as a model; None if it is not text."""
    try:
        text = head.decode("utf-8") if size <= LIMITS.head_bytes else head[:-4].decode("utf-8", "ignore")
    except UnicodeDecodeError:
        return None
    if any(ord(character) < 32 and character not in "\t\n\r\f" for character in text):
        return None
    start = text.lstrip("\ufeff \t\r\n")
    if start.startswith(("version https://git-lfs", "version https://hawser")):
        announced = re.search(r"^size ([0-9]{1,18})$", text, re.MULTILINE)
        real = f" of {size_text(int(announced[1]))}" if announced else ""
        return UnsupportedFileError(
            f"is a Git LFS pointer, not the weights ({size_text(size)}). Download the file itself{real}"
        )
    if re.match(r"(<\?xml[^>]*>\s*)?<net\b", start):
        return UnsupportedFileError(
            "is the description of an OpenVINO model (XML), not the weights. Get its .safetensors file"
        )
    if re.match(r"(<\?xml[^>]*>\s*)?<svg\b", start):
        return UnsupportedFileError("is a picture (SVG), not a checkpoint")
    if start.startswith("<?xml"):
        return UnsupportedFileError(f"is XML text, not the weights: '{shown(start, 120)}'. Download the file itself")
    if start.startswith("<"):
        return UnsupportedFileError("is a web page (HTML), not the weights. Download the file itself")
    if start.startswith("{") and SETTINGS.search(start):
        return UnsupportedFileError(
            "holds the settings of a model in diffusers' layout, not its weights. Give the folder of the model"
        )
    if start.startswith(("{", "[")):
        return UnsupportedFileError(f"is JSON text, not the weights: '{shown(start, 80)}'. Download the file itself")
    return UnsupportedFileError(f"is text, not the weights: '{shown(start, 80)}'. Download the file itself")
