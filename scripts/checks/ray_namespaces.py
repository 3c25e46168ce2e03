#!/usr/bin/env python3
"""Shards on three Ray nodes that have nothing in common but a folder: each in a network namespace of its own.

    python scripts/checks/ray_namespaces.py --pictures 300

Needs root, Linux and Ray. Makes the pictures in one process, then on the nodes; meanwhile kills a worker that writes a
file, and later every process of a node. Then all shards must be right, and have the bytes of the one process.
"""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BRIDGE, NETWORK, PORT = "sdbridge", "10.77.0", 6390
NODES = {f"sdnode{i}": f"{NETWORK}.{i}" for i in (1, 2, 3)}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
ENVIRONMENT |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sdray") as folder:
        folder = Path(folder)
        (folder / "p.txt").write_text("".join(f"a red circle {i}\n" for i in range(args.pictures)))
        flags = ["txt2img", "--from-file", "p.txt", "-s", "1", "--steps", str(args.steps), "-W", "64", "-H", "64", "-q"]
        flags += ["--shard-size", "10", "-o"]
        sd = [sys.executable, "-m", "sd"]
        run([*sd, *flags, "one"], folder)
        try:
            started(folder)
            inside = ["ip", "netns", "exec", "sdnode1", *sd, *flags, "three", "--engine", "ray", "--workers", "3"]
            driver = subprocess.Popen([*inside, "--address", f"{NETWORK}.1:{PORT}"], cwd=folder, env=ENVIRONMENT)
            wait_for(driver, lambda: len(list((folder / "three").glob("*_stats.json"))) >= 3)
            worker = wait_for(driver, lambda: writer_in(folder / "three", "sdnode2"))
            os.kill(worker, signal.SIGKILL)
            print(f"killed worker {worker} of sdnode2 while it wrote", flush=True)
            wait_for(driver, lambda: writer_in(folder / "three", "sdnode3"))
            print(f"killed {kill_all('sdnode3')} processes of sdnode3, which was writing", flush=True)
            assert driver.wait() == 0
        finally:
            ended()
        run([*sd, "shards", "verify", "three"], folder)
        one, three = (contents(folder / name) for name in ("one", "three"))
        assert one == three
        print(f"{len(one)} files are equal to those of one process")
    return 0


def run(words: list[str], folder: Path | None = None) -> str:
    result = subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{words}: {result.stdout}{result.stderr}")
    if "verify" in words:
        print(result.stdout, end="", flush=True)
    return result.stdout


def started(folder: Path) -> None:
    """A bridge, a namespace for each node, and Ray in each of them."""
    run(["ip", "link", "add", BRIDGE, "type", "bridge"])
    run(["ip", "link", "set", BRIDGE, "up"])
    for i, (name, address) in enumerate(NODES.items(), 1):
        run(["ip", "netns", "add", name])
        run(["ip", "link", "add", f"sdveth{i}", "type", "veth", "peer", "name", "eth0", "netns", name])
        run(["ip", "link", "set", f"sdveth{i}", "master", BRIDGE, "up"])
        inside = ["ip", "netns", "exec", name]
        run([*inside, "ip", "address", "add", f"{address}/24", "dev", "eth0"])
        for device in ("lo", "eth0"):
            run([*inside, "ip", "link", "set", device, "up"])
        role = ["--head", "--port", str(PORT), "--temp-dir", f"{folder}/ray", "--include-dashboard", "false"]
        role = role if i == 1 else ["--address", f"{NETWORK}.1:{PORT}"]
        size = ["--num-cpus", "1", "--object-store-memory", "100000000", "--node-ip-address", address]
        run([*inside, sys.executable, "-m", "ray.scripts.scripts", "start", *role, *size])


def ended() -> None:
    for i, name in enumerate(NODES, 1):
        kill_all(name)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"sdveth{i}"], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def processes_of(name: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def kill_all(name: str) -> int:
    """Kill what runs in a namespace of ours, without grace."""
    processes = processes_of(name)
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(processes)


def writer_in(out: Path, name: str) -> int | None:
    """A process of that node which writes the tar of a shard now."""
    for process in processes_of(name):
        for link in Path(f"/proc/{process}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith(f"{out}/.") and ".tar." in target and target.endswith(".tmp"):
                return process
    return None


def wait_for(driver: subprocess.Popen, found: object) -> object:
    while driver.poll() is None:
        if answer := found():
            return answer
        time.sleep(0.02)
    raise RuntimeError("the run ended before")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if "_stats" not in path.name}


if __name__ == "__main__":
    sys.exit(main())
