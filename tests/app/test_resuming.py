"""A run of several pictures that was stopped goes on where it was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import refused, settings_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd.app.jobs.outputs import Names, name_pictures, picture_paths
from sd.app.jobs.plan import with_seed_moved
from sd.app.jobs.resuming import finished_pictures, stopped_seed
from sd.files import remove_leftovers
from sd.pipeline.settings import Settings

SMALL = ["-W", "64", "-H", "64", "--steps", "1"]


def jobs_of(prompts, seed=5):
    return [Settings(prompt=prompt, width=64, height=64, steps=1, seed=seed + i) for i, prompt in enumerate(prompts)]


def leave(path, job):
    """A picture as a run leaves it."""
    info = PngInfo()
    info.add_text("sd", json.dumps(job.to_dict()))
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def always(stored):
    return True


def test_a_number_is_read_back_from_a_name():
    job = Settings(prompt="", width=64, height=64, seed=12)
    names = Names("out/{index:05}-{seed}-{sampler}.png")
    assert names.path(job, 34) == Path("out/00034-12-dpmpp_2m.png")
    assert names.index_of(Path("out/00034-12-dpmpp_2m.png"), job) == 34
    for other in ("out/34-12-dpmpp_2m.png", "out/00034-13-dpmpp_2m.png", "out/grid-00034-12-dpmpp_2m.png"):
        assert names.index_of(Path(other), job) is None
    assert Names("x-{seed}.png").index_of(Path("x-12.png"), job) == 0


def test_what_is_there_keeps_its_name_and_the_rest_gets_those_of_the_first_run(tmp_path):
    jobs = jobs_of("abcd")
    names = name_pictures(f"{tmp_path}/{{index:05}}-{{seed}}.png", jobs)
    (tmp_path / "00007-1.png").touch()  # of another run
    fresh = picture_paths(names, jobs)
    assert [path.name for path in fresh] == ["00008-5.png", "00009-6.png", "00010-7.png", "00011-8.png"]
    leave(fresh[0], jobs[0])
    leave(fresh[2], jobs[2])
    there = finished_pictures(names, jobs, always)
    assert there == {0: fresh[0], 2: fresh[2]}
    assert picture_paths(names, jobs, there) == fresh


def test_pictures_count_for_equal_jobs_only_and_taken_numbers_are_passed_over(tmp_path):
    jobs = jobs_of("a") * 3 + jobs_of("b")
    names = name_pictures(f"{tmp_path}/{{index}}.png", jobs)
    leave(tmp_path / "1.png", jobs[0])
    leave(tmp_path / "2.png", jobs[0])
    leave(tmp_path / "3.png", jobs_of("x")[0])
    (tmp_path / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    there = finished_pictures(names, jobs, always)
    assert there == {0: tmp_path / "1.png", 1: tmp_path / "2.png"}
    paths = picture_paths(names, jobs, there)
    assert [path.name for path in paths] == ["1.png", "2.png", "5.png", "6.png"]
    assert finished_pictures(names, jobs, lambda stored: False) == {}


def test_the_drawn_seed_of_a_stopped_run_is_found(tmp_path):
    counting = [False, True, True, True]

    def jobs(seed):
        own = Settings(prompt="own", width=64, height=64, steps=1, seed=3)
        return [own, *jobs_of("aab", seed + 1)]

    def found(seed):
        """The seed of the run that was stopped, seen from one with another seed."""
        moved = stopped_seed(names, jobs(seed), counting, always)
        return None if moved is None else seed + moved

    names = name_pictures(f"{tmp_path}/{{index}}-{{seed}}.png", jobs(0))
    assert found(0) is None
    for i, job in enumerate(jobs(70)):  # a complete run
        leave(names.path(job, 1 + i), job)
    assert found(0) is None
    for i, job in enumerate(jobs(900)[:3]):
        leave(names.path(job, 11 + i), job)
    assert found(0) == found(5000) == 900
    leave(names.path(jobs(900)[3], 14), jobs(900)[3])
    assert found(0) is None
    names.path(jobs(900)[2], 13).unlink()  # batches are not made in the order of the lines
    assert found(0) == 900
    assert with_seed_moved(jobs(0), counting, 900) == jobs(900)


def test_only_the_half_written_files_of_these_names_are_removed(tmp_path):
    for name in (".a.png.0123abcd.tmp", ".b.png.0123abcd.tmp", ".a.png.tmp", "a.png.0123abcd.tmp"):
        (tmp_path / name).touch()
    remove_leftovers([tmp_path / "a.png"])
    assert sorted(os.listdir(tmp_path)) == [".a.png.tmp", ".b.png.0123abcd.tmp", "a.png.0123abcd.tmp"]


@pytest.mark.slow
def test_the_same_command_goes_on_and_says_what_is_there(run, tiny_ckpt, tmp_path):
    (tmp_path / "jobs.txt").write_text("a\nb\nc\n")
    command = ["txt2img", "--from-file", "jobs.txt", "-m", tiny_ckpt, *SMALL, "--count", 2, "-b", 2, "-o", "x/"]
    code, out, err = run(*command)
    assert (code, len(out)) == (0, 6)
    whole = {name: (tmp_path / "x" / name).read_bytes() for name in os.listdir("x")}
    for path in out[3:]:  # in the middle of the second batch
        os.remove(path)
    (tmp_path / "x" / f".{Path(out[4]).name}.01234567.tmp").write_bytes(b"half")
    code, again, err = run(*command)  # without a seed: it is the one that was drawn
    assert (code, again) == (0, out[3:])
    assert "sd: 3 of 6 pictures exist already" in err
    assert {name: (tmp_path / "x" / name).read_bytes() for name in os.listdir("x")} == whole
    code, again, err = run(*command, "--seed", settings_of(out[0])["seed"])
    assert (code, again) == (0, [])
    assert "6 of 6 pictures exist already" in err
    other = ["txt2img", "--from-file", "jobs.txt", "-m", tiny_ckpt, *SMALL, "-g", 2, "--seed", 1]
    assert run(*other, "-o", "{seed}.png")[0] == 0
    refused(run(*other, "-g", 3, "-o", "{seed}.png"), "1.png exists already, made with other settings")


@pytest.mark.slow
def test_a_thousand_pictures_are_the_same_however_often_the_run_is_killed(tmp_path, tiny_ckpt):
    """Three kills -9 at random; then folder by folder, name by name, byte by byte."""
    lines = [json.dumps({"prompt": f"picture {i}", "steps": 1 + i % 2}) for i in range(1000)]  # in batches by turns
    (tmp_path / "jobs.txt").write_text("\n".join(lines))
    command = [sys.executable, "-m", "sd", "txt2img", "--from-file", "../jobs.txt", "-m", str(tiny_ckpt), "-b", "4"]
    command += ["-W", "64", "-H", "64", "--precision", "fp32", "--guidance-scale", "1", "--sampler", "euler_a"]
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    subprocess.run([*command, "--seed", "1", "-q"], cwd=folders[0], check=True, capture_output=True)
    chance = random.Random(0)
    for kill in range(1, 4):
        child = subprocess.Popen([*command, "--seed", "1", "-q"], cwd=folders[1], stdout=subprocess.PIPE)
        for _ in range(chance.randrange(50, 300)):
            assert child.stdout.readline()
        time.sleep(chance.random() / 10)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, kill
        child.stdout.close()
    result = subprocess.run([*command, "--seed", "1"], cwd=folders[1], capture_output=True, text=True, check=True)
    assert "of 1000 pictures exist already" in result.stderr
    whole, killed = ({path.name: path.read_bytes() for path in (folder / "outputs").iterdir()} for folder in folders)
    assert len(whole) == 1000
    assert killed == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "remade"),
    [((), 0), (("--prediction", "v"), 2), pytest.param(("--vae", "own"), 2, marks=pytest.mark.slow)],
)
def test_pictures_of_another_prediction_or_vae_are_not_taken_for_finished(run, tiny_ckpt, tmp_path, flags, remade):
    (tmp_path / "lines.txt").write_text("a\nb\n")
    command = ["txt2img", "--from-file", "lines.txt", *SMALL, "-s", "1", "-m", tiny_ckpt, "-o", "out/"]
    assert len(run(*command, "-q")[1]) == 2
    flags = [tiny_ckpt if flag == "own" else flag for flag in flags]
    assert len(run(*command, *flags, "-q")[1]) == remade
