"""C++ is compiled once and kept; a kept file is used only if it is undamaged and no other user can write to it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from convert.files.hashing import file_sha256
from convert.files.own_files import UntrustedError
from sd.files import cache_folder
from sd.runtime.cpu.native import FLAGS, Kernel, compiler, library, opened

pwd = pytest.importorskip("pwd")
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


@pytest.mark.parametrize("shared", ["cache/sd-zoo/native", "cache/sd-zoo", "cache"])
def test_nothing_is_run_from_a_folder_that_others_can_change(source, folder, tmp_path, shared):
    library(source, FLAGS)
    (tmp_path / shared).chmod(0o777)
    with pytest.raises(UntrustedError, match=f"other users can change the folder {Path(shared).name}"):
        library(source, FLAGS)
    (tmp_path / shared).chmod(0o700)
    assert library(source, FLAGS).seven() == 7


def test_the_user_s_own_group_is_nobody_else(source, folder, monkeypatch):
    library(source, FLAGS)
    user = pwd.getpwuid(os.geteuid())
    os.chown(folder, -1, user.pw_gid)
    folder.chmod(0o770)

    def group(members, name=user.pw_name):
        monkeypatch.setattr("grp.getgrgid", lambda number: SimpleNamespace(gr_name=name, gr_mem=members))

    for members in ([], [user.pw_name]):
        group(members)
        assert library(source, FLAGS).seven() == 7
    for shared in ({"members": [user.pw_name, "other"]}, {"members": [], "name": "users"}):
        group(**shared)
        with pytest.raises(UntrustedError, match="native"):
            library(source, FLAGS)


def test_folders_are_made_for_the_user_only_whatever_is_the_habit(source, folder, tmp_path):
    """Also by the cache of hashes, which may be the first one to need them."""
    before = os.umask(0)
    try:
        file_sha256(source)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder.parent, folder.parent.parent)] == [0o700, 0o700]
    assert library(source, FLAGS).seven() == 7


def test_a_sticky_folder_on_the_way_is_trusted_but_not_at_the_end(source, folder, tmp_path):
    library(source, FLAGS)
    (tmp_path / "cache").chmod(0o1777)
    assert library(source, FLAGS).seven() == 7
    folder.chmod(0o1777)
    with pytest.raises(UntrustedError):
        library(source, FLAGS)


def test_a_link_of_ours_is_followed_and_where_it_leads_is_checked(source, tmp_path):
    (tmp_path / "elsewhere").mkdir(0o700)
    (tmp_path / "cache").symlink_to("elsewhere")
    assert library(source, FLAGS).seven() == 7
    (tmp_path / "elsewhere").chmod(0o777)
    with pytest.raises(UntrustedError, match="elsewhere"):
        library(source, FLAGS)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("given", ["cache", "cache/sd-zoo/native", "link"])
def test_what_belongs_to_another_user_is_not_run(source, folder, tmp_path, monkeypatch, given):
    library(source, FLAGS)
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
    assert library(source, FLAGS).seven() == 7
    os.chown(tmp_path / given, 12345, -1, follow_symlinks=False)
    with pytest.raises(UntrustedError):
        library(source, FLAGS)


def planted(kind, path):
    """Put something of another kind where a compiled file was."""
    good = path.rename(path.with_suffix(".good"))
    if kind == "link":
        path.symlink_to(good)
    elif kind == "second name":
        os.link(good, path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "writable":
        path.write_bytes(good.read_bytes())
        path.chmod(0o666)
    elif kind == "another user's":
        path.write_bytes(good.read_bytes())
        os.chown(path, 12345, -1)


@pytest.mark.parametrize("kind", ["link", "second name", "pipe", "folder", "writable", "another user's"])
def test_what_is_no_file_of_ours_is_neither_run_nor_waited_for(source, folder, kind):
    if kind == "another user's" and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    library(source, FLAGS)
    (path,) = folder.iterdir()
    planted(kind, path)
    opening = os.open(folder, os.O_RDONLY)
    try:
        assert opened(opening, path.name.rpartition("-")[0]) is None
    finally:
        os.close(opening)
    assert path.exists() == (kind == "folder")


def test_the_file_that_was_checked_is_the_one_that_is_loaded(source, folder, monkeypatch):
    """Somebody replaces it between the two."""
    library(source, FLAGS)
    (path,) = folder.iterdir()
    (folder.parent / "evil.cpp").write_text('extern "C" int seven() { return 666; }')
    subprocess.run(["g++", "-shared", "-fPIC", folder.parent / "evil.cpp", "-o", folder.parent / "evil.so"], check=True)
    load = ctypes.CDLL

    def swapped_then_loaded(name):
        os.replace(folder.parent / "evil.so", path)
        return load(name)

    monkeypatch.setattr("sd.runtime.cpu.native.ctypes.CDLL", swapped_then_loaded)
    assert library(source, FLAGS).seven() == 7


def test_two_sources_are_two_libraries(source, tmp_path):
    other = tmp_path / "eight.cpp"
    other.write_text('extern "C" int eight() { return 8; }')
    assert (library(source, FLAGS).seven(), library(other, FLAGS).eight()) == (7, 8)


@pytest.mark.parametrize("given", ["relative", ".", "", "./x"])
def test_a_relative_cache_folder_is_ignored(source, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir(0o700)
    assert cache_folder() == tmp_path / "home" / ".cache" / "sd-zoo"
    monkeypatch.setenv("HOME", "home")
    assert library(source, FLAGS) is None


def test_a_kernel_says_why_it_is_not_there(source, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    kernel = Kernel("attention", lambda: [], dict)
    assert kernel.library() is None
    assert "other users can change the folder cache" in kernel.problem


def test_a_source_that_cannot_be_compiled_leaves_nothing(source, folder):
    source.write_text("no C++")
    assert library(source, FLAGS) is None
    assert os.listdir(folder) == []
