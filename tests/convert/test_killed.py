"""Conversions that are killed at any moment: under the final name is a whole file, or what was there before."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sd.files import _aside, folder_written_whole, remove_leftovers, written_whole

SCRIPT = Path(__file__).parents[1] / "killed_conversions.py"


@pytest.mark.slow
def test_fifty_kills_leave_no_half_file_under_the_final_name(tmp_path, tiny_ckpt):
    """Of 69 MB each. Every second one should replace what is there from before."""
    folder = tmp_path / "out"
    folder.mkdir()
    start = time.monotonic()
    output = subprocess.run(
        [sys.executable, SCRIPT, tiny_ckpt, folder, "7", "50"], capture_output=True, text=True, check=True, timeout=1200
    ).stdout
    runs = [json.loads(line) for line in output.splitlines()]
    whole = {run["target"]: run["found"][run["target"]] for run in runs[:3]}
    assert len(runs) == 53
    leftovers = 0
    for run in runs:
        for name, digest in run["found"].items():
            if name in whole:
                assert digest == whole[name], run
            else:
                assert name.startswith(".")
                assert name.endswith((".tmp", ".old"))
        leftovers += any(name.startswith(f".{run['target']}.") for name in run["found"])
        assert sum(name.startswith(f".{run['target']}.") for name in run["found"]) <= 2  # earlier ones were removed
    killed = sum(run["killed"] for run in runs)
    print(
        f"{killed} of 50 killed before their end, {leftovers} left something behind, {time.monotonic() - start:.0f} s"
    )
    assert killed > 30
    assert leftovers > 25


def test_what_a_killed_writer_left_behind_is_removed_and_what_is_being_written_is_not(tmp_path):
    path = tmp_path / "x.safetensors"
    (tmp_path / ".x.safetensors.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".x.safetensors.notes.tmp").write_bytes(b"somebody else's")
    (tmp_path / ".y.safetensors.0123abcd.tmp").write_bytes(b"of another file")
    folder = tmp_path / ".x.safetensors.4567abcd.tmp"
    folder.mkdir()
    (folder / "part").write_bytes(b"half")
    with written_whole(path) as out:
        out.write(b"all")
        remove_leftovers([path])
        assert Path(out.name).exists()
    with folder_written_whole(tmp_path / "model") as unfinished:
        (unfinished / "part").write_bytes(b"all")
        remove_leftovers([tmp_path / "model"])
        assert (unfinished / "part").exists()
    names = {"x.safetensors", "model", ".x.safetensors.notes.tmp", ".y.safetensors.0123abcd.tmp"}
    assert set(os.listdir(tmp_path)) == names


def test_a_folder_that_was_moved_aside_and_never_replaced_gets_its_name_back(tmp_path):
    (tmp_path / "model").mkdir()
    aside = _aside(tmp_path / "model", (tmp_path / "model").stat().st_ino)
    (tmp_path / "model").rename(aside)
    (aside / "part").write_bytes(b"precious")
    (tmp_path / ".model.0123abcd.tmp").mkdir()
    remove_leftovers([tmp_path / "model"])
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model/part").read_bytes() == b"precious"
    os.rename(tmp_path / "model", aside)
    (tmp_path / "model").mkdir()
    remove_leftovers([tmp_path / "model"])
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(tmp_path / "model") == []


def test_a_folder_that_is_just_being_replaced_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    aside = _aside(tmp_path / "model", (tmp_path / "model").stat().st_ino)
    descriptor = os.open(tmp_path / "model", os.O_RDONLY)
    os.rename(tmp_path / "model", aside)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    remove_leftovers([tmp_path / "model"])
    os.close(descriptor)
    assert os.listdir(tmp_path) == [aside.name]
