"""A mapped file that gets shorter while it is read ends a command with a sentence, and no process by a signal."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from convert.actions.convert import convert
from convert.errors import CorruptFileError
from convert.files.mapped import FileShortenedError, shrinking_watched
from convert.files.reader import open_checkpoint
from convert.files.tensors import as_tensor
from sd.files import embedded_model

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="the system keeps mapped files whole")
WAYS = {
    "bytes": bytes,
    "a checksum, without the lock of the interpreter": zlib.crc32,
    "numpy": lambda data: np.frombuffer(data, np.float32).sum(),
    "torch": lambda data: torch.frombuffer(data, dtype=torch.float32).sum().item(),
    "a write to the copy": lambda data: data.__setitem__(len(data) - 1, 7),
}


@pytest.fixture
def opened(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(1 << 18)}, path)
    with shrinking_watched():
        file = open_checkpoint(path)
        yield file, path
    file.close()


def wait_in_python(*_: object) -> None:
    for _ in range(5000):
        time.sleep(0.001)


@pytest.mark.parametrize("in_a_thread", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_reading_what_is_gone_is_an_error_in_the_main_thread(opened, way, in_a_thread):
    file, path = opened
    data = file.storage_bytes(file.root["weight"])
    os.truncate(path, 5000)

    def read() -> None:
        if in_a_thread:
            thread = threading.Thread(target=WAYS[way], args=(data,))
            thread.start()
            thread.join()
        else:
            WAYS[way](data)
        wait_in_python()

    with pytest.raises(FileShortenedError, match=r"^model\.safetensors became shorter while it was read\. Try again"):
        read()


def test_a_tensor_of_a_closed_file_is_watched_too(opened):
    file, path = opened
    tensor = as_tensor(file, file.root["weight"])
    file.close()
    os.truncate(path, 5000)
    with pytest.raises(FileShortenedError):
        wait_in_python(torch.mul(tensor, 2))


def test_an_import_is_finished_first(opened, tmp_path, monkeypatch):
    file, path = opened
    data = file.storage_bytes(file.root["weight"])
    os.truncate(path, 5000)
    (tmp_path / "half_a_module.py").write_text("import __main__\n__main__.read()\nis_whole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("__main__.read", lambda: [zlib.crc32(data), time.sleep(0.1)], raising=False)
    with pytest.raises(FileShortenedError):
        wait_in_python(importlib.import_module("half_a_module"))
    assert sys.modules.pop("half_a_module").is_whole


@pytest.mark.parametrize("noticed", ["", "zeros"])
def test_the_lost_file_is_said_whatever_the_main_thread_comes_to_first(noticed, tmp_path, monkeypatch):
    """An error because of the zeros, or its end."""
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(1 << 18)}, path)
    monkeypatch.setattr("_thread.interrupt_main", lambda _: None)

    def read(file) -> None:
        os.truncate(path, 5000)
        zlib.crc32(file.storage_bytes(file.root["weight"]))
        if noticed:
            raise ValueError(noticed)

    with pytest.raises(FileShortenedError, match=r"^model\.safetensors became shorter") as caught, shrinking_watched():
        read(open_checkpoint(path))
    assert str(caught.value.__cause__ or "") == noticed


def test_handlers_are_as_before_afterwards(tmp_path):
    before = signal.getsignal(signal.SIGBUS)
    with shrinking_watched():
        assert signal.getsignal(signal.SIGBUS) is not before
    assert signal.getsignal(signal.SIGBUS) == before


@pytest.mark.parametrize("left", [100, 5000, -1])
def test_a_shortened_file_is_found_before_and_after_its_weights_are_used(opened, left):
    file, path = opened
    os.truncate(path, left if left > 0 else path.stat().st_size - 1)  # a last byte lost is no signal
    with pytest.raises(CorruptFileError, match=r"model\.safetensors became shorter"):
        file.verify(file.root["weight"])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors became shorter"), file:
        pass


@pytest.mark.parametrize("kind", [".safetensors", ".ckpt"])
def test_a_source_that_becomes_shorter_once_all_is_written_does_no_harm(kind, tmp_path, monkeypatch):
    source = Path(shutil.copy(embedded_model(), tmp_path / "model.ckpt"))
    undisturbed, disturbed = tmp_path / f"undisturbed{kind}", tmp_path / f"disturbed{kind}"
    convert(source, undisturbed)
    monkeypatch.setattr(os, "fsync", lambda _: os.truncate(source, 5000))  # the last call before the file gets its name
    convert(source, disturbed)
    assert source.stat().st_size == 5000
    assert disturbed.read_bytes() == undisturbed.read_bytes()


@pytest.mark.slow
def test_commands_end_with_a_sentence_whenever_the_file_is_cut():
    script = Path(__file__).parents[2] / "scripts" / "checks" / "shorten_while_reading.py"
    done = subprocess.run([sys.executable, str(script), "--runs", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
