"""The texts that a picture file carries: what it was made from. A file is data from a stranger."""

import json
from pathlib import Path

from PIL import Image

from sd.picture_files import DAMAGE
from sd.settings import FIELDS, SettingError, Settings


def read_texts(path: Path) -> dict[str, str]:
    """The text chunks before the pixels of a PNG; none where it is no PNG, or damaged. The pixels are not read."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return {key: str(text) for key, text in picture.info.items() if isinstance(text, str)}
    except DAMAGE:
        return {}


def read_exact(path: Path) -> dict:
    """The exact settings, and what else was noted with them, in a picture of ours; empty for others."""
    try:
        exact = json.loads(read_texts(path).get("sd", "{}"))
    except (ValueError, RecursionError):
        return {}
    return exact if isinstance(exact, dict) else {}


def settings_from(exact: dict) -> Settings | None:
    """The settings in what `read_exact` gives; None where they are none."""
    try:
        return Settings(**{name: value for name, value in exact.items() if name in FIELDS})
    except (SettingError, TypeError):
        return None
