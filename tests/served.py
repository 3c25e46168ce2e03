"""A server for tests: the application with a worker and the narrow model, and one that listens on a port."""

import json
import threading
import time
from contextlib import closing, contextmanager

from sd.app.cli.prompt_files import setting_spellings
from sd.app.cli.serve import listening
from sd.app.cli.txt2img import parser
from sd.app.jobs.request import Events, ModelRequest
from sd.app.web.guard import Rules
from sd.app.web.job import LAST
from sd.app.web.models import Models
from sd.app.web.worker import Worker

QUICK = {"width": 64, "height": 64, "steps": 2, "seed": 7}
SPELLINGS = {key: flag.dest for key, flag in setting_spellings(parser()).items()}


@contextmanager
def working(file, out, *, folder=None, start=True, tiny_vae=None, **options):
    """A worker whose model is loaded."""
    worker = Worker(
        Models(ModelRequest(file=file, precision="fp32", tiny_vae=tiny_vae), folder), out=str(out), **options
    )
    if start:
        worker.start(Events())
    try:
        yield worker
    finally:
        worker.close()
        assert not start or worker.join(30)


def client(worker, rules=None, **options):
    """Asks the application of a worker, without a network."""
    from starlette.testclient import TestClient

    from sd.app.web.app import application

    headers = {"host": "127.0.0.1:7860"}
    return TestClient(
        application(worker, rules or Rules(), SPELLINGS), headers=headers, raise_server_exceptions=False, **options
    )


@contextmanager
def listening_server(worker, rules=None, grace=5):
    """A server with this worker on a free port of this machine; yields the port."""
    from sd.app.web.app import application
    from sd.app.web.server import Server

    with listening("127.0.0.1", 0) as sock:
        server = Server(application(worker, rules or Rules(), SPELLINGS), worker, grace)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)


def submitted(http, **fields):
    """The id of a job that was queued."""
    answer = http.post("/api/jobs", json={"prompt": "a horse", **QUICK, **fields})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def over(http, id, seconds=120):
    """A job once it is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = http.get(f"/api/jobs/{id}").json()
        if job["state"] in ("done", "failed", "stopped"):
            return job
        time.sleep(0.01)
    raise TimeoutError(job)


def events_of(http, id, **headers):
    """The events of a job, each its name and data, until the last."""
    found = []
    with http.stream("GET", f"/api/jobs/{id}/events", headers=headers) as answer, closing(answer):
        name = number = None
        for line in answer.iter_lines():
            key, _, value = line.partition(": ")
            if key == "id":
                number = int(value)
            elif key == "event":
                name = value
            elif key == "data":
                found.append((number, name, json.loads(value)))
    return found


def told_by(job, after=0):
    """Each event of a job after that number as it comes, up to the last."""
    happened = threading.Event()
    stop_listening = job.listen(happened.set)
    try:
        while True:
            happened.clear()
            for event in job.since(after):
                yield event
                after = event.id
                if event.name in LAST:
                    return
            happened.wait()
    finally:
        stop_listening()
