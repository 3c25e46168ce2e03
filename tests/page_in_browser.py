"""The page of sd serve in a browser, with a live server of the narrow model: fixtures and helpers."""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from served import listening_server, working

SMALL = {"width": "64", "height": "64"}  # quick


@pytest.fixture(scope="module")
def worker(tiny_ckpt, tmp_path_factory):
    with working(tiny_ckpt, tmp_path_factory.mktemp("served")) as worker:
        yield worker


@pytest.fixture(scope="module")
def url(worker):
    with listening_server(worker) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def opened(browser, url, worker):
    """The page, as somebody finds it who has never been there; afterwards, nothing was said or sent to others."""
    worker.jobs.clear()
    browser.open("about:blank")
    browser.call("Storage.clearDataForOrigin", origin=url.rstrip("/"), storageTypes="all")
    browser.requests.clear()
    browser.problems.clear()
    arrive(browser, url)
    fill(browser, **SMALL)
    yield browser
    assert browser.problems == []
    assert [asked for asked in browser.requests if not asked.startswith((url, "data:", f"blob:{url}"))] == []


def arrive(browser, url, **look):
    browser.open(url, **look)
    browser.wait_for("!document.querySelector('main[aria-busy]') && document.querySelectorAll('#tokens li').length > 2")
    problem = browser.run("byId('problem').textContent")
    assert problem == "", problem


def fill(browser, **values):
    for name, value in values.items():
        browser.run(
            f"fields[{name!r}].value = {json.dumps(value)};"
            f"fields[{name!r}].dispatchEvent(new Event('input', {{bubbles: true}}))"
        )


def make(browser, **values):
    """Run what the form says, to its end; the hashes of the pictures that it made."""
    before = browser.run("[...pictures.keys()]")
    fill(browser, **values)
    browser.click("#run")
    made = f"[...pictures.keys()].filter(hash => !{json.dumps(before)}.includes(hash)).length"
    browser.wait_for(f"byId('problem').textContent || (!jobs.size && {made} === {int(values.get('count', 1))})")
    problem = browser.run("byId('problem').textContent")
    assert problem == "", problem
    return [sha256 for sha256 in browser.run("[...pictures.keys()]") if sha256 not in before]


def pixels(worker, sha256):
    data = worker.memory.get(sha256)
    assert hashlib.sha256(data).hexdigest() == sha256
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


SHOWN = "byId('shown').hidden ? null : byId('shown').src"
TILES = "[...gallery.querySelectorAll('li:not(#live) button')].map(tile => tile.getAttribute('aria-label'))"
