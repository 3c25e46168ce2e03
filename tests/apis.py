"""A server in this process, and pictures for its APIs."""

import base64
import io
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from sd.app.jobs.request import Events, ModelRequest
from sd.app.web.app import application
from sd.app.web.models import Models
from sd.app.web.worker import Worker


@contextmanager
def served(model: Path, out: Path, **rules):
    """A client of a server with this model; its worker is `client.app.state.worker`."""
    worker = Worker(Models(ModelRequest(file=model)), out=f"{out}/")
    worker.start(Events())
    try:
        yield TestClient(application(worker, **rules), base_url="http://127.0.0.1")
    finally:
        worker.close()
        assert worker.join(60)


def picture(size=(64, 64), seed=0):
    """Smooth colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def as_bytes(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def as_text(image):
    return base64.b64encode(as_bytes(image)).decode()


def decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))
