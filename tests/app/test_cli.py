"""The commands as a user meets them: run as processes where streams and signals matter, called directly elsewhere."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_checkpoint
import pytest
import torch
import txt2img as original_script
from conftest import refused, rest_slow, settings_of
from PIL import Image

import sd
from sd.__main__ import main as start
from sd.app.cli import COMMANDS
from sd.app.cli import txt2img as txt2img_command
from sd.app.cli.make_pictures import request_of
from sd.app.jobs.plan import group, plan, with_seeds
from sd.config import SD_V1_INPAINTING
from sd.pipeline.settings import Settings
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.sampling.denoiser import Denoiser

SMALL = ["-W", "64", "-H", "64", "--steps", "2"]


@pytest.fixture
def txt2img(run, tiny_ckpt):
    return lambda *arguments: run("txt2img", *arguments, "-m", tiny_ckpt, *SMALL)


def test_the_picture_is_the_one_of_python_and_carries_its_settings(txt2img, tiny_ckpt):
    code, out, err = txt2img("a horse", "--seed", 7, "-n", "blurry")
    assert (code, out) == (0, ["outputs/00001-7.png"])
    assert "tiny.ckpt: sd-v1, model weights (--weights ema takes the others)" in err
    with Image.open(out[0]) as picture:
        assert picture.size == (64, 64)
        assert picture.text["parameters"].startswith(
            "a horse\nNegative prompt: blurry\nSteps: 2, Sampler: DPM++ 2M, Schedule type: Karras"
        )
    settings = settings_of(out[0])
    assert settings["seed"] == 7
    assert settings["prompt"] == "a horse"
    assert settings["family"] == "sd-v1"
    assert settings["model"]["sha256"] == hashlib.sha256(tiny_ckpt.read_bytes()).hexdigest()
    options = {"negative_prompt": "blurry", "seed": 7, "width": 64, "height": 64, "steps": 2}
    (expected,) = sd.load(tiny_ckpt).txt2img("a horse", **options)
    assert Image.open(out[0]).tobytes() == expected.tobytes()


def test_the_checkpoint_is_hashed_behind_the_first_step(txt2img, tiny_ckpt, monkeypatch):
    happened, predict = [], Denoiser.__call__
    monkeypatch.setattr(Denoiser, "__call__", lambda *given: happened.append("step") or predict(*given))
    monkeypatch.setattr("convert.files.hashing.compute_aside", happened.append)
    assert txt2img("a horse", "--sampler", "ddim", "--count", 2)[0] == 0
    assert len(happened) == 5
    assert happened[0] == "step"
    assert happened[1]() == hashlib.sha256(tiny_ckpt.read_bytes()).hexdigest()


@pytest.mark.slow
def test_numbering_goes_on_and_nothing_is_overwritten(txt2img):
    assert txt2img("a", "--seed", 7)[1] == ["outputs/00001-7.png"]
    assert txt2img("a", "--seed", 7)[1] == ["outputs/00002-7.png"]
    refused(txt2img("a", "--seed", 7, "-o", "outputs/00002-{seed}.png"), "00002-7.png exists already", "--force")
    assert txt2img("a", "--seed", 7, "-o", "outputs/00002-{seed}.png", "--force")[0] == 0


def test_count_pictures_with_seeds_that_count_on_whatever_the_batch_size(txt2img):
    code, out, _ = txt2img("a", "--seed", 7, "--count", 6, "-b", 4, "-o", "x/{seed}.png", "--grid")
    assert code == 0
    assert out == [*(f"x/{seed}.png" for seed in range(7, 13)), "x/grid-7.png"]
    width, height = Image.open("x/grid-7.png").size
    assert width == 3 * 64
    assert 2 * 70 < height < 2 * 90  # with a label under each picture
    alone = txt2img("a", "--seed", 10, "-o", "alone.png")[1][0]
    there, here = Image.open("x/10.png").tobytes(), Image.open(alone).tobytes()
    assert max(abs(a - b) for a, b in zip(there, here, strict=True)) <= 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", 1),
        ("-b 3", 3),
        ("--n_samples 3", 3),
        ("--count 4 -b 3", 4),
        ("--n_iter 2 -b 3", 6),
        ("--n_iter 2 --n_samples 3", 6),
        ("--n_iter 2", 2),
        ("--from-file two.txt --count 3 -b 2", 6),
        ("--from-file two.txt --n_iter 2 -b 3", 4),
        ("--from-file two.txt -b 3", 2),
    ],
)
def test_count_is_the_number_of_pictures_and_n_iter_that_of_batches(tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("a\nb\n")
    words = [*flags.split(), *([] if "--from-file" in flags else ["a"])]
    args = txt2img_command.parser().parse_args(words)
    args.parser, args.given = txt2img_command.parser(), words
    request = request_of(args, "text to picture")
    assert len(plan(with_seeds(request), native=64)) == expected


DRAWN = [["--seed", -1, "--vary", "0.1", "--vary-seed", -1], ["--seed", "-1"], ["-s=-1"]]


@pytest.mark.parametrize("flags", rest_slow(DRAWN))
def test_a_seed_of_minus_one_is_drawn(txt2img, flags, tmp_path):
    code, (path,), err = txt2img("a", *flags)
    assert code == 0
    assert settings_of(path)["seed"] >= 0
    assert f"seed {settings_of(path)['seed']}" in err
    (tmp_path / "jobs.txt").write_text('{"prompt": "a", "seed": -1}\n{"prompt": "b", "seed": -1}')
    _, out, _ = txt2img("--from-file", "jobs.txt", *flags, "-o", "two/")
    first, second = (settings_of(path) for path in out)
    assert (first["seed"], first["vary_seed"]) != (second["seed"], second["vary_seed"])


def test_json_has_path_seed_hash_and_time_and_a_drawn_seed_is_reported_and_stored(txt2img):
    _, (line,), err = txt2img("a", "--json", "-o", "folder")
    event = json.loads(line)
    seed = settings_of(event["path"])["seed"]
    assert f"seed {seed}" in err
    assert (event["event"], event["path"], event["seed"]) == ("picture", f"folder/00001-{seed}.png", seed)
    assert event["ms"] > 0
    facts = {name: event[name] for name in ("prompt", "width", "height", "steps", "model")}
    assert facts == {"prompt": "a", "width": 64, "height": 64, "steps": 2, "model": "tiny"}
    assert event["sha256"] == hashlib.sha256(Path(event["path"]).read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_prompt_may_be_a_files_whole_text_or_empty(txt2img, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf\n  a (red:1.2) horse,\r\nat dusk \n")
    code, (path,), err = txt2img("--prompt-file", "prompt.txt", "--seed", 1, "-n", "b " * 200, "-q")
    assert (code, err) == (0, "")
    assert settings_of(path)["prompt"] == "a (red:1.2) horse,\r\nat dusk"
    _, (path,), err = txt2img("", "-n", "blurry", "-g", 1, "--seed", 1, "-o", "file.png")
    assert (path, settings_of(path)["prompt"]) == ("file.png", "")
    assert "--guidance-scale 1 turns guidance off, and the negative prompt with it" in err
    _, _, err = txt2img("a", "--seed", 1, "--sampler", "plms", "--schedule", "karras")
    assert "sd: --sampler plms assumes evenly spaced timesteps; with karras its order falls to 1 (lms" in err
    _, _, err = txt2img("a", "--seed", 1, "--sampler", "lcm", "-q")
    assert err == "sd: --sampler lcm is for networks distilled for it; others give blurred or empty pictures.\n"


@pytest.mark.slow
def test_lines_of_a_file_have_settings_of_their_own_by_any_spelling(txt2img, tmp_path):
    lines = [
        '{"prompt": "b\u2028c", "seed": 40, "guidance-scale": 1, "H": 72, "ddim_steps": 1}\r',
        "",
        "a\x0cd",
        '{"prompt": "(a:1.5)", "plain-prompts": true, "sampler": "DPM++ 2M SDE Karras", "cfg-scale": 2}',
        '{"prompt": "a", "sampler": "k_lms", "schedule": "SGM Uniform"}',
        '{"prompt": "a", "sigmas": [9, 2.5]}',
    ]
    (tmp_path / "jobs.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    code, out, _ = txt2img("--from-file", "jobs.txt", "--seed", 7, "-o", "x", "--steps", 2)
    names = ("prompt", "seed", "guidance_scale", "height", "steps", "plain_prompts", "sampler", "schedule", "sigmas")
    assert code == 0
    assert [tuple(settings_of(path)[name] for name in names) for path in out] == [
        ("b\u2028c", 40, 1, 72, 1, False, "dpmpp_2m", "karras", []),
        ("a\x0cd", 8, 7.5, 64, 2, False, "dpmpp_2m", "karras", []),
        ("(a:1.5)", 9, 2, 64, 2, True, "dpmpp_2m_sde", "karras", []),
        ("a", 10, 7.5, 64, 2, False, "lms", "sgm_uniform", []),
        ("a", 11, 7.5, 64, 2, False, "dpmpp_2m", "custom", [9, 2.5]),
    ]


def test_pictures_are_grouped_by_what_they_share_wherever_they_stand():
    jobs = [Settings(prompt="", width=64, height=64, seed=s, steps=n) for s, n in enumerate([1, 2, 1, 1, 2, 1, 3])]
    assert group(jobs, 2, lambda _: 1) == [[0, 2], [1, 4], [3, 5], [6]]
    assert group(jobs, 9, lambda job: job.seed % 2) == [[0, 2], [1], [3, 5], [4], [6]]
    assert group(jobs, 1, lambda _: 1) == [[i] for i in range(7)]


@pytest.mark.slow
def test_lines_of_one_size_are_made_together_and_named_and_shown_in_their_order(txt2img, tmp_path, monkeypatch):
    sizes = [64, 72, 64, 72, 64]
    (tmp_path / "jobs.txt").write_text(
        "\n".join(f'{{"prompt": "{i}", "width": {w}}}' for i, w in enumerate(sizes)) + "\n5 BREAK b\n6"
    )
    batches, make = [], StableDiffusion.make

    def watched(model, batch, *others, **options):
        batches.append([job.prompt for job in batch])
        return make(model, batch, *others, **options)

    monkeypatch.setattr(StableDiffusion, "make", watched)
    code, out, _ = txt2img("--from-file", "jobs.txt", "--seed", 7, "-b", 2, "--grid", "-o", "x/{index}.png")
    assert code == 0
    assert batches == [["0", "2"], ["1", "3"], ["4", "6"], ["5 BREAK b"]]  # prompts of one length only
    assert out == [*(f"x/{i}.png" for i in (1, 3, 2, 4, 5, 7, 6)), "x/grid-1.png"]
    stored = [settings_of(f"x/{i}.png") for i in range(1, 8)]
    assert [(each["prompt"][0], each["seed"]) for each in stored] == [(str(i), 7 + i) for i in range(7)]
    with Image.open("x/grid-1.png") as sheet, Image.open("x/3.png") as third:
        assert sheet.crop((144, 0, 208, 64)).tobytes() == third.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"prompt": "a", "stepps": 3}', ["jobs.txt, line 1: 'stepps' does not exist. Did you mean steps?"]),
        ('{"prompt": "a", "steps": "many"}', ['line 1: steps cannot be "many"']),
        ('{"steps": 3}', ['line 1: no "prompt" given']),
        ('{"prompt": ', ["line 1: not a JSON object"]),
        ("\n \n", ["has no prompts"]),
        ('a\n{"prompt": "a", "width": 500}', ["jobs.txt, line 2: width 500 is not a multiple of 8"]),
        ('{"prompt": "a", "scale": 3, "cfg-scale": 4}', ["'cfg-scale' sets guidance_scale for the second time"]),
        ('{"prompt": "a", "count": 3}', ["line 1: count is the same for all lines. Give --count to the command."]),
        ("a\ncaf\xe9\n", ["jobs.txt, line 2: not UTF-8 text. Save the file as UTF-8."]),
    ],
)
def test_lines_that_make_no_sense_are_refused(txt2img, tmp_path, line, parts):
    (tmp_path / "jobs.txt").write_text(line, encoding="latin-1")
    refused(txt2img("--from-file", "jobs.txt"), *parts)


def test_lines_of_standard_input_are_called_so(txt2img, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'a\n{"prompt": "a", "stepps": 3}\n')))
    refused(txt2img("--from-file", "-"), "standard input, line 2: 'stepps' does not exist. Did you mean steps?")


def test_a_model_for_another_task_is_refused(run, tmp_path):
    inpainting = make_checkpoint.made_up_state_dict(make_checkpoint.tiny(SD_V1_INPAINTING))
    make_checkpoint.save_original(tmp_path / "inpainting.ckpt", inpainting)
    refused(run("txt2img", "a", "-m", "inpainting.ckpt"), "sd-v1-inpainting", "takes 9 channels")


def test_convert_command_tells_what_it_did(run, tiny_ckpt):
    code, out, err = run("convert", tiny_ckpt, "x.safetensors")
    assert (code, out) == (0, ["x.safetensors"])
    assert "tiny.ckpt: sd-v1, model weights (--weights ema takes the others), 970 tensors" in err


def test_help_and_version_need_no_torch(call, monkeypatch):
    pages = [["--help"], *([name, "--help"] for name in COMMANDS), ["--version"]]
    code = f"import sys; from sd.app.cli import main\nassert not any(map(main, {pages}))\n"
    code += "assert not {'torch', 'numpy', 'PIL', 'tqdm'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(f"usage: sd {name}" in result.stdout for name in COMMANDS)
    assert all(re.search(f"^  {name} ", result.stdout, re.M) for name in COMMANDS)
    monkeypatch.chdir(Path(__file__).parents[2])
    command = [sys.executable, "-m", "convert", "--help"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == call("convert", "--help")[1]


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(tmp_path, tiny_ckpt):
    child = started(making(tiny_ckpt, 3), tmp_path, {})
    child.stdout.readline()
    child.stdout.close()
    assert "Error" not in child.stderr.read()
    child.stderr.close()
    assert child.wait(timeout=60) == 0


def making(checkpoint, count):
    """A command line that makes so many pictures."""
    return [sys.executable, "-m", "sd", "txt2img", "a", "-m", str(checkpoint), *SMALL, "--count", str(count)]


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_finished(tmp_path, tiny_ckpt):
    child = started(
        making(tiny_ckpt, 1000), tmp_path, {signal.SIGINT: signal.SIG_DFL}
    )  # ignored in a shell's background
    first = child.stdout.readline().strip()
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted; finished files are kept" in err
    assert "Traceback" not in err
    assert Image.open(tmp_path / first).size == (64, 64)
    assert not [name for name in os.listdir(tmp_path / "outputs") if name.endswith(".tmp")]


@pytest.mark.slow
def test_a_command_started_by_nohup_outlives_its_terminal(tmp_path, tiny_ckpt):
    child = started(making(tiny_ckpt, 3), tmp_path, {signal.SIGHUP: signal.SIG_IGN})
    child.stdout.readline()
    child.send_signal(signal.SIGHUP)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0
    assert len(os.listdir(tmp_path / "outputs")) == 3
    assert all(line.startswith("outputs/0000") for line in out.splitlines())  # results only
    assert "\r" not in err  # no progress bar where nobody watches


def started(arguments, folder, handlers):
    """A process in a folder, with these handlers of signals."""
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        preexec_fn=lambda: [signal.signal(number, handler) for number, handler in handlers.items()],
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_conversion_leaves_no_half_file(tmp_path, tiny_ckpt, number):
    code = (
        "import sys, time, convert.actions.writing as c\n"
        "write = c.Reporting.report\n"
        "c.Reporting.report = lambda *a: (print(flush=True), time.sleep(0.01), write(*a))\n"
        "import sd.app.cli; sys.exit(sd.app.cli.main(sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", code, "convert", str(tiny_ckpt), "x.safetensors"]
    child = started(arguments, tmp_path, {number: signal.SIG_DFL})
    child.stdout.readline()
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == 130
    assert os.listdir(tmp_path) == []


def shell(command, folder, **environment):
    return subprocess.run(
        ["bash", "-c", command.replace("SD", f"{sys.executable} -m sd")],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.slow
def test_streams_may_be_closed_or_narrow(tmp_path, tiny_ckpt):
    make = f"SD txt2img a -m {tiny_ckpt} -W 64 -H 64 --steps 1 -s 1"
    assert shell("set -o pipefail; SD --help | true", tmp_path).stderr == ""
    assert shell(f"{make} -o closed.png >&- 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "closed.png").exists()
    narrow = shell("SD tokens 猫", tmp_path, PYTHONIOENCODING="ascii")
    assert narrow.returncode == 0, narrow.stderr
    assert "\\u732b" in narrow.stdout
    assert shell("SD txt2img --from-file - -m x.ckpt <&-", tmp_path).returncode == 2


def test_a_name_taken_by_another_run_is_one_failed_picture(run, tiny_ckpt, monkeypatch, tmp_path):
    decode = sd.networks.vae.VAE.decode

    def overtaken(*arguments):
        (tmp_path / "outputs" / "00001-1.png").touch()
        return decode(*arguments)

    monkeypatch.setattr("sd.networks.vae.VAE.decode", overtaken)
    code, out, err = run("txt2img", "a", "-m", tiny_ckpt, *SMALL, "--seed", 1, "--count", 2)
    assert (code, out) == (3, ["outputs/00002-2.png"])
    assert "1 of 2 pictures could not be made" in err


@pytest.mark.slow
def test_an_internal_error_is_called_one(run, tiny_ckpt, monkeypatch):
    monkeypatch.setattr("sd.pipeline.stable_diffusion.StableDiffusion.decode", lambda *_: 1 / 0)
    for flags, traceback in (([], False), (["--debug"], True)):
        code, _, err = run("txt2img", "a", "-m", tiny_ckpt, *SMALL, *flags)
        assert (code, "Traceback" in err) == (70, traceback)
        assert "internal error: ZeroDivisionError" in err
        assert "--debug" in err


def test_pictures_that_cannot_be_made_do_not_stop_the_others(run, tiny_ckpt, monkeypatch):
    def broken(*arguments):
        """NaN in the second picture, too large in the third."""
        nth = next(calls)
        return decode(*arguments) * (torch.nan if nth == 2 else 1) if nth < 3 else torch.empty(2**60, dtype=torch.uint8)

    calls, decode = iter(range(1, 4)), sd.networks.vae.VAE.decode
    monkeypatch.setattr("sd.networks.vae.VAE.decode", broken)
    code, out, err = run("txt2img", "a", "-m", tiny_ckpt, *SMALL, "--seed", 1, "--count", 3, "--precision", "fp32")
    assert (code, out, os.listdir("outputs")) == (3, ["outputs/00001-1.png"], ["00001-1.png"])
    assert "seed 2: the VAE gave NaN or infinite values in fp32, so there is no picture." in err
    assert "seed 3: there is not enough memory. Try a smaller size, a smaller batch, --low-memory or" in err
    assert "sd: 2 of 3 pictures could not be made." in err


@pytest.mark.slow
def test_names_from_a_file_cannot_write_to_the_terminal(run, tmp_path, tiny_state):
    path = tmp_path / "evil\x1b[2J.ckpt"
    make_checkpoint.save_original(path, {**tiny_state, "\x1b]0;pwned\x07\n": torch.zeros(1)})
    code, _, err = run("txt2img", "a", "-m", path, *SMALL, "--seed", 1)
    assert code == 0
    assert "ignored 1 tensor outside the model" in err
    assert "\x1b" not in err
    code, _, err = run("convert", path, "x.safetensors")
    assert code == 0
    assert "\x1b" not in err


def test_the_sheet_and_the_device_are_checked_before_a_folder_is_made(txt2img, tmp_path):
    (tmp_path / "grid-x1.png").write_bytes(b"precious")
    refused(txt2img("a", "--seed", 1, "-o", "x{seed}.png", "--grid"), "grid-x1.png exists already")
    refused(txt2img("a", "--device", "tpu", "-o", "new/"), "--device: device 'tpu' is not available here")
    assert os.listdir(tmp_path) == ["grid-x1.png"]


def test_the_original_scripts_command_line_does_the_same(run, tiny_ckpt):
    arguments = ["--prompt", "a horse", "--ckpt", str(tiny_ckpt), "--ddim_steps", "2", "--H", "64", "--W", "64"]
    code, out, _ = run(*original_script.translated([*arguments, "--n_samples", "2", "--n_iter", "1"]))
    assert code == 0
    samples = "outputs/txt2img-samples/samples"
    assert out == [f"{samples}/00001.png", f"{samples}/00002.png", f"{samples}/grid-00001.png"]
    assert [settings_of(path)["seed"] for path in out[:2]] == [42, 43]
    assert settings_of(out[0])["guidance_scale"] == 7.5
    assert settings_of(out[0])["plain_prompts"] is True  # the original knows no weights
    assert (settings_of(out[0])["sampler"], settings_of(out[0])["schedule"]) == ("ddim", "leading")


@pytest.mark.parametrize(
    ("flag", "expected"), [("--plms", ("plms", None)), ("--dpm_solver", ("dpmpp_2m", "sgm_uniform"))]
)
def test_the_original_scripts_other_samplers_are_there(flag, expected):
    translated = original_script.translated(["--prompt", "a", flag])
    args = txt2img_command.parser().parse_args(translated[1:])
    assert (args.sampler, args.schedule) == expected


def test_the_original_script_refuses_what_cannot_be_translated(capsys):
    for arguments, message in (
        (["--plms", "--ddim_eta", "1"], "--ddim_eta 1 has no effect without DDIM"),
        (["--plms", "--dpm_solver"], "--plms and --dpm_solver are"),
        *(([flag], flag) for flag in original_script.UNSUPPORTED),
    ):
        with pytest.raises(SystemExit) as caught:
            original_script.translated(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_as_the_command_ends_python_does_not_search_for_garbage(monkeypatch, capsys):
    """That took as long as six steps of the embedded model."""
    frozen = []
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(capsys.readouterr().out))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["sd", "schedule", "--steps", "1"])
    assert start() == 0
    assert "999" in frozen[0]
