"""Pictures that come with a request: from base64 to files of our own, which nobody outside can name."""

import base64
import binascii
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sd.app.errors import UsageError
from sd.pipeline.errors import PictureError

DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
SPACE = re.compile(r"\s+")
ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif"}  # by the first bytes


class Uploads:
    """A folder for the pictures of one request, which exists once there is one."""

    def __init__(self):
        self._folder: tempfile.TemporaryDirectory | None = None

    def add(self, name: str, data: bytes) -> Path:
        """A file of these bytes. name: what messages and the settings of pictures call it, such as "init"."""
        ending = next((ending for start, ending in ENDINGS.items() if data.startswith(start)), "")
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="sd-serve-")
        path = Path(self._folder.name) / f"{name}{ending}"
        path.write_bytes(data)
        return path

    def add_text(self, name: str, text: object) -> Path:
        """A file from the base64 text, or data URL, in a field of this name. Raises UsageError."""
        return self.add(name, decoded(name, text))

    def cleanup(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def without_paths(self, message: str) -> str:
        """A message that may name a file, with its name alone."""
        return message if self._folder is None else message.replace(f"{self._folder.name}/", "")


@contextmanager
def uploads() -> Iterator[Uploads]:
    """A folder that stays if the block ends well, and is removed if it raises. No error names its place."""
    made = Uploads()
    try:
        yield made
    except PictureError as error:
        made.cleanup()
        raise PictureError(made.without_paths(str(error))) from None
    except BaseException:
        made.cleanup()
        raise


def decoded(name: str, text: object) -> bytes:
    """The bytes of a base64 text or data URL. Raises UsageError, also for an address or a path."""
    if not isinstance(text, str):
        raise UsageError(f"{name} must be a picture in base64, or a data URL.")
    start = DATA_URL.match(text[:200])
    if start is None and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", text[:40]):
        raise UsageError(f"{name} is an address. Nothing is fetched: send the picture itself, in base64.")
    digits = SPACE.sub("", text[start.end() :] if start else text)
    try:
        data = base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{name} is not base64. No path is opened here: send the picture itself.") from None
    if not data:
        raise UsageError(f"{name} is empty. Send a picture in base64.")
    return data
