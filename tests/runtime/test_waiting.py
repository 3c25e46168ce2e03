"""Threads wait asleep where the machine is busy, and only where nobody has decided otherwise."""

import os
import subprocess
import sys

import pytest

from sd.runtime.cpu import waiting
from sd.runtime.cpu.waiting import CHOSEN, sleep_where_busy


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Have this process look as if it had run and waited so long, and had not imported PyTorch."""
    for name in CHOSEN:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch")

    def counted(text):
        (tmp_path / "schedstat").write_text(text)
        monkeypatch.setattr(waiting, "RUN_AND_WAITED", tmp_path / "schedstat")

    return counted


@pytest.mark.parametrize(
    ("text", "busy"),
    [
        *(("80 240 20", True), ("80 41 1", True), ("80 8 1", False), ("80 0 1", False)),
        *(("0 0 0", False), ("", False), ("x y", False)),
    ],
)
def test_threads_sleep_where_the_process_had_to_wait(counted, text, busy):
    counted(text)
    assert sleep_where_busy() == busy
    assert os.environ.get("OMP_WAIT_POLICY") == ("PASSIVE" if busy else None)


@pytest.mark.parametrize("name", CHOSEN)
def test_what_the_user_has_set_stays(counted, monkeypatch, name):
    counted("80 240 20")
    monkeypatch.setenv(name, "5")
    assert not sleep_where_busy()
    assert os.environ[name] == "5"
    assert os.environ.get("OMP_WAIT_POLICY") == ("5" if name == "OMP_WAIT_POLICY" else None)


def test_where_nothing_counts_nothing_changes(counted, monkeypatch, tmp_path):
    monkeypatch.setattr(waiting, "RUN_AND_WAITED", tmp_path / "missing")
    assert not sleep_where_busy()


def test_the_command_decides_and_the_library_does_not(tmp_path):
    (tmp_path / "schedstat").write_text("80 240 20")
    code = (
        "import os, pathlib, sys, sd\nfrom sd.app.cli import main\nfrom sd.runtime.cpu import waiting\n"
        "waiting.RUN_AND_WAITED = pathlib.Path(sys.argv[1])\n"
        "assert 'OMP_WAIT_POLICY' not in os.environ\nmain(['tokens', 'a', '--json'])\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE' and 'torch' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    subprocess.run([sys.executable, "-c", code, tmp_path / "schedstat"], env=environment, check=True)
