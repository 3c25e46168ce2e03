"""The measurement of conversions: what it counts as memory, how it compares, and that it runs from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import prove_conversion
import pytest
from prove_conversion import Finished, own_memory, shown, table, watched

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted by Linux")

MB = 1 << 20
HOLDING = """
import mmap, sys
held = bytearray(b"x") * {held}  # every page written
file = open(sys.argv[1], "r+b")
mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
read = sum(mapping[start] for start in range(0, len(mapping), 4096))
for start in range(0, {changed}, 4096):
    mapping[start] = 1
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("held", "changed"), [(0, 0), (48 * MB, 0), (0, 48 * MB)], ids=["nothing", "heap", "changed"])
def test_pages_of_a_mapped_file_are_no_memory_until_they_are_changed(tmp_path, held, changed):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (64 * MB))
    command = [sys.executable, "-c", HOLDING.format(held=held, changed=changed), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        found = own_memory(process.pid)
        process.stdin.close()
    assert held + changed <= found < held + changed + 40 * MB  # the interpreter itself has about 10 MB
    assert own_memory(process.pid) == 0


def test_a_command_is_watched_to_its_end(tmp_path):
    code = "import time; held = bytearray(b'x') * (96 << 20); time.sleep(0.5); del held; time.sleep(0.1)"
    finished = watched([sys.executable, "-c", code], tmp_path)
    assert 96 * MB <= finished.peak < 150 * MB
    assert finished.seconds >= 0.6
    with pytest.raises(SystemExit, match="no such thing"):
        watched([sys.executable, "-c", "import sys; sys.exit('no such thing')"], tmp_path)


def test_medians_ratios_and_goals_by_hand():
    def runs(*seconds, peak=0):
        return [Finished(seconds=value, peak=peak) for value in seconds]

    found = {
        "inspect": runs(0.9, 0.6, 0.3),
        "convert --no-hash": runs(4, 4, 8, peak=299_000_000),
        "convert": [*runs(10, 5, 20), *runs(9, peak=250_000_000)],  # median 9.5
        "convert to fp16": runs(1, peak=1_100_000_000),
    }
    rows = table(7_700_000_000, 4_264_000_000, found, [(1, 7.7), (2, 1), (3, 30)])
    assert [line.split() for line in shown(rows).splitlines()] == [
        line.split()
        for line in """
            file                                         7700.00 MB
            written by convert, and by cp                4264.00 MB
            inspect                                         0.60 s              at most 0.5   MISSED
            cp                                              2.00 s
            cp and fsync                                    7.70 s
            convert                                         9.50 s
            convert --no-hash                               4.00 s
            convert beside cp and fsync                     0.81 of cp's speed
            convert --no-hash beside cp and fsync           1.93 of cp's speed  at least 0.8  met
            convert beside cp alone                         0.21 of cp's speed
            memory of convert                             299.00 MB             at most 300   met
            memory of convert to fp16                    1100.00 MB             at most 1000  MISSED
        """.strip().splitlines()
    ]


def ended(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["prove_conversion.py", *map(str, options)])
    with pytest.raises(SystemExit) as caught:
        prove_conversion.main()
    return caught.value.code


@pytest.mark.slow
def test_a_narrow_file_is_measured_from_end_to_end(tiny_ckpt, tmp_path, monkeypatch, capsys):
    code = ended(monkeypatch, tiny_ckpt, "--folder", tmp_path, "--runs", "1", "--json")
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert code == int(any(row["is_met"] is False for row in rows.values()))
    assert rows["file"]["value"] == tiny_ckpt.stat().st_size / 1e6
    assert 0.4 < rows["written by convert, and by cp"]["value"] / rows["file"]["value"] < 0.9  # no averaged weights
    assert all(row["value"] > 0 for row in rows.values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--runs", "0"], "--runs must be at least 1, got 0"),
        (["--folder", "nowhere"], "nowhere is no folder"),
        (["nowhere.ckpt"], "nowhere.ckpt is not a file"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_sentence(options, words, monkeypatch, capsys):
    assert ended(monkeypatch, *options) == 2
    assert words in capsys.readouterr().err
