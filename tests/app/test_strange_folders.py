"""Whatever lies in the folder of the outputs, or is wrong with a stream: no hang, no internal error, one sentence."""

import errno
import io
import json
import os
import struct
import sys
import zlib
from pathlib import Path

import pytest
from conftest import refused
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_cli import shell
from test_files import special, within

from sd.app.cli import COMMANDS, main
from sd.app.jobs.outputs import Names
from sd.app.jobs.resuming import finished_pictures, stopped_seed
from sd.pipeline.settings import Settings

SMALL = ["-W", "64", "-H", "64", "--steps", "1"]
JOB = Settings(prompt="a", width=64, height=64, steps=1, seed=1)
NESTED = "[" * 100_000
HOSTILE = {  # texts under "sd" that others may have written
    "not an object": "[1]",
    "nested": NESTED,
    "a nested prompt": json.dumps({**JOB.to_dict(), "prompt": "(" * 50_000}),
    "a huge number": json.dumps(JOB.to_dict()).replace('"steps": 1', f'"steps": {"9" * 4000}'),
    "a huge float": json.dumps(JOB.to_dict()).replace("7.5", "1e999"),
    "a huge sigma": json.dumps(JOB.to_dict()).replace('"sigmas": []', f'"sigmas": [{"9" * 4000}]'),
    "a huge interval": json.dumps(JOB.to_dict()).replace('interval": []', f'interval": [0, {"9" * 400}]'),
    "wrong types": json.dumps({name: {} for name in JOB.to_dict()}),
    "a model that is a list": json.dumps({**JOB.to_dict(), "model": [NESTED]}),
    "a surrogate": json.dumps({**JOB.to_dict(), "prompt": "\ud800"}),
    "a huge hires": json.dumps({**JOB.to_dict(), "hires": 10**400}).replace("null", "1"),
    "a huge seed": json.dumps({**JOB.to_dict(), "seed": 10**300}),
}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A PNG that says it is as wide and high as this."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    )


def fill(folder):
    """All that may be named like a picture."""
    folder.mkdir(parents=True)
    for number, kind in enumerate(("pipe", "socket", "folder", "nothing", "loop", "file"), 1):
        special(folder / f"{number:05}-1.png", kind)
    (folder / "00010-1.png").write_bytes(bomb(30_000))
    (folder / "00011-1.png").write_bytes(bomb(2**31 - 1))
    (folder / "00012-1.png").write_bytes(bomb(10)[:20])
    (folder / "00013-1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"zTXt", b"sd\0\0" + zlib.compress(bytes(10**8))))
    (folder / "00014-1.png").symlink_to("/dev/zero")
    for number, text in enumerate(HOSTILE.values(), 20):
        info = PngInfo()
        info.add_text("sd", text)
        Image.new("RGB", (8, 8)).save(folder / f"{number:05}-1.png", pnginfo=info)
    os.mkfifo(folder / f".{40:05}-1.png.0123abcd.tmp")


@pytest.mark.slow
def test_a_run_goes_on_beside_strange_files(call, tiny_ckpt, tmp_path):
    fill(tmp_path / "x")
    (tmp_path / "jobs.txt").write_text("a\nb")
    before = set(os.listdir("x"))
    results = []
    command = ["txt2img", "--from-file", "jobs.txt", "-m", tiny_ckpt, *SMALL, "-o", "x/", "-q"]
    within(60, lambda: results.append(call(*command)))
    (code, out, err) = results[0]
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2
    assert set(os.listdir("x")) - before == {Path(line).name for line in out.splitlines()}


def test_pictures_of_strangers_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "x")
    names, jobs = Names("x/{index:05}-{seed}.png"), [JOB, JOB.counted_on(1)]
    found = []
    within(60, lambda: found.append(finished_pictures(names, jobs, lambda stored: False)))
    within(60, lambda: found.append(stopped_seed(names, jobs, [True, True], lambda stored: False)))
    assert found == [{}, None]


@pytest.mark.slow
def test_a_damaged_picture_of_an_earlier_run_is_left_out_of_the_sheet(run, tiny_ckpt):
    command = ["txt2img", "a", "-m", tiny_ckpt, *SMALL, "-s", 1, "-o", "x/{seed}.png"]
    assert run(*command, "--count", 2)[0] == 0
    os.truncate("x/1.png", 4000)
    code, out, err = run(*command, "--count", 3, "--grid")
    assert (code, out) == (0, ["x/3.png", "x/grid-1.png"])
    assert "x/1.png is cut off or damaged" in err


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("nothing.png", "nothing.png exists already, as a link to nothing. Give another --out, or --force to replace"),
        ("loop.png", "loop.png exists already, as a link to nothing."),
        ("pipe.png", "pipe.png is a device or a pipe. Give another --out."),
        ("猫" * 84 + ".png", "has a name of 256 bytes; 255 are possible. Give a shorter one."),
        ("x/" * 3000 + "x.png", "File name too long"),
        ("loop.png/x.png", "nothing can be written to loop.png: it is a link to nothing. Give"),
        ("nothing.png/x.png", "nothing can be written to nothing.png: it is a link to nothing. Give"),
        ("file/x.png", "nothing can be written to file: it is a file. Give"),
    ],
)
def test_a_name_that_cannot_be_had_is_told_before_the_work(run, tiny_ckpt, tmp_path, monkeypatch, out, said):
    monkeypatch.setattr("sd.runtime.loading.from_checkpoint", lambda *_: pytest.fail("weights are read"))
    for kind in ("nothing", "loop", "pipe", "folder"):
        special(tmp_path / f"{kind}.png", kind)
    (tmp_path / "file").touch()
    refused(run("txt2img", "a", "-m", tiny_ckpt, *SMALL, "-o", out), said)


@pytest.mark.parametrize("extra", [["--grid"], ["--save-steps"]])
def test_names_that_follow_from_a_long_one_are_checked_before_the_work(run, tiny_ckpt, monkeypatch, extra):
    monkeypatch.setattr("sd.runtime.loading.from_checkpoint", lambda *_: pytest.fail("weights are read"))
    command = ["txt2img", "a", "-m", tiny_ckpt, *SMALL, "-o", "猫" * 83 + ".png", *extra]
    refused(run(*command), "are possible. Give a shorter one.")


@pytest.mark.parametrize("to", ["x.safetensors", "x.ckpt", "folder"])
@pytest.mark.parametrize("kind", ["nothing", "loop", "pipe"])
def test_a_conversion_is_refused_before_the_work_too(run, tiny_ckpt, tmp_path, monkeypatch, to, kind):
    monkeypatch.setattr("convert.actions.convert.plan_weights", lambda *_: pytest.fail("work begins"))
    special(tmp_path / to, kind)
    layout = ["--to", "diffusers"] if to == "folder" else []
    for force in ([], ["--force"] if to == "folder" or kind == "pipe" else []):
        refused(run("convert", tiny_ckpt, to, *layout, *force), to)
    assert os.listdir(tmp_path) == [to]


@pytest.mark.slow
def test_a_conversion_replaces_a_link_and_not_what_it_points_to(run, tiny_ckpt, tmp_path):
    assert run("convert", tiny_ckpt, "real", "--to", "diffusers")[0] == 0
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    kept = (tmp_path / "real/unet/diffusion_pytorch_model.safetensors").stat().st_ino
    os.mkfifo(tmp_path / ".link.0123abcd.tmp")
    assert run("convert", tiny_ckpt, "link", "--to", "diffusers", "--force")[0] == 0
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/unet/diffusion_pytorch_model.safetensors").stat().st_ino == kept
    assert run("convert", tiny_ckpt, "loop.ckpt", "--force")[0] == 0
    assert sorted(os.listdir(tmp_path)) == [".link.0123abcd.tmp", "link", "loop.ckpt", "real"]


PRINTING = {  # a command line for each command that prints something without much work
    "txt2img": "txt2img a -m CKPT -W 64 -H 64 --steps 1 -s 1 -q --precision fp32",
    "tokens": "tokens a",
    "schedule": "schedule --json",
    "inspect": "inspect CKPT",
    "diff": "diff CKPT CKPT",
    "models": "models",
    "convert": "convert CKPT x.safetensors -q",
    "noise": "noise there.png -m CKPT -q -W 64 -H 64 --timesteps 0",
}


class Full(io.RawIOBase):
    """A stream on a disk without room."""

    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def writable(self):
        return True

    def write(self, data):
        if self.error is not None:
            raise self.error
        return len(data)


@pytest.mark.slow
@pytest.mark.parametrize("words", [*PRINTING.values(), "--help", "--version", *(f"{name} --help" for name in COMMANDS)])
def test_a_full_stdout_is_one_sentence(words, tiny_ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("there.png")
    raw = Full()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
    stream = sys.stdout
    code = main(words.replace("CKPT", str(tiny_ckpt)).split())
    raw.error = None  # it is flushed once more when it is closed
    stream.close()
    assert (code, capsys.readouterr().err) == (2, "sd: standard output: No space left on device.\n")


@pytest.mark.slow
def test_a_full_or_closed_stderr_changes_no_exit_code(tmp_path, tiny_ckpt):
    make = f"SD txt2img a -m {tiny_ckpt} -W 64 -H 64 --steps 1 -s 1"
    full = shell(f"{make} 2>/dev/full", tmp_path)
    assert (full.returncode, full.stdout) == (0, "outputs/00001-1.png\n")
    assert shell("SD txt2img --nonsense 2>/dev/full", tmp_path).returncode == 2
    assert shell("SD txt2img --nonsense 2>&-", tmp_path).returncode == 2
    assert shell("SD tokens a >/dev/full 2>/dev/full", tmp_path).returncode == 2


def test_a_file_that_gets_too_large_is_named(tmp_path, tiny_ckpt):
    limited = shell(f"ulimit -f 100; SD convert {tiny_ckpt} x.safetensors -q", tmp_path)
    assert (limited.returncode, limited.stderr) == (2, "sd: x.safetensors: File too large.\n")
    assert os.listdir(tmp_path) == []
