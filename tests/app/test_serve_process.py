"""`sd serve` as a process: how it starts, and how it ends. And the description of its API."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from served import listening_server, working

pytest.importorskip("starlette")

from sd.app.jobs.request import JobRequest, Line
from sd.app.web import about, api, openapi
from sd.app.web.fields import NAMES
from sd.files import embedded_model

ROOT = Path(__file__).parents[2]
JOB = {"prompt": "a horse", "width": 64, "height": 64, "steps": 3, "count": 500, "seed": 1}


@contextmanager
def process(folder, model):
    """A server that runs in that folder; yields it and its address."""
    command = [sys.executable, "-m", "sd", "serve", "--port", "0", "-o", "out/", "-m", str(model), "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    child = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        line = child.stderr.readline()
        assert re.fullmatch(r"sd: serving \S+ at http://127\.0\.0\.1:\d+\n", line), line
        yield child, line.split()[-1]
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def ask(address, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def with_pictures(folder, number):
    """The pictures in a folder, once there are so many."""
    end = time.monotonic() + 300
    while len(found := sorted(folder.glob("out/*.png"))) < number:
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_a_step_that_does_not_end_keeps_nobody_waiting(tiny_ckpt, tmp_path, caplog):
    """The readers of its job are told in time, so that no answer has to be cut off."""
    computing, go_on = threading.Event(), threading.Event()

    def work(job):
        computing.set()
        go_on.wait(60)

    with working(tiny_ckpt, tmp_path) as worker:
        with listening_server(worker, grace=5) as port:
            lines = (Line(settings={"prompt": "a horse"}),)
            request = JobRequest(task="text to picture", model=worker.models.default, lines=lines, out="")
            job = worker.submit(request, work=work)
            assert computing.wait(30)
            stream = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/jobs/{job.id}/events", timeout=30)
        assert stream.read().decode().count("event: stopped") == 1
        go_on.set()
    assert not caplog.records


@pytest.mark.slow
def test_a_server_ends_in_the_middle_of_a_long_step(tmp_path):
    """A step of the small model at this size takes longer than the server's patience."""
    with process(tmp_path, embedded_model()) as (child, address):
        job = ask(address, "/api/jobs", {"prompt": "a horse", "width": 2560, "height": 2560, "steps": 5})["id"]
        while ask(address, f"/api/jobs/{job}")["steps"] == 0:
            time.sleep(0.1)
        stream = urllib.request.urlopen(f"{address}/api/jobs/{job}/events", timeout=60)
        child.send_signal(signal.SIGTERM)
        code = child.wait(60)
        assert stream.read().decode().count("event: stopped") == 1
        assert (code, child.stderr.read()) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_however_a_server_ends_finished_pictures_are_whole(tiny_ckpt, tmp_path, number):
    with process(tmp_path, tiny_ckpt) as (child, address):
        ask(address, "/api/jobs", JOB)
        waiting = ask(address, "/api/jobs", JOB)["id"]
        assert ask(address, f"/api/jobs/{waiting}")["state"] == "queued"
        with_pictures(tmp_path, 3)
        stream = urllib.request.urlopen(f"{address}/api/jobs/{waiting}/events", timeout=60)
        child.send_signal(number)
        code = child.wait(60)
        if number != signal.SIGKILL:
            assert stream.read().decode().count("event: stopped") == 1
        said = child.stderr.read()
    assert (code, said) == ((-9, "") if number == signal.SIGKILL else (0, ""))
    found = sorted(tmp_path.glob("out/*.png"))
    assert 3 <= len(found) < 500
    for path in found:
        with Image.open(path) as picture:
            picture.load()
            assert json.loads(picture.text["sd"])["prompt"] == "a horse"
    leftovers = [path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".png"]
    assert len(leftovers) <= (number == signal.SIGKILL)


def test_every_route_of_our_api_is_described_and_nothing_else():
    routes = {(method, path) for face in (api, about, openapi) for method, path, _ in face.ROUTES}
    assert routes == set(openapi.ABOUT)
    document = openapi.description()
    assert {(method.upper(), path) for path, methods in document["paths"].items() for method in methods} == routes
    assert sorted(document["components"]["schemas"]["Job"]["properties"]) == NAMES
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert named <= set(document["components"]["schemas"])
    json.dumps(document)
