"""The commands as a user meets them: run as processes where streams and signals matter, called directly elsewhere."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import make_checkpoint
import pytest
import torch
import txt2img as original_script
from PIL import Image

import sd
from sd.cli import main
from sd.cli.txt2img import group
from sd.config import SD_V1_INPAINTING
from sd.image import read_settings
from sd.settings import Settings

SMALL = ["-W", "64", "-H", "64", "--steps", "2"]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Call a command in an empty folder: exit code, lines on stdout, text on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return code, streams.out.splitlines(), streams.err

    return run


@pytest.fixture
def txt2img(run, tiny_ckpt):
    return lambda *arguments: run("txt2img", *arguments, "-m", tiny_ckpt, *SMALL)


def refused(result, *parts):
    code, out, err = result
    assert (code, out) == (2, []), err
    assert err.startswith("sd: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3
    for part in parts:
        assert part in err
    return err


def test_a_picture_its_path_and_its_settings(txt2img, tiny_ckpt):
    code, out, err = txt2img("a horse", "--seed", 7, "-n", "blurry")
    assert (code, out) == (0, ["outputs/00001-7.png"])
    assert "tiny.ckpt: sd-v1, model weights (--weights ema takes the others)" in err
    with Image.open(out[0]) as picture:
        assert picture.size == (64, 64)
        assert picture.text["parameters"].startswith("a horse\nNegative prompt: blurry\nSteps: 2, Sampler: DDIM")
    settings = read_settings(out[0])
    assert settings["seed"] == 7
    assert settings["prompt"] == "a horse"
    assert settings["family"] == "sd-v1"
    assert settings["model"]["sha256"] == hashlib.sha256(tiny_ckpt.read_bytes()).hexdigest()


def test_the_picture_is_the_one_that_python_makes(txt2img, tiny_ckpt):
    _, (path,), _ = txt2img("a horse", "--seed", 7)
    (expected,) = sd.load(tiny_ckpt).txt2img("a horse", seed=7, width=64, height=64, steps=2)
    assert Image.open(path).tobytes() == expected.tobytes()


def test_numbering_goes_on_and_nothing_is_overwritten(txt2img):
    assert txt2img("a", "--seed", 7)[1] == ["outputs/00001-7.png"]
    assert txt2img("a", "--seed", 7)[1] == ["outputs/00002-7.png"]
    refused(txt2img("a", "--seed", 7, "-o", "outputs/00002-{seed}.png"), "00002-7.png exists already", "--force")
    assert txt2img("a", "--seed", 7, "-o", "outputs/00002-{seed}.png", "--force")[0] == 0


def test_count_times_batch_size_pictures_with_seeds_that_count_on(txt2img):
    code, out, _ = txt2img("a", "--seed", 7, "--count", 2, "-b", 3, "-o", "x/{seed}.png", "--grid")
    assert code == 0
    assert out == [*(f"x/{seed}.png" for seed in range(7, 13)), "x/grid-7.png"]
    assert Image.open("x/grid-7.png").size == (3 * 64, 2 * 64)
    alone = txt2img("a", "--seed", 10, "-o", "alone.png")[1][0]
    there, here = Image.open("x/10.png").tobytes(), Image.open(alone).tobytes()
    assert max(abs(a - b) for a, b in zip(there, here, strict=True)) <= 1


def test_out_may_be_a_folder_or_a_file(txt2img):
    assert txt2img("a", "--seed", 1, "-o", "folder")[1] == ["folder/00001-1.png"]
    assert txt2img("a", "--seed", 1, "-o", "file.png")[1] == ["file.png"]


def test_json_tells_path_seed_hash_and_time(txt2img):
    _, (line,), _ = txt2img("a", "--seed", 1, "--json")
    event = json.loads(line)
    assert event["event"] == "picture"
    assert event["seed"] == 1
    assert event["ms"] > 0
    with open(event["path"], "rb") as file:
        assert event["sha256"] == hashlib.sha256(file.read()).hexdigest()


def test_a_drawn_seed_is_told_and_stored(txt2img):
    _, (path,), err = txt2img("a")
    assert f"seed {read_settings(path)['seed']}" in err


def test_an_empty_prompt_is_the_unconditional_picture(txt2img):
    code, (path,), _ = txt2img("", "--seed", 1)
    assert code == 0
    assert read_settings(path)["prompt"] == ""


def test_words_that_do_not_fit_are_named(txt2img):
    code, _, err = txt2img("a " * 74 + "horse castle in the sky", "--seed", 1)
    assert code == 0
    assert "the prompt has 79 tokens, 75 fit; cut off: 'castle in the sky'" in err


def test_quiet_says_nothing_but_what_was_cut(txt2img):
    assert txt2img("a", "-q")[2] == ""
    assert "cut off" in txt2img("a " * 76, "-q", "-o", "x.png")[2]


def test_prompts_from_a_file_with_settings_of_their_own(txt2img, tmp_path):
    lines = ['{"prompt": "b", "seed": 40, "guidance-scale": 1}', "", "a horse", '{"prompt": "c", "steps": 1}']
    (tmp_path / "jobs.txt").write_text("\n".join(lines))
    code, out, _ = txt2img("--from-file", "jobs.txt", "--seed", 7, "-o", "x")
    assert code == 0
    settings = [read_settings(path) for path in out]
    assert [s["prompt"] for s in settings] == ["b", "a horse", "c"]
    assert [s["seed"] for s in settings] == [40, 8, 9]
    assert [s["guidance_scale"] for s in settings] == [1, 7.5, 7.5]
    assert [s["steps"] for s in settings] == [2, 2, 1]


def test_pictures_are_grouped_by_what_they_share():
    jobs = [Settings(prompt="", width=64, height=64, seed=s, steps=n) for s, n in enumerate([1, 1, 1, 2, 2, 1])]
    assert [[job.seed for job in batch] for batch in group(jobs, 2)] == [[0, 1], [2], [3, 4], [5]]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"prompt": "a", "stepps": 3}', ["jobs.txt, line 1: 'stepps' does not exist. Did you mean steps?"]),
        ('{"prompt": "a", "steps": "many"}', ['line 1: steps cannot be "many"']),
        ('{"steps": 3}', ['line 1 has no "prompt"']),
        ('{"prompt": ', ["line 1 is no JSON object"]),
        ("\n \n", ["holds no prompts"]),
    ],
)
def test_lines_that_make_no_sense_are_refused(txt2img, tmp_path, line, parts):
    (tmp_path / "jobs.txt").write_text(line)
    refused(txt2img("--from-file", "jobs.txt"), *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["a", "-W", "500"], ["--width 500 is not a multiple of 8. Nearest: 496 or 504."]),
        (["a", "--height", "0"], ["--height 0 is out of range: 64 to 4096."]),
        (["a", "--sampler", "dimm"], ["--sampler dimm does not exist. Did you mean ddim? There are: ddim, ddpm."]),
        (["a", "--schedule", "karas"], ["--schedule karas does not exist. There are: leading, linspace, trailing."]),
        (["a", "--steps", "0"], ["--steps 0 is out of range: 1 to 1000."]),
        (["a", "--steps", "many"], ["argument --steps/--ddim_steps: invalid int value: 'many'", "sd txt2img --help"]),
        (["a", "--stepps", "3"], ["--stepps is not a flag of sd txt2img. Did you mean --steps?"]),
        (["a", "--step", "3"], ["--step is not a flag", "Did you mean --steps?"]),
        (["a", "--guidance-scale", "nan"], ["--guidance-scale nan is not a finite number."]),
        (["a", "--count", "0"], ["--count 0 is out of range: at least 1."]),
        (["a", "--device", "tpu"], ["--device tpu: device 'tpu' is not available here. There are: auto, cpu"]),
        (["a", "-o", "x.png", "-b", "2"], ["--out x.png names one file, but 2 pictures", "x-{seed}.png"]),
        (["a", "-o", "{sead}.png"], ["{sead} is no field. There are: index, seed"]),
        (["a", "-o", "{seed.png"], ["is no usable template"]),
        (["a", "-o", "{steps}.png", "-b", "2"], ["gives the same name to several pictures"]),
        (["a", "-o", "/dev/null/x.png"], ["nothing can be written to /dev/null", "Give another --out."]),
        (["a", "-p", "b"], ["more than one of PROMPT, --prompt and --from-file given"]),
        ([], ["no prompt given"]),
        (["--from-file", "missing.txt"], ["missing.txt: No such file or directory."]),
    ],
)
def test_bad_use_gets_a_sentence_and_exit_code_2(run, tiny_ckpt, arguments, parts):
    refused(run("txt2img", *arguments, "-m", tiny_ckpt), *parts)


def test_no_model_or_no_command_is_bad_use(run):
    refused(run("txt2img", "a"), "no model given. Give a checkpoint with -m FILE")
    refused(run(), "no command given. There are: txt2img, convert.")
    refused(run("txt2imgg", "a"), "command 'txt2imgg' does not exist. Did you mean txt2img?")


def make_file(path, content):
    path.write_bytes(content)
    return path


def test_files_that_are_no_checkpoint_are_refused(run, tmp_path, tiny_ckpt, tiny_state):
    whole = tiny_ckpt.read_bytes()
    inpainting = make_checkpoint.original_state_dict(make_checkpoint.tiny(SD_V1_INPAINTING))
    make_checkpoint.save_original(tmp_path / "inpainting.ckpt", inpainting)
    torch.save({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.pt")
    cases = [
        (tmp_path / "missing.ckpt", ["missing.ckpt does not exist"]),
        (tmp_path, ["is a folder"]),
        (make_file(tmp_path / "text.ckpt", b"dear diary, "), ["text.ckpt"]),
        (make_file(tmp_path / "empty.ckpt", b""), ["is empty (0 bytes)"]),
        (make_file(tmp_path / "cut.ckpt", whole[: len(whole) // 2]), ["cut.ckpt", "download it again"]),
        (make_file(tmp_path / "lfs.ckpt", b"version https://git-lfs.github.com/spec/v1\n"), ["LFS pointer"]),
        (tmp_path / "inpainting.ckpt", ["sd-v1-inpainting", "takes 9 channels"]),
        (tmp_path / "lora.pt", ["is a LoRA"]),
    ]
    for path, parts in cases:
        refused(run("txt2img", "a", "-m", path), *parts)


def test_convert_command_tells_what_it_did(run, tiny_ckpt):
    code, out, err = run("convert", tiny_ckpt, "x.safetensors")
    assert (code, out) == (0, ["x.safetensors"])
    assert "sd-v1, model weights, 970 tensors" in err
    assert "left aside: the ema weights, which --weights ema takes instead." in err
    refused(run("convert", tiny_ckpt, "x.safetensors"), "x.safetensors exists already", "--force")
    refused(run("convert", tiny_ckpt, "x.pt"), "x.pt must end in .safetensors or .ckpt.")
    refused(run("convert", "x.ckpt", "y.safetensors"), "x.ckpt does not exist")


def process(*arguments, **options):
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def test_help_and_version_need_no_torch(tmp_path):
    for arguments in (["--help"], ["txt2img", "--help"], ["convert", "--help"], ["--version"]):
        code = f"import sys; from sd.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
        code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout


def test_help_lists_every_command():
    result = process("sd", "--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("txt2img", "convert"))


def test_convert_is_a_module_of_its_own():
    assert process("convert", "--help").stdout == process("sd", "convert", "--help").stdout


def test_stdout_of_a_process_carries_results_only(tmp_path, tiny_ckpt):
    result = process("sd", "txt2img", "a horse", "-m", tiny_ckpt, *SMALL, "--seed", 1, "--out", "x.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "x.png\n"
    assert "\r" not in result.stderr  # no progress bar where nobody watches


def test_a_closed_pipe_ends_quietly(tmp_path, tiny_ckpt):
    arguments = [sys.executable, "-m", "sd", "txt2img", "a", "-m", str(tiny_ckpt), *SMALL, "--count", "3"]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    child.stdout.readline()
    child.stdout.close()
    assert "Error" not in child.stderr.read()
    child.stderr.close()
    assert child.wait(timeout=60) == 0


def test_an_interrupt_keeps_what_is_finished(tmp_path, tiny_ckpt):
    arguments = [sys.executable, "-m", "sd", "txt2img", "a", "-m", str(tiny_ckpt), *SMALL, "--count", "1000"]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    first = child.stdout.readline().strip()
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted; what was finished is kept" in err
    assert "Traceback" not in err
    assert Image.open(tmp_path / first).size == (64, 64)
    assert not [name for name in os.listdir(tmp_path / "outputs") if name.endswith(".tmp")]


def test_a_fault_of_ours_is_called_one(run, tiny_ckpt, monkeypatch):
    monkeypatch.setattr("sd.pipeline.StableDiffusion.decode", lambda *_: 1 / 0)
    code, _, err = run("txt2img", "a", "-m", tiny_ckpt, *SMALL)
    assert code == 70
    assert "a fault of ours: ZeroDivisionError" in err
    assert "--debug" in err
    with pytest.raises(ZeroDivisionError):
        main(["txt2img", "a", "-m", str(tiny_ckpt), *SMALL, "--debug"])


def test_a_picture_that_is_not_finite_is_no_fault_of_the_program(run, tiny_ckpt, monkeypatch):
    monkeypatch.setattr("sd.vae.VAE.decode", lambda self, latents: latents.new_full((1, 3, 64, 64), torch.nan))
    code, out, err = run("txt2img", "a", "-m", tiny_ckpt, *SMALL)
    assert (code, out) == (3, [])
    assert "sd: the VAE gave NaN or infinite values in fp32" in err
    assert os.listdir("outputs") == []


def test_the_original_scripts_command_line_does_the_same(run, tiny_ckpt):
    arguments = ["--prompt", "a horse", "--ckpt", str(tiny_ckpt), "--ddim_steps", "2", "--H", "64", "--W", "64"]
    code, out, _ = run(*original_script.translated([*arguments, "--n_samples", "2", "--n_iter", "1"]))
    assert code == 0
    samples = "outputs/txt2img-samples/samples"
    assert out == [f"{samples}/00001.png", f"{samples}/00002.png", f"{samples}/grid-00001.png"]
    assert [read_settings(path)["seed"] for path in out[:2]] == [42, 43]
    assert read_settings(out[0])["guidance_scale"] == 7.5


def test_the_original_scripts_other_sampler_is_not_replaced_in_silence(run, tiny_ckpt):
    translated = original_script.translated(["--ckpt", str(tiny_ckpt), "--plms"])
    refused(run(*translated), "--sampler plms does not exist")
