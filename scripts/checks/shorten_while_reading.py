"""Make a checkpoint shorter while commands read it: each must end by itself, with a sentence if it needed what is gone.

    python scripts/checks/shorten_while_reading.py --runs 25

Each run of each command gets a copy of the embedded model, cut at a random length after a random time, within the time
that the command takes undisturbed. Prints a table of exit codes; fails if one is not 0 or 2, or if a 2 has no sentence.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "weights" / "sd-shapes.ckpt"
COMMANDS = {
    "inspect --deep": ["inspect", "--deep", "{model}"],
    "convert": ["convert", "{model}", "{folder}/out.safetensors", "--precision", "fp16"],
    "diff": ["diff", "{model}", "{source}"],
    "txt2img": ["txt2img", "a red circle", "-m", "{model}", "--steps", "3", "-o", "{folder}/out.png"],
}
SHORTER, OTHER = "became shorter while it was read", ("is damaged", "ends after", "incomplete", "empty", "longer than")


def run(command: list[str], folder: Path, wait: float | None, length: int) -> tuple[int, str, float]:
    """Exit code, what was said and what was left behind, and seconds.

    wait  seconds until the file is cut; None: never
    """
    folder.mkdir()
    model = Path(shutil.copy(SOURCE, folder / "model.ckpt"))
    words = [word.format(model=model, folder=folder, source=SOURCE) for word in command]
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "sd", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if wait is not None:
        time.sleep(wait)
        os.truncate(model, length)
    _, said = process.communicate(timeout=120)
    left = {path.name for path in folder.iterdir()} - {"model.ckpt", "cache"}
    said += f"LEFT: {left}" if process.returncode and left else ""
    return process.returncode, said, time.monotonic() - start


def outcome(code: int, said: str) -> str:
    if code == 0:
        return "finished"
    if code == 2 and "Traceback" not in said and "LEFT" not in said:
        if SHORTER in said:
            return "became shorter"
        if any(words in said for words in OTHER):
            return "was cut before"
    return f"FAULT: exit code {code}: {said[-300:]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", type=int, default=25, help="of each command (default: 25)")
    parser.add_argument("--commands", nargs="*", choices=COMMANDS, default=list(COMMANDS), help="(default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of the random times and lengths (default: 1)")
    args = parser.parse_args()
    pick = random.Random(args.seed)
    size, faults = SOURCE.stat().st_size, 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.commands:
            _, _, seconds = run(COMMANDS[name], Path(scratch, name), None, 0)
            found: Counter = Counter()
            for index in range(args.runs):
                folder = Path(scratch, f"{name} {index}")
                code, said, _ = run(COMMANDS[name], folder, pick.uniform(0.2, 1) * seconds, pick.randrange(1, size))
                found[outcome(code, said)] += 1
                shutil.rmtree(folder)
            faults += sum(number for kind, number in found.items() if kind.startswith("FAULT"))
            print(json.dumps({"command": name, "seconds": round(seconds, 2), **found}), flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
