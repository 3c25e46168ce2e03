"""Runs in shards by several processes, some of which are killed: every sample once, with the bytes of one process."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shards import SMALL, bytes_of, picture_in, prompts_file, samples_of

ROOT = Path(__file__).parents[2]
ONE_THREAD = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.slow


def command(ckpt, out, *flags, file="p.txt", size=10):
    words = ("txt2img", "--from-file", file, "-m", ckpt, *SMALL, "-s", 3, "-o", out, "--shard-size", size, *flags)
    return [sys.executable, "-m", "sd", *map(str, words)]


def started(folder, *words):
    return subprocess.Popen(
        words, cwd=folder, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    """Its results and messages, once it is done."""
    out, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return out.splitlines(), said


def verified(folder, out, said):
    result = subprocess.run(
        [sys.executable, "-m", "sd", "shards", "verify", out],
        cwd=folder,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, f"{said}\n"), result.stdout + result.stderr


def parent_of(process):
    """None if the process has ended."""
    try:
        return int(re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)[1])
    except OSError:
        return None


def writer(out, parent=None, wait=120):
    """A process that writes the tar of a shard now; waits for one.

    parent  the process that must have started it; None: any
    """
    end = time.monotonic() + wait
    while time.monotonic() < end:
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith(f"{out}/.") and ".tar." in target and target.endswith(".tmp"):
                process = int(link.parts[2])
                if parent in (None, parent_of(process)):
                    return process
        time.sleep(0.02)
    raise TimeoutError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_ckpt):
    """A folder with 60 prompts and 600, and the folder `one` with what one process makes of the 60."""
    folder = tmp_path_factory.mktemp("processes")
    prompts_file(folder / "p.txt", 60)
    prompts_file(folder / "many.txt", 600)
    ended(started(folder, *command(tiny_ckpt, "one")))
    return folder


def test_processes_share_a_folder_and_a_killed_one_leaves_nothing(folder, tiny_ckpt):
    """Three at once without --shards: each shard is made once; one is killed in the middle of a file."""
    out = folder / "shared"
    processes = [started(folder, *command(tiny_ckpt, "shared")) for _ in range(3)]
    victim = writer(out)
    os.kill(victim, signal.SIGKILL)
    results = []
    for process in processes:
        lines, said = process.communicate(timeout=600)
        assert process.returncode == (-signal.SIGKILL if process.pid == victim else 0), said
        results += lines.splitlines()
    assert sorted(results) == [f"shared/{number:05}.tar" for number in range(6)]
    verified(folder, "shared", "6 shards right, with 60 pictures")
    assert bytes_of(out) == bytes_of(folder / "one")  # and no temporary file is left


@pytest.mark.skipif(shutil.which("parallel") is None, reason="GNU parallel is not installed")
def test_parts_under_gnu_parallel_have_the_same_bytes(folder, tiny_ckpt):
    words = " ".join(command(tiny_ckpt, "parallel", "--shards", "{}/3"))
    out, _ = ended(started(folder, "parallel", "--will-cite", "-j", "2", words, ":::", "1", "2", "3"))
    assert sorted(out) == [f"parallel/{number:05}.tar" for number in range(6)]
    assert bytes_of(folder / "parallel") == bytes_of(folder / "one")


def test_a_killed_run_goes_on_where_it_stopped(folder, tiny_ckpt):
    process = started(folder, *command(tiny_ckpt, "killed"))
    while not (folder / "killed" / "00001_stats.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(writer(folder / "killed"), signal.SIGKILL)
    process.communicate()
    out, _ = ended(started(folder, *command(tiny_ckpt, "killed")))
    assert sorted(out) == [f"killed/{number:05}.tar" for number in range(6 - len(out), 6)]
    assert len(out) <= 4
    assert bytes_of(folder / "killed") == bytes_of(folder / "one")


def test_webdataset_datasets_and_pandas_read_them(folder):
    """With the packages themselves, where they are installed."""
    webdataset, pandas = pytest.importorskip("webdataset"), pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    tars = sorted(str(path) for path in (folder / "one").glob("*.tar"))
    samples = samples_of(*tars)
    found = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert [each["__key__"] for each in found] == [f"{i:09}" for i in range(60)]
    assert all(each["png"].tobytes() == picture_in(samples[f"{each['__key__']}.png"]).tobytes() for each in found)
    assert all(each["txt"] == each["json"]["prompt"] for each in found)
    loaded = datasets.load_dataset("webdataset", data_files=tars, split="train", cache_dir=str(folder / "cache"))
    assert (loaded.num_rows, loaded[59]["txt"], loaded[59]["png"].size) == (60, "a hat 59", (64, 64))
    table = pandas.concat(
        pandas.read_json(path, lines=True, dtype={"key": str}) for path in sorted((folder / "one").glob("*.jsonl"))
    )
    assert table["key"].tolist() == [f"{i:09}" for i in range(60)]
    assert table["seed"].tolist() == list(range(3, 63))


@pytest.fixture(scope="module")
def cluster():
    """Three nodes of Ray, each with its own processes."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # or its workers starve where anything else runs
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes = [cluster.add_node(num_cpus=1, wait=False) for _ in range(2)]
        cluster.wait_for_nodes(timeout=180)
        yield cluster, nodes
        cluster.shutdown()


def test_two_engines_on_one_folder_share_the_work(cluster, folder, tiny_ckpt):
    nodes, _ = cluster
    ray = ("--engine", "ray", "--address", nodes.address, "--workers", 2)
    processes = [started(folder, *command(tiny_ckpt, "engines", *flags)) for flags in (ray, (), ray)]
    paths = [path for process in processes for path in ended(process)[0]]
    assert sorted(paths) == [f"engines/{number:05}.tar" for number in range(6)]
    verified(folder, "engines", "6 shards right, with 60 pictures")
    assert bytes_of(folder / "engines") == bytes_of(folder / "one")


def test_a_node_and_a_worker_are_killed_and_every_sample_is_there_once(cluster, folder, tiny_ckpt):
    nodes, (lost, kept) = cluster
    of_lost, of_kept = (node.all_processes["raylet"][0].process.pid for node in (lost, kept))
    many = {"file": "many.txt"}
    ended(started(folder, *command(tiny_ckpt, "single", **many)))
    process = started(folder, *command(tiny_ckpt, "ray", "--engine", "ray", "--address", nodes.address, **many))
    out = folder / "ray"
    while len(list(out.glob("*_stats.json"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(writer(out, of_kept), signal.SIGKILL)
    writer(out, of_lost)  # as a worker that still starts loses no shard
    nodes.remove_node(lost, allow_graceful=False)
    paths, said = ended(process)
    assert said.count("its worker was lost; it is made anew") >= 2, said
    assert sorted(paths) == [f"ray/{number:05}.tar" for number in range(60)]
    verified(folder, "ray", "60 shards right, with 600 pictures")
    assert sorted(samples_of(*out.glob("*.tar"))) == sorted(samples_of(*(folder / "single").glob("*.tar")))
    assert {name for name in os.listdir(out) if name.startswith(".")} == set()
    assert bytes_of(out) == bytes_of(folder / "single")
