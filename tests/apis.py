"""Pictures for the APIs of a server, and a client of one in this process."""

import base64
import io
from contextlib import contextmanager

import numpy as np
from PIL import Image
from served import client, working


@contextmanager
def served(model, out, rules=None, folder=None):
    """A client of a server with this model, and those of a folder; its worker is `client.app.state.worker`."""
    with working(model, f"{out}/", folder=folder) as worker:
        yield client(worker, rules)


def picture(size=(64, 64), seed=0):
    """Smooth colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def hole(size=(64, 64)):
    """A mask whose left half is transparent."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return mask


def white_left(size=(64, 64)):
    """A mask whose left half is white."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def halves(image):
    """The bytes of the left half and of the right one."""
    width, height = image.size
    boxes = (0, 0, width // 2, height), (width // 2, 0, width, height)
    return [image.convert("RGB").crop(box).tobytes() for box in boxes]


def as_bytes(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def as_text(image):
    return base64.b64encode(as_bytes(image)).decode()


def decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))
