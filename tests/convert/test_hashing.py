"""The hash of a file is remembered as long as the file is the same, and nothing fails where it cannot be."""

import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from convert.files import hashing
from convert.files.hashing import FileHash, compute_aside, file_sha256, hashed_meanwhile


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sd-zoo" / "sha256.json"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def forge(cache):
    """Change the remembered hash, so that one sees where a hash comes from."""
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: "f" * 64}))


def test_a_file_is_read_once(model, cache):
    assert file_sha256(model) == sha256(b"weights")
    forge(cache)
    assert file_sha256(model) == "f" * 64
    assert os.listdir(cache.parent) == ["sha256.json"]


def test_a_changed_file_is_read_again(model, cache):
    file_sha256(model)
    forge(cache)
    model.write_bytes(b"others!")
    os.utime(model, ns=(1, 1))
    assert file_sha256(model) == sha256(b"others!")


def test_a_file_changed_in_place_under_its_old_time_is_read_again(model, cache):
    before = model.stat()
    file_sha256(model)
    model.write_bytes(b"others!")
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_sha256(model) == sha256(b"others!")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_lies_in_place_of_the_cache_is_neither_read_nor_waited_for(model, cache, plant):
    cache.parent.mkdir(parents=True)
    plant(cache)
    assert file_sha256(model) == sha256(b"weights")


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"{", b"\xff", b"[]", b"[" * 100_000, b'{"a": {}, "b": [], "c": 1, "d": null}'),
        *({"model": value} for value in (7, None, ["f" * 64], "", "no hash")),
    ],
)
def test_a_damaged_cache_is_replaced(model, cache, damage):
    file_sha256(model)
    if isinstance(damage, dict):
        (key,) = json.loads(cache.read_text())
        damage = json.dumps({key: damage["model"]}).encode()
    cache.write_bytes(damage)
    assert file_sha256(model) == sha256(b"weights")
    assert list(json.loads(cache.read_text()).values()) == [sha256(b"weights")]


def test_a_cache_that_cannot_be_written_does_no_harm(model, cache):
    cache.parent.parent.write_text("a file where a folder should be")
    assert file_sha256(model) == sha256(b"weights")


def test_a_failed_write_leaves_nothing_behind(model, cache, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert file_sha256(model) == sha256(b"weights")
    assert os.listdir(cache.parent) == []


def test_a_user_without_a_home_gets_the_hash(model, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)
    assert file_sha256(model) == sha256(b"weights")


def test_a_hash_is_computed_at_the_first_call_wherever_that_is(model, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digest = FileHash(Path(model.name))
    monkeypatch.chdir("/")
    assert digest() == sha256(b"weights")
    model.unlink()
    assert digest() == sha256(b"weights")


def test_old_hashes_are_forgotten(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(hashing, "KEPT", 2)
    for index in range(3):
        path = tmp_path / str(index)
        path.write_bytes(bytes([index]))
        file_sha256(path)
    assert list(json.loads(cache.read_text()).values()) == [sha256(bytes([index])) for index in (1, 2)]


def test_a_hash_that_is_computed_meanwhile_is_waited_for(model, cache):
    digest = hashed_meanwhile(model)
    assert digest() == digest() == sha256(b"weights")
    with pytest.raises(FileNotFoundError):
        hashed_meanwhile(model.with_name("gone"))()


@pytest.mark.parametrize("change", [b"others!", b"longer than before", None])
def test_a_file_that_was_replaced_or_is_gone_has_no_hash(model, cache, change):
    digest = FileHash(model)
    if change is None:
        model.unlink()
    else:
        model.write_bytes(change)
        os.utime(model, ns=(1, 1))
        assert FileHash(model)() == sha256(change)
    assert digest() is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, a thread has no priority of its own")
def test_a_hash_computed_aside_leaves_the_processor_to_others(model, cache, monkeypatch):
    found, ended = [], threading.Event()

    def work_ahead(self):
        found.append((os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), self()))
        ended.set()

    monkeypatch.setattr(FileHash, "work_ahead", work_ahead)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())  # that of `nice`, if it was started so
    compute_aside(FileHash(model))
    assert ended.wait(60)
    assert found == [(19, sha256(b"weights"))]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def test_who_needs_the_hash_does_the_rest_of_what_another_thread_has_begun(model, cache, monkeypatch):
    monkeypatch.setattr(hashing, "CHUNK", 1)
    pieces, begun, called, right = [], threading.Event(), threading.Event(), sha256(b"weights")

    class Slow:
        """A hash whose second piece takes as long as nobody calls, and whose pieces tell by which thread."""

        def __init__(self):
            self.real = hashlib.new("sha256")
            self.hexdigest = self.real.hexdigest

        def update(self, piece):
            pieces.append(threading.current_thread())
            if len(pieces) == 2:
                begun.set()
                assert called.wait(60)
            self.real.update(piece)

    monkeypatch.setattr(hashing.hashlib, "sha256", Slow)
    digest = FileHash(model)
    monkeypatch.setattr(digest._called, "set", lambda at=digest._called.set: (at(), called.set()))
    compute_aside(digest)
    assert begun.wait(60)
    assert digest() == right
    assert pieces[2:] == [threading.current_thread()] * 5
    assert threading.current_thread() not in pieces[:2]


def test_a_hash_is_computed_aside_to_its_end(model, cache):
    digest = FileHash(model)
    digest.work_ahead()
    assert digest.digest == sha256(b"weights")
    compute_aside(digest)
    assert digest() == sha256(b"weights")
