"""What a picture of ours says of how it was made. Files are untrusted; `texts.py` reads those of others."""

import json
from pathlib import Path

from PIL import Image

from sd.pipeline.image.reading import PictureError, decoding, opened
from sd.pipeline.settings import FIELDS, SettingError, Settings


def read_texts(path: Path) -> dict[str, str]:
    """The text chunks before the pixels of a PNG; none if it is damaged, or not a PNG file. The pixels are not read."""
    try:
        with opened(path) as file, decoding(path), Image.open(file, formats=["PNG"]) as picture:
            return {key: str(text) for key, text in picture.info.items() if isinstance(text, str)}
    except PictureError:
        return {}


def read_exact(path: Path) -> dict:
    """The exact settings, and what is stored with them, in a picture of ours; empty for others."""
    return exact_in(read_texts(path))


def exact_in(texts: dict[str, str]) -> dict:
    """The same from the texts of a picture."""
    try:
        exact = json.loads(texts.get("sd", "{}"))
    except (ValueError, RecursionError):
        return {}
    return exact if isinstance(exact, dict) else {}


def settings_from(exact: dict) -> Settings | None:
    """The settings in the result of `read_exact`; None if they are invalid."""
    try:
        return Settings(**{name: value for name, value in exact.items() if name in FIELDS})
    except (SettingError, TypeError):
        return None
