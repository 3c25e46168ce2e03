"""Files that are complete or absent, whatever else lies in their folder or is wrong with their name."""

import errno
import os
import resource
import socket
import threading

import pytest

from sd.files import folder_written_whole, name_problem, remove_leftovers, written_whole

CJK = "猫" * 77 + "a.png"  # 236 bytes: allowed, but not with the ending of a temporary file


def special(path, kind):
    """Put a thing of this kind at a path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    elif kind == "folder":
        path.mkdir()
    elif kind in ("nothing", "loop", "file", "pipe behind a link"):
        target = {"nothing": "absent", "loop": path.name, "file": "other", "pipe behind a link": "pipe"}[kind]
        if kind == "pipe behind a link":
            os.mkfifo(path.with_name("pipe"))
        if kind == "file":
            path.with_name("other").write_bytes(b"other")
        path.symlink_to(target)


def within(seconds, call):
    """Run a call that must not hang."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("pipe", "is a device or a pipe"),
        ("pipe behind a link", "is a device or a pipe"),
        ("socket", "is a device or a pipe"),
        ("folder", "is a folder"),
        ("nothing", "exists already, as a link to nothing"),
        ("loop", "exists already, as a link to nothing"),
        ("file", "exists already. Give another name, or --force"),
    ],
)
def test_what_has_the_name_is_told_and_only_files_and_links_are_replaced(tmp_path, monkeypatch, kind, said):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.png"
    special(path, kind)
    with pytest.raises(FileExistsError, match=said), written_whole(path):
        pytest.fail("work begins")
    may = kind in ("nothing", "loop", "file")
    assert (name_problem(path, force=True) is None) == may
    if may:
        with written_whole(path, force=True) as file:
            file.write(b"new")
        assert not path.is_symlink()
        assert path.read_bytes() == b"new"
        assert kind != "file" or (tmp_path / "other").read_bytes() == b"other"


@pytest.mark.parametrize("name", [CJK, "a" * 255, "猫" * 85, "é" * 127])
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path, name):
    with written_whole(tmp_path / name) as file:
        file.write(b"1")
    assert os.listdir(tmp_path) == [name]
    with folder_written_whole(tmp_path / name[::-1][:-1], force=True) as folder:
        (folder / "x").touch()
    assert len(os.listdir(tmp_path)) == 2
    too_long = tmp_path / ("a" + "猫" * 85)
    assert name_problem(too_long) == "has a name of 256 bytes; 255 are possible. Give a shorter one."


@pytest.mark.parametrize("kind", ["pipe", "socket", "nothing", "loop", "file"])
@pytest.mark.parametrize("ending", ["tmp", "old"])
def test_strange_leftovers_neither_hang_a_run_nor_get_the_final_name(tmp_path, monkeypatch, kind, ending):
    monkeypatch.chdir(tmp_path)
    special(tmp_path / f".x.png.0123abcd.{ending}", kind)
    before = set(os.listdir(tmp_path))
    within(30, lambda: remove_leftovers([tmp_path / "x.png"]))
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_named_as_if_it_had_been_moved_aside_stays_where_it_is(tmp_path, folder):
    planted = tmp_path / ".model.0123abcd.old"
    planted.mkdir() if folder else planted.write_bytes(b"planted")
    remove_leftovers([tmp_path / "model"])
    assert os.listdir(tmp_path) == [planted.name]


@pytest.mark.parametrize("kind", ["a folder", "a link to a folder", "a link to nothing"])
def test_replacing_a_folder_leaves_nothing_else_behind(tmp_path, kind):
    path, other = tmp_path / "model", tmp_path / "other"
    if kind == "a folder":
        path.mkdir()
        (path / "old").touch()
    else:
        path.symlink_to(other)
    if kind == "a link to a folder":
        other.mkdir()
        (other / "kept").touch()
    before = set(os.listdir(tmp_path))
    with pytest.raises(FileExistsError, match="exists already"), folder_written_whole(path):
        pytest.fail("work begins")
    with pytest.raises(RuntimeError), folder_written_whole(path, force=True):
        raise RuntimeError
    assert set(os.listdir(tmp_path)) == before
    with folder_written_whole(path, force=True) as folder:
        (folder / "new").touch()
    assert set(os.listdir(tmp_path)) == before
    assert os.listdir(path) == ["new"]
    assert not path.is_symlink()
    assert kind != "a link to a folder" or os.listdir(other) == ["kept"]


def test_a_file_of_a_folder_is_named_as_it_would_be(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, folder_written_whole(tmp_path / "model") as folder:
        (folder / "no/x.bin").touch()
    assert caught.value.filename == str(tmp_path / "model/no/x.bin")
    assert os.listdir(tmp_path) == []


def test_a_file_that_has_no_room_is_named_and_absent(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, written_whole(tmp_path / "x.bin") as file:
            file.write(bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "x.bin"))
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.bin'"), written_whole(tmp_path / "x.bin"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="No such file or directory") as caught, written_whole(tmp_path / "no/x.bin"):
        pytest.fail("work begins")
    assert caught.value.filename == str(tmp_path / "no/x.bin")
    with pytest.raises(OSError, match="the source became shorter"), written_whole(tmp_path / "x.bin"):
        raise OSError("the source became shorter")  # what is wrong elsewhere keeps its own words
    assert os.listdir(tmp_path) == []
