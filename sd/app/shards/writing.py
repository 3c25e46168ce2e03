"""A shard's files: a tar of samples as WebDataset reads them, a table of their settings, and how it went.

A sample is three files of the tar: KEY.json, KEY.png (or .webp) and KEY.txt, the prompt. The key is the picture's
number in the whole run. Tar and table depend on nothing but the pictures: no times, users or machines.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, BinaryIO

from sd.app.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "sampler", "schedule", "guidance_scale", "strength")


class Tar:
    """The tar of a shard, written as pictures come."""

    def __init__(self, file: BinaryIO, picture: str):
        self.file, self.picture = HashedFile(file), picture
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.rows: list[dict[str, object]] = []

    def add(self, key: str, picture: "Image.Image", texts: Mapping[str, str]) -> None:
        """A sample. texts: those that a picture carries, "parameters" and "sd"."""
        encoded, settings = encode(picture, texts, self.picture), json.loads(texts["sd"])
        about = {
            "key": key,
            "prompt": settings["prompt"],
            "width": picture.width,
            "height": picture.height,
            "sha256": hashlib.sha256(encoded).hexdigest(),
            "parameters": texts["parameters"],
        }
        files = {
            "json": json.dumps({**about, "settings": settings}, ensure_ascii=False).encode(),
            self.picture: encoded,
            "txt": settings["prompt"].encode(),
        }
        for ending, data in files.items():
            entry = tarfile.TarInfo(f"{key}.{ending}")  # owned by nobody in 1970
            entry.size = len(data)
            self.tar.addfile(entry, io.BytesIO(data))
        own = {name: settings[name] for name in SETTINGS}
        model = {"model": settings["model"]["name"], "model_sha256": settings["model"]["sha256"]}
        self.rows.append({**about, **own, **model, "bytes": len(encoded), "settings": texts["sd"]})

    def close(self) -> dict[str, object]:
        """Complete the tar; its size and hash."""
        self.tar.close()
        return self.file.facts()


class HashedFile:
    """Passes on what is written, and hashes it."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.bytes

    def facts(self) -> dict[str, object]:
        return {"bytes": self.bytes, "sha256": self.digest.hexdigest()}


def encode(picture: "Image.Image", texts: Mapping[str, str], form: str) -> bytes:
    """The bytes of a picture's file: the PNG that `sd txt2img` writes, or a WebP with the same pixels."""
    if form == "png":
        from sd.pipeline.image.tensors import png_bytes

        return png_bytes(picture, texts)
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=True)
    return file.getvalue()


def write_table(file: BinaryIO, rows: Iterable[Mapping[str, object]], form: str) -> dict[str, object]:
    """A row for each sample, in the order of the keys; its size and hash."""
    rows, hashed = sorted(rows, key=lambda row: row["key"]), HashedFile(file)
    if form == "jsonl":
        for row in rows:
            hashed.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    else:
        import pyarrow
        from pyarrow.parquet import write_table as write_parquet

        data = io.BytesIO()
        write_parquet(pyarrow.Table.from_pylist(rows, schema_of(pyarrow)), data)
        hashed.write(data.getvalue())
    return hashed.facts()


def schema_of(pyarrow: object) -> object:
    """The columns of a Parquet table, the same in each shard, also in one without a row."""
    whole, real = dict.fromkeys(("width", "height", "steps", "bytes"), pyarrow.int32()), ("guidance_scale", "strength")
    kinds = {**whole, **dict.fromkeys(real, pyarrow.float64()), "seed": pyarrow.uint64()}
    names = [
        "key",
        "prompt",
        "width",
        "height",
        "sha256",
        "parameters",
        *SETTINGS[1:],
        "model",
        "model_sha256",
        "bytes",
    ]
    return pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in [*names, "settings"]])


def require_table(form: str) -> None:
    """Raise UsageError where tables of this form cannot be written."""
    if form == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UsageError(
                "--shard-table parquet needs the package pyarrow: pip install pyarrow. Without it, tables are .jsonl."
            ) from None
