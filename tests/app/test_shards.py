"""Runs in shards: what is in them, that they are whole or absent, and the same however they are made."""

import json
import os
import sys
from hashlib import sha256
from io import BytesIO
from itertools import product
from pathlib import Path
from shutil import copytree

import pytest
from conftest import refused, rest_slow
from PIL import Image, ImageChops
from shards import SMALL, bytes_of, picture_in, prompts_file, rows_of, samples_of

from sd.app.cli import main, txt2img
from sd.app.cli.shard_flags import shard_request_of
from sd.app.errors import UsageError
from sd.app.shards import run as shards_run
from sd.app.shards.maker import Maker
from sd.app.shards.part import part_of
from sd.app.shards.store import Folder
from sd.pipeline.stable_diffusion import StableDiffusion


@pytest.fixture
def make(run, tmp_path, tiny_ckpt):
    """Make shards of two of five prompts: exit code, paths, messages."""
    prompts_file(tmp_path / "p.txt", 5)

    def make(out, *flags, size=2, file="p.txt", seed=(("-s", 3))):
        return run(
            "txt2img", "--from-file", file, "-m", tiny_ckpt, *SMALL, *seed, "-o", out, "--shard-size", size, *flags
        )

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_ckpt):
    """The folder of a run that is complete, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    file, out = prompts_file(folder / "p.txt", 5), str(folder / "out")
    flags = ["-m", tiny_ckpt, *SMALL, "-s", 3, "-o", out, "--shard-size", 2]
    assert main(["txt2img", "--from-file", str(file), *map(str, flags)]) == 0
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it, in the folder out."""
    return Path(copytree(finished, tmp_path / "out"))


@pytest.mark.parametrize("flags", rest_slow([((),), (("--count", 2),), (("-b", 2),)]))
def test_samples_are_the_pictures_of_a_plain_run(run, make, tmp_path, tiny_ckpt, flags):
    plain = ("txt2img", "--from-file", "p.txt", "-m", tiny_ckpt, *SMALL, "-s", 3)
    _, pictures, _ = run(*plain, *flags, "-o", "plain/")
    code, tars, _ = make("out", *flags)
    assert (code, tars) == (0, ["out/00000.tar", "out/00001.tar", "out/00002.tar"])
    samples = samples_of(*(tmp_path / tar for tar in tars))
    keys = [f"{i:09}" for i in range(len(pictures))]
    assert sorted(samples) == sorted(f"{key}.{ending}" for key, ending in product(keys, ("json", "png", "txt")))
    if flags != ("-b", 2):  # there, other batches may round differently
        assert [samples[f"{key}.png"] for key in keys] == [(tmp_path / path).read_bytes() for path in pictures]
    rows = rows_of(*sorted((tmp_path / "out").glob("*.jsonl")))
    for row, key in zip(rows, keys, strict=True):
        about = json.loads(samples[f"{key}.json"])
        assert (row["key"], row["prompt"], row["seed"]) == (key, samples[f"{key}.txt"].decode(), 3 + int(key))
        assert json.loads(row["settings"]) == about["settings"] == json.loads(picture_text(samples[f"{key}.png"]))
        assert (row["bytes"], row["sha256"]) == (len(samples[f"{key}.png"]), about["sha256"])


def picture_text(data):
    return Image.open(BytesIO(data)).text["sd"]


@pytest.mark.slow
@pytest.mark.parametrize("parts", rest_slow([3, 2, 5]))
def test_parts_make_the_same_bytes_as_one_process(make, finished, tmp_path, parts):
    for i in range(1, parts + 1):
        code, tars, _ = make("parts", "--shards", f"{i}/{parts}")
        assert (code, len(tars)) == (0, len(range(i - 1, 3, parts)))
    assert bytes_of(tmp_path / "parts") == bytes_of(finished)


@pytest.mark.parametrize("gone", rest_slow(["00001_stats.json", "00001.tar", "00001.jsonl"]))
def test_a_rerun_makes_only_what_is_missing(make, out, gone):
    assert make("out") == (0, [], "")
    before, contents = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}, bytes_of(out)
    (out / gone).unlink()
    assert make("out")[:2] == (0, ["out/00001.tar"])
    assert bytes_of(out) == contents
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"00001_stats.json", "00001.tar", "00001.jsonl"}


@pytest.mark.parametrize("moment", rest_slow([3, 1, 2, 4]))
def test_a_shard_that_is_interrupted_is_absent(make, run, tmp_path, monkeypatch, moment):
    """While pictures come, and before each of the three files gets its name."""
    if moment == 1:
        monkeypatch.setattr("sd.app.shards.writing.Tar.add", interrupted)
    else:
        real, calls = os.fsync, []

        def fsync(descriptor):
            calls.append(descriptor)
            if len(calls) == moment:  # the first is that of shards.json
                raise KeyboardInterrupt
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
    assert make("out")[0] == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"shards.json", *["00000.tar", "00000.jsonl"][: max(0, moment - 2)]}
    assert run("shards", "verify", "out")[0] == 1
    assert make("out")[:2] == (0, ["out/00000.tar", "out/00001.tar", "out/00002.tar"])
    assert run("shards", "verify", "out")[:2] == (0, ["3 shards right, with 5 pictures"])


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--steps", 2), "settings.steps 1, here 2"),
        (("-s", 4), "settings.seed 3, here 4"),
        (("-n", "x"), "settings.negative_prompt , here x"),
        (("-b", 2), "batch_size 1, here 2"),
        (("--count", 2), "count 1, here 2"),
        (("--shard-size", 3), "shards 3, here 2"),
        (("--shard-picture", "webp"), "picture png, here webp"),
        (("--lora", "x"), "settings.lora not given, here ['x']"),
        (("--precision", "bf16"), "precision float32, here bfloat16"),
        (("--weights", "ema"), "model.weights auto, here ema"),
        (("--from-file", "q.txt"), "prompts.file p.txt, here q.txt"),
        (("--from-file", "q/p.txt"), "other prompts"),
        (("--from-file", "r/p.txt", "--choices", "random"), "other prompts"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(make, out, tmp_path, flags, said):
    prompts_file(tmp_path / "q.txt", 5)
    for name, text in (("q", "a"), ("r", "{a|b}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.txt").write_text(f"{text}\n" * 5)
    (out / "00000_stats.json").unlink()
    before = bytes_of(out)
    error = refused(make("out", *flags), f"out has shards of another run: {said}", "Give another --out")
    assert len(error.splitlines()) == 1
    assert bytes_of(out) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--grid",), "--grid does nothing with shards"),
        (("--save-steps",), "--save-steps does nothing with shards"),
        (("--force",), "--force does nothing with shards"),
        (("-o", "a.png"), "shards need a folder of their own: give -o FOLDER, and not a.png."),
        (("-o", "a-{seed}"), "give -o FOLDER, and not a-{seed}."),
        (("--prompt", "x"), "give --from-file FILE, and no other prompt."),
        (("--from-file", "-"), "--from-file - is not a file."),
        (("--from-file", "empty.txt"), "--from-file empty.txt has no prompts."),
        (("--from-file", "bad.txt"), "bad.txt, line 3: 'stepps' does not exist. Did you mean steps?"),
        (("--from-file", "wide.txt"), "wide.txt, line 5: width 100 is not a multiple of 8."),
        (("--shards", "0/3"), "--shards 0/3 is out of range: parts count from 1/3 to 3/3."),
        (("--shards", "three"), "--shards three is not a part of the shards."),
        (("--shard-size", "0"), "--shard-size 0 is out of range: at least 1"),
        (("--workers", 2), "--workers does nothing without --engine ray."),
        (("--address", "auto"), "--address does nothing without --engine ray."),
        (("--engine", "ray", "--cpus-per-worker", 0), "--cpus-per-worker 0 is out of range: 0.01 to 1024."),
        (("--engine", "ray"), "--engine ray needs the package ray: pip install ray."),
        (("-o", "nothere://x/y"), "--out nothere://x/y cannot be used: Protocol not known: nothere"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused_before_any_work(make, tmp_path, monkeypatch, flags, said):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.txt").write_text('a\nb\n{"prompt": "c", "stepps": 3}\n')
    (tmp_path / "wide.txt").write_text('a\nb\nc\nd\n{"prompt": "e", "width": 100}\n')
    refused(make("out", *flags), said)
    assert not (tmp_path / "out").exists()


def test_without_a_seed_it_follows_from_the_file(call, tmp_path):
    def seed_of(file):
        args = txt2img.parser().parse_args(["--from-file", str(file), "-o", "out", "--shard-size", "2", "-q"])
        args.parser, args.like = txt2img.parser(), None
        return shard_request_of(args, "text to picture").job.settings["seed"]

    one, other, third = (prompts_file(tmp_path / f"{number}{i}.txt", number) for i, number in enumerate((5, 5, 6)))
    assert seed_of(one) == seed_of(other) == int(sha256(one.read_bytes()).hexdigest()[:8], 16) != seed_of(third)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda out: (out / "00001_stats.json").unlink(), "missing  00001"),
        (lambda out: (out / "00001.tar").unlink(), "damaged  00001: 00001.tar is missing"),
        (lambda out: (out / "00001.jsonl").unlink(), "damaged  00001: 00001.jsonl is missing"),
        (lambda out: flip(out / "00001.tar"), "damaged  00001: 00001.tar is not what was written"),
        (lambda out: flip(out / "00001.jsonl"), "damaged  00001: 00001.jsonl is not what was written"),
        (lambda out: (out / "00001_stats.json").write_text("{"), "damaged  00001: 00001_stats.json cannot be read"),
        (lambda out: (out / "00001_stats.json").write_text("[]"), "damaged  00001: 00001_stats.json cannot be read"),
        (lambda out: (out / "00003.tar").write_bytes(b""), "damaged  00003: 00003.tar is not part of this run"),
        (lambda out: copy(out, "00000", "00001"), "damaged  00001: 00001.tar: 2 samples are missing, 2 do not belong"),
    ],
)
def test_verify_finds_what_is_missing_or_damaged(run, out, harm, said):
    assert run("shards", "verify", "out") == (0, ["3 shards right, with 5 pictures"], "")
    harm(out)
    code, lines, _ = run("shards", "verify", "out")
    assert code == 1
    assert lines[0].startswith(said)
    code, lines, _ = run("shards", "verify", "out", "--json")
    assert {json.loads(line)["state"] for line in lines} == {"right", said.split()[0]}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def copy(out, one, other):
    """Put the samples of one shard into another, with stats that fit."""
    for ending in (".tar", ".jsonl"):
        (out / f"{other}{ending}").write_bytes((out / f"{one}{ending}").read_bytes())
    stats = (out / f"{one}_stats.json").read_text()
    (out / f"{other}_stats.json").write_text(stats.replace(f"{one}.", f"{other}."))


@pytest.mark.parametrize(("given", "said"), [(".", "there is no run in shards"), ("damaged", "or a damaged one")])
def test_verify_needs_a_run(run, tmp_path, given, said):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "shards.json").write_text('{"format": 7}')
    refused(run("shards", "verify", given), said)


def test_a_picture_that_cannot_be_is_named_and_the_rest_are_there(make, run, monkeypatch):
    real = StableDiffusion.make

    def make_but(model, batch, *others, **options):
        if batch[0].prompt == "a hat 2":
            error = ArithmeticError("the UNet gives NaN")
            error.part = "unet"
            raise error
        return real(model, batch, *others, **options)

    monkeypatch.setattr(StableDiffusion, "make", make_but)
    code, tars, said = make("out")
    assert (code, len(tars)) == (3, 3)
    assert "1 picture could not be made. The stats of the shards name them." in said
    code, out, _ = run("shards", "verify", "out")
    assert (code, out[-1]) == (0, "3 shards right, with 4 pictures")
    assert out[0].startswith("right    00001: could not make 000000002: the UNet gives NaN")


@pytest.mark.slow
def test_without_memory_there_is_no_shard_and_the_others_are_made(make, run, monkeypatch):
    real = StableDiffusion.make

    def make_but(model, batch, *others, **options):
        if batch[0].prompt == "a hat 2":
            raise MemoryError
        return real(model, batch, *others, **options)

    monkeypatch.setattr(StableDiffusion, "make", make_but)
    code, tars, said = make("out")
    assert (code, tars) == (3, ["out/00000.tar", "out/00002.tar"])
    assert "shard 00001 is left out" in said
    monkeypatch.setattr(StableDiffusion, "make", real)
    assert make("out")[:2] == (0, ["out/00001.tar"])


@pytest.mark.slow
def test_webp_has_the_same_pixels(make, finished, tmp_path):
    make("webp", "--shard-picture", "webp")
    png, webp = (samples_of(*sorted(out.glob("*.tar"))) for out in (finished, tmp_path / "webp"))
    for key in (f"{i:09}" for i in range(5)):
        assert ImageChops.difference(picture_in(png[f"{key}.png"]), picture_in(webp[f"{key}.webp"])).getbbox() is None


def test_parquet_has_the_rows_of_jsonl(make, finished, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    make("parquet", "--shard-table", "parquet")
    for number in range(3):
        rows = parquet.read_table(tmp_path / "parquet" / f"{number:05}.parquet").to_pylist()
        assert rows == rows_of(finished / f"{number:05}.jsonl")


def test_parquet_without_its_package_says_what_to_install(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(make("out", "--shard-table", "parquet"), "pip install pyarrow", "tables are .jsonl")


@pytest.mark.slow
def test_a_url_holds_the_same_bytes(make, run, finished, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://{tmp_path.name}/run"
    assert make(url)[:2] == (0, [f"{url}/0000{i}.tar" for i in range(3)])
    system = fsspec.filesystem("memory")
    there = {
        path.rpartition("/")[2]: system.cat_file(path) for path in system.ls(f"/{tmp_path.name}/run", detail=False)
    }
    assert {name: data for name, data in there.items() if "_stats" not in name} == bytes_of(finished)
    assert make(url) == (0, [], "")
    assert run("shards", "verify", url)[:2] == (0, ["3 shards right, with 5 pictures"])
    refused(make(url, "-n", "x"), f"{url}/ has shards of another run")


def test_a_shard_that_another_process_makes_is_waited_for(make, finished, tmp_path, monkeypatch):
    """It is not made twice; if the other process ends without it, it is made here."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(shards_run, "WAIT", 0.01)
    other, naps = Folder(tmp_path / "out").held("00001"), []

    def nap(seconds):
        naps.append({path.name for path in (tmp_path / "out").glob("*.tar")})
        if len(naps) == 3:
            other.__exit__(None, None, None)

    monkeypatch.setattr(shards_run.time, "sleep", nap)
    assert other.__enter__()
    assert make("out")[:2] == (0, ["out/00000.tar", "out/00002.tar", "out/00001.tar"])
    assert naps == [{"00000.tar", "00002.tar"}] * 3
    assert bytes_of(tmp_path / "out") == bytes_of(finished)


@pytest.mark.slow
def test_the_model_is_loaded_once_and_only_if_something_is_missing(make, monkeypatch):
    loaded, real = [], Maker.load
    monkeypatch.setattr(Maker, "load", lambda maker: loaded.append(maker.model is None) or real(maker))
    make("out")
    assert loaded.count(True) == 1
    loaded.clear()
    make("out")
    assert loaded == []


@pytest.mark.parametrize(
    ("text", "environment", "part"),
    [
        ("1/8", {}, (1, 8)),
        ("8/8", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, (8, 8)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, (4, 4)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0",
                  "SLURM_ARRAY_TASK_MAX": "3"}, (1, 4)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "4",
                  "SLURM_ARRAY_TASK_MAX": "8", "SLURM_ARRAY_TASK_STEP": "2"}, (3, 3)),
        ("auto", {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (4, 4)),
        ("auto/8", {"JOB_COMPLETION_INDEX": "0"}, (1, 8)),
        ("auto", {"JOB_COMPLETION_INDEX": "7", "JOB_COMPLETIONS": "8"}, (8, 8)),
        ("auto", {"AWS_BATCH_JOB_ARRAY_INDEX": "2", "AWS_BATCH_JOB_ARRAY_SIZE": "3"}, (3, 3)),
        ("auto", {"CLOUD_RUN_TASK_INDEX": "0", "CLOUD_RUN_TASK_COUNT": "1"}, (1, 1)),
        ("auto", {"RANK": "1", "WORLD_SIZE": "2"}, (2, 2)),
        ("auto", {}, "the environment has none of SLURM_ARRAY_TASK_ID, "),
        ("auto", {"JOB_COMPLETION_INDEX": "7"}, "Give --shards auto/N, or set JOB_COMPLETIONS."),
        ("auto/4", {"JOB_COMPLETION_INDEX": "7"}, "--shards 8/4 is out of range: parts count from 1/4 to 4/4."),
        ("auto", {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1",
                  "SLURM_ARRAY_TASK_MAX": "10"}, "not 3 in a row. Give sbatch --array=1-3"),
        *((text, {}, "is not a part of the shards") for text in ("", "1", "a/b", "1/2/3", "-1/3", "1.5/2")),
        ("3/0", {}, "out of range"),
    ],
)  # fmt: skip
def test_the_part_is_given_or_said_by_the_scheduler(text, environment, part):
    if isinstance(part, tuple):
        assert part_of(text, environment) == part
        return
    with pytest.raises(UsageError) as refusal:
        part_of(text, environment)
    assert part in str(refusal.value)
