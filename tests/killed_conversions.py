"""Run conversions and kill each of them with SIGKILL; say what is there afterwards. Started by test_killed.py.

    python killed_conversions.py SOURCE FOLDER SEED COUNT

Each conversion is a child of its own, killed when a random share of its bytes is written, or, one in four, at a random
moment after the last of them: while the file is brought to the disk and gets its name. Prints one JSON object a line:
what was written, whether it was killed before its end, and the names in the folder with the sha256 of what they hold.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch  # noqa: F401 - before the forks, which is much faster than in each of them

import convert.actions.verify
import sd.networks.build  # noqa: F401
from convert.actions.convert import convert

TARGETS = {"ours.safetensors": "sd-zoo", "original.ckpt": "original", "folder": "diffusers"}


def main(source: Path, folder: Path, seed: int, count: int) -> None:
    generator = random.Random(seed)
    tails, totals = {}, {}
    for name, layout in TARGETS.items():
        told = []
        done = convert(
            source, folder / name, layout=layout, on_bytes=lambda n, told=told: told.append(time.monotonic())
        )
        tails[name], totals[name] = time.monotonic() - told[-1], done.nbytes
        report(name, False, folder)
    for number in range(count):
        name = list(TARGETS)[number % len(TARGETS)]
        if number % 2:
            remove(folder / name)
        if number % 4 == 3:
            least, pause = totals[name], generator.random() * 1.2 * tails[name]
        else:
            least, pause = generator.random() * totals[name], 0.0
        killed = run_and_kill(source, folder / name, least, pause)
        report(name, killed, folder)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_and_kill(source: Path, target: Path, least: float, pause: float) -> bool:
    """Whether the kill came before the conversion's end: `pause` seconds after `least` bytes were written."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        told = lambda count: os.write(writing, count.to_bytes(8, "little"))  # noqa: E731
        convert(source, target, layout=TARGETS[target.name], force=True, on_bytes=told)
        os._exit(0)
    os.close(writing)
    written = 0
    with open(reading, "rb") as pipe:
        while written < least and (count := pipe.read(8)):
            written += int.from_bytes(count, "little")
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def report(name: str, killed: bool, folder: Path) -> None:
    found = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    print(json.dumps({"target": name, "killed": killed, "found": found}), flush=True)


def sha256(path: Path) -> str:
    """Of a file, or of all names and files in a folder."""
    digest = hashlib.sha256()
    for place in [path] if path.is_file() else sorted(place for place in path.rglob("*") if place.is_file()):
        digest.update(place.relative_to(path).as_posix().encode() + b"\0" + place.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
