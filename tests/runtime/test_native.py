"""C++ is compiled once and kept; a kept file is used only if it is undamaged and no other user can write to it."""

import os
import subprocess
import sys

import pytest

from sd.runtime.cpu.native import FLAGS, compiler, library

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or compiler() is None, reason="there is no compiler, or this is not Linux"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "seven.cpp"
    path.write_text('extern "C" int seven() { return 7; }')
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "sd-zoo" / "native"


def call(source):
    """The command of a process that prints what the compiled function returns."""
    names = "from pathlib import Path; from sd.runtime.cpu.native import FLAGS, library"
    return [sys.executable, "-c", f"{names}; print(library(Path({str(source)!r}), FLAGS).seven())"]


def test_each_source_is_compiled_once(source, folder):
    built = []
    for _ in range(2):
        assert library(source, FLAGS, lambda: built.append(1)).seven() == 7
    assert len(built) == 1
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o022 == 0
    assert folder.stat().st_mode & 0o777 == 0o700
    source.write_text('extern "C" int seven() { return 8; }')
    assert library(source, FLAGS, lambda: built.append(1)).seven() == 8
    assert len(built) == 2


@pytest.mark.parametrize("command", ["no-such-compiler", "false", "'not closed"])
def test_without_a_compiler_that_works_there_is_nothing(source, folder, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    assert library(source, FLAGS) is None
    assert not folder.exists() or not os.listdir(folder)


@pytest.mark.parametrize("damage", [lambda data: data[:4096], lambda data: bytes(len(data))])
def test_a_damaged_file_is_made_again(source, folder, damage):
    run = call(source)
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "7\n"
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "7\n"
    assert len(list(folder.iterdir())) == 1


def test_several_processes_may_compile_at_a_time(source, folder):
    running = [subprocess.Popen(call(source), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in running] == 3 * ["7\n"]
    assert len(list(folder.iterdir())) <= 3
    assert all(path.suffix == ".so" and not path.name.startswith(".") for path in folder.iterdir())


def test_what_others_can_write_to_is_not_run(source, folder):
    library(source, FLAGS)
    folder.chmod(0o777)
    assert library(source, FLAGS) is None
    folder.chmod(0o700)
    assert library(source, FLAGS).seven() == 7


def test_a_source_that_cannot_be_compiled_leaves_nothing(source, folder):
    source.write_text("no C++")
    assert library(source, FLAGS) is None
    assert os.listdir(folder) == []
