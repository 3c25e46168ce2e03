"""Limits on what a checkpoint may request before anything is allocated.

A full file in the SD v1 layout has about 173 KB of pickle, 36 k opcodes, 9 k memo entries, 4 open marks, 1,145 tensors.
"""

from dataclasses import dataclass

from convert.errors import CheckpointError, UnsafeFileError, UnsupportedFileError


@dataclass(frozen=True, kw_only=True)
class Limits:
    head_bytes: int = 4096  # looked at to tell the kind of a file
    pickle_bytes: int = 64 << 20
    opcodes: int = 2_000_000  # also counts the pairs that an OrderedDict is built from
    stack: int = 100_000
    marks: int = 64
    memo: int = 2_000_000
    text_bytes: int = 16 << 20  # one text or byte string
    name_bytes: int = 256  # a module or the name in it
    names: int = 10_000  # different ones
    number_keys: int = 20_000  # dict keys whose hash the file can choose: numbers and tuples
    key_items: int = 64  # in a tuple used as a dict key, and in the tuples inside it
    encoded_characters: int = 1024  # of `_codecs.encode`; longer ones (old arrays) stay unread
    tensors: int = 100_000
    dimensions: int = 8
    zip_records: int = 110_000
    zip_name_bytes: int = 512
    zip_extra_fields: int = 16  # of one record
    small_record_bytes: int = 4096  # version, byteorder and the like
    header_bytes: int = 16 << 20  # of a safetensors file
    header_tokens: int = 2_000_000  # strings and brackets in it
    growth: int = 4  # all tensors together (or all inflated records) may be this many times what is stored ...
    growth_allowance: int = 256 << 20  # ... plus this many bytes
    shards: int = 64  # files of one component in a folder
    wrappers: int = 4  # dictionaries around the weights
    levels: int = 8  # of a UNet or a VAE; v1 has 4
    residuals_per_level: int = 8  # v1 has 2
    depth: int = 32  # transformer blocks in one attention; v1 has 1
    text_layers: int = 128  # v1 has 12


LIMITS = Limits()


def check_limit(what: str, found: int, allowed: int, kind: type[CheckpointError] = UnsupportedFileError) -> None:
    """Refuse a file that exceeds a limit, with the limit, what was found and what is allowed.

    kind  of the error: a large file is no danger
    """
    if found > allowed:
        raise kind(
            f"exceeds the limit for {what}: found {found}, allowed {allowed}. Larger files are not read, sound or not"
        )


def check_growth(what: str, found: int, stored: int) -> None:
    """Refuse a file that is made to fill the memory: much more comes out of it than is stored."""
    check_limit(what, found, LIMITS.growth * stored + LIMITS.growth_allowance, UnsafeFileError)
