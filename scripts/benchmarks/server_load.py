"""Load on `sd serve`: several clients at once, order, memory, stops, and what the server adds to a picture.

Starts a server with the embedded model and prints a table of figures. Each client submits jobs one after the other, and
follows each to its end; some are stopped at a random step.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
STOPPED = 0.05  # share of the jobs that their client stops
PROMPTS = ("a red circle on a blue background", "a green star on a white background", "a yellow square")


class Client:
    """Asks one server, and notes what it sees."""

    def __init__(self, address: str):
        self.address = address

    def ask(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def follow(self, id: str, stop_at: int | None = None) -> tuple[dict, int]:
        """A job once it is over, and how many steps it made after it was asked to stop."""
        asked_at, last = None, 0
        with urllib.request.urlopen(f"{self.address}/api/jobs/{id}/events", timeout=600) as stream:
            name = ""
            for line in stream:
                key, _, value = line.decode().rstrip("\n").partition(": ")
                name = value if key == "event" else name
                if key == "data" and name == "step":
                    last = json.loads(value)["step"]
                    if stop_at is not None and asked_at is None and last >= stop_at:
                        asked_at = self.ask(f"/api/jobs/{id}/stop", {})["step"]
        return self.ask(f"/api/jobs/{id}"), 0 if asked_at is None else last - asked_at


def resident(pid: int) -> float:
    """Megabytes of memory that a process has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def started(folder: Path, *flags: str) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "sd", "serve", "--port", "0", "-o", f"{folder}/", "-q", *flags]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    return child, child.stderr.readline().split()[-1]


def load(clients: int, jobs: int, steps: int, side: int) -> dict[str, object]:
    """What happens when so many clients ask for so many jobs, each for a picture of this side."""
    folder = Path(tempfile.mkdtemp(prefix="server-load-"))
    child, address = started(folder, "--keep", "50", "--queue", str(clients))
    numbers, lock = iter(range(jobs)), threading.Lock()
    submitted, ended, late, memory = [], {}, [], []

    def work() -> None:
        client = Client(address)
        while True:
            with lock:
                number = next(numbers, None)
                if number is None:
                    return
                fields = {"prompt": PROMPTS[number % len(PROMPTS)], "steps": steps, "seed": number, "width": side}
                fields["height"] = side
                id = client.ask("/api/jobs", fields)["id"]  # in turn: the order in which the server gets them is known
                submitted.append((id, number))
            stop_at = random.Random(number).randint(1, steps - 1) if number % round(1 / STOPPED) == 7 else None
            job, after = client.follow(id, stop_at)
            late.append(after)
            memory.append((len(ended), resident(child.pid)))
            ended[id] = job

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    child.terminate()
    code = child.wait(60)
    states = Counter(job["state"] for job in ended.values())
    files = sorted(folder.glob("*.png"))
    made = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    expected = [ended[id]["pictures"][0] for id, _ in submitted if ended[id]["pictures"]]
    tenth = max(1, len(memory) // 10)
    return {
        "clients": clients,
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "states": dict(states),
        "lost": jobs - len(ended) + sum(job["state"] == "done" and not job["pictures"] for job in ended.values()),
        "doubled": len(made) - len(set(made)),
        "files as promised, in the order of the jobs": made == [picture["sha256"] for picture in expected],
        "seeds as asked": all(ended[id]["pictures"][0]["seed"] == n for id, n in submitted if ended[id]["pictures"]),
        "most steps after a stop": max(late),
        "stopped": states["stopped"],
        "MB after a tenth of the jobs": round(statistics.median(mb for _, mb in memory[tenth : 2 * tenth])),
        "MB at the end": round(statistics.median(mb for _, mb in memory[-tenth:])),
        "exit code": code,
    }


def overhead(pictures: int, steps: int) -> dict[str, object]:
    """Processor time of a picture: the plain call in Python, and over HTTP without and with previews.

    All in one process, which is also the client, each way in turn: other programs on the machine disturb all alike.
    """
    import sd
    from sd.app.cli.serve import listening
    from sd.app.jobs.request import Events, ModelRequest
    from sd.app.web.app import application
    from sd.app.web.models import Models
    from sd.app.web.server import Server
    from sd.app.web.worker import Worker
    from sd.files import embedded_model

    folder = Path(tempfile.mkdtemp(prefix="server-overhead-"))
    model = sd.load()
    worker = Worker(Models(ModelRequest(file=embedded_model())), out=f"{folder}/served/")
    worker.start(Events())

    def plain(seed: int) -> None:
        (picture,) = model.txt2img(PROMPTS[0], steps=steps, seed=seed)
        picture.save(folder / f"{seed}.png")

    with listening("127.0.0.1", 0) as sock:
        server = Server(application(worker), worker, grace=5)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        client = Client(f"http://127.0.0.1:{sock.getsockname()[1]}")

        def served(seed: int, *, previews: bool = False) -> None:
            fields = {"prompt": PROMPTS[0], "steps": steps, "seed": seed, "previews": previews}
            job, _ = client.follow(client.ask("/api/jobs", fields)["id"])
            assert job["state"] == "done", job

        ways = {"plain": plain, "served": served, "with previews": partial(served, previews=True)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for seed in range(-2, pictures):  # two of each to warm up
            for name, make in ways.items():
                began = time.process_time()
                make(abs(seed))
                if seed >= 0:
                    times[name].append(time.process_time() - began)
        server.should_exit = True
        thread.join()
    ms = {name: 1000 * statistics.median(values) for name, values in times.items()}
    more = {f"{name}: more than plain": f"{100 * (ms[name] / ms['plain'] - 1):+.1f} %" for name in list(ways)[1:]}
    return {"pictures of each": pictures, **{f"{name}: ms": f"{value:.1f}" for name, value in ms.items()}, **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--overhead", type=int, metavar="N", help="only measure what the server adds, over N pictures")
    args = parser.parse_args()
    found = (
        overhead(args.overhead, args.steps) if args.overhead else load(args.clients, args.jobs, args.steps, args.size)
    )
    for name, value in found.items():
        print(f"{name:<46} {value}")


if __name__ == "__main__":
    main()
