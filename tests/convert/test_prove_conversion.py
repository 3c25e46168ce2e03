"""The measurement of conversions: what it counts as memory, how it compares, and that it runs from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import prove_conversion
import pytest
from prove_conversion import Finished, Row, own_memory, shown, table, watched

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
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        found = own_memory(process.pid)
        process.stdin.close()
    assert int(status["VmRSS"].split()[0]) * 1024 > 64 * MB  # all of the file is mapped
    assert held + changed <= found < held + changed + 40 * MB  # the interpreter itself has about 10 MB
    assert own_memory(process.pid) == 0


def test_the_peak_is_kept_after_memory_was_given_back(tmp_path):
    code = "import time; held = bytearray(b'x') * (96 << 20); time.sleep(0.5); del held; time.sleep(0.1)"
    finished = watched([sys.executable, "-c", code], tmp_path)
    assert 96 * MB <= finished.peak < 150 * MB
    assert finished.seconds >= 0.6


def test_a_command_that_fails_ends_the_measurement_with_what_it_said(tmp_path):
    with pytest.raises(SystemExit, match="no such thing"):
        watched([sys.executable, "-c", "import sys; sys.exit('no such thing')"], tmp_path)


def test_medians_ratios_and_goals_by_hand():
    def runs(*seconds, peak=0):
        return [Finished(seconds=value, peak=peak) for value in seconds]

    rows = table(
        7_700_000_000,
        4_264_000_000,
        runs(0.9, 0.4, 0.3),
        runs(4, 4, 8, peak=299_000_000),
        [*runs(10, 5, 20), *runs(9, peak=250_000_000)],  # median 9.5
        [1, 2, 3],
        [7.7, 1, 30],
        Finished(seconds=1, peak=1_100_000_000),
    )
    found = {row.what: (row.value, row.is_met) for row in rows}
    assert found == {
        "file": (7700, None),
        "written by convert, and by cp": (4264, None),
        "inspect": (0.4, True),
        "cp": (2, None),
        "cp and fsync": (7.7, None),
        "convert": (9.5, None),
        "convert --no-hash": (4, None),
        "convert beside cp and fsync": (7.7 / 9.5, None),
        "convert --no-hash beside cp and fsync": (7.7 / 4, True),
        "convert beside cp alone": (2 / 9.5, None),
        "memory of convert": (299, True),
        "memory of convert to fp16": (1100, False),
    }


def test_the_table_says_what_was_wanted_and_missed():
    rows = [
        Row(what="inspect", value=0.51, unit="s", at_most=0.5),
        Row(what="convert beside cp", value=0.8, unit="of cp's speed", at_least=0.8),
        Row(what="cp", value=2, unit="s"),
    ]
    assert [line.split() for line in shown(rows).splitlines()] == [
        ["inspect", "0.51", "s", "at", "most", "0.5", "MISSED"],
        ["convert", "beside", "cp", "0.80", "of", "cp's", "speed", "at", "least", "0.8", "met"],
        ["cp", "2.00", "s"],
    ]


def test_a_narrow_file_is_measured_from_end_to_end(tiny_ckpt, tmp_path, monkeypatch, capsys):
    options = [str(tiny_ckpt), "--folder", str(tmp_path), "--runs", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["prove_conversion.py", *options])
    with pytest.raises(SystemExit) as ended:
        prove_conversion.main()
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert ended.value.code == int(any(row["is_met"] is False for row in rows.values()))
    assert rows["file"]["value"] == tiny_ckpt.stat().st_size / 1e6
    assert 0.4 < rows["written by convert, and by cp"]["value"] / rows["file"]["value"] < 0.9  # no averaged weights
    assert all(row["value"] > 0 for row in rows.values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--runs", "0"], "--runs must be at least 1, got 0"),
        (["--folder", "nowhere"], "nowhere is no folder"),
        (["nowhere.ckpt"], "nowhere.ckpt is no file"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_sentence(options, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prove_conversion.py", *options])
    with pytest.raises(SystemExit) as ended:
        prove_conversion.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
