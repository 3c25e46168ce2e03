"""The hashes by which programs name an adapter."""

from pathlib import Path

from convert.adapters.adapter import weights_file
from convert.files.hashing import file_sha256

SHOWN = 12  # hex digits in a picture's `Lora hashes`


def autov3(path: Path) -> str:
    """The sha256 of the tensors' bytes: of a .safetensors what follows its header, so that edited metadata keep it.

    Of other files, the sha256 of the whole file. 64 hex digits, remembered between runs. Raises OSError.

    AUTOMATIC1111/stable-diffusion-webui, modules/hashes.py, addnet_hash_safetensors.
    """
    path = weights_file(Path(path))
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        is_safetensors = file.read(1) == b"{"
    return file_sha256(path, start=8 + length if is_safetensors else 0)
