"""The contenders of the comparison beside the first ones: few steps, 8 bits, stable-diffusion.cpp."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import benchmark
import benchmark_files
import benchmark_sd_cpp
import make_checkpoint
import numpy as np
import pytest
import torch
from benchmark_comparing import Case, psnr, table
from benchmark_contender import FEW, GUIDED, INT8, PROMPT, Options
from benchmark_diffusers import Diffusers
from benchmark_few import FastSD
from benchmark_workers import CONTENDERS, answer_to

from sd.networks.tiny_vae import TinyVAE

CASE = Case(width=64, height=64, batch_size=2)
LCM, EIGHT_BITS = "64x64, batch 2, LCM, no guidance", "64x64, batch 2, 8 bits"


@pytest.fixture
def options(tmp_path):
    names = {"checkpoint": "a.ckpt", "folder": "theirs", "openvino": "ov", "tiny_vae": "taesd.safetensors"}
    paths = {option: str(tmp_path / name) for option, name in names.items()}
    return Options(**paths, device="cpu", precision="fp32", threads=None, compile_mode="default")


def test_fastsd_takes_the_steps_of_sd_zoo_from_the_same_noise(options, model, theirs):
    from diffusers import LCMScheduler

    ours, fast = CONTENDERS["sd-zoo-few"](options), FastSD(options)
    ours.model, fast.torch, fast.dtype = model, torch, torch.float32
    ours.prepare(64, 64, 2)
    fast.scheduler = LCMScheduler.from_config(theirs.scheduler.config)
    context = theirs.encode_prompt([PROMPT] * 2, "cpu", 1, do_classifier_free_guidance=False)[0]
    fast.encode_text = lambda: (context,)
    fast.predict = lambda x, timestep, context: theirs.unet(x, timestep, context).sample
    Diffusers.prepare(fast, 64, 64, 2)
    with torch.no_grad():
        for steps in (1, 4):
            expected = ours.denoised(steps)
            assert (fast.denoised(steps) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(
    ("name", "way", "found"),
    [
        ("sd-zoo", GUIDED, "64x64, batch 2"),
        ("sd-zoo-int8", GUIDED, EIGHT_BITS),
        ("sd-zoo-few", FEW, LCM),
        ("sd-zoo-few-int8", FEW, f"{LCM}, 8 bits"),
        ("openvino", GUIDED, "64x64, batch 2"),
        ("openvino-int8", GUIDED, EIGHT_BITS),
        ("fastsd", FEW, LCM),
        ("fastsd-int8", FEW, f"{LCM}, 8 bits"),
        ("sd.cpp", GUIDED, "64x64, batch 2"),
    ],
)
def test_a_table_holds_what_does_the_same_in_the_same_precision(name, way, found, options):
    contender = CONTENDERS[name](options)
    assert contender.way is way
    assert table(CASE, name) == found
    assert contender.precision == (INT8 if name.endswith("int8") else "fp32")
    assert name in CONTENDERS.keys() & benchmark.NEEDS.keys()


def test_help_describes_every_contender(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    words = capsys.readouterr().out.replace(";", " ").split()
    assert set(CONTENDERS) <= set(words)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("sd-zoo", {"precision": "fp32"}),
        ("sd-zoo-int8", {"precision": "int8"}),
        ("sd-zoo-few", {"precision": "fp32", "tiny_vae": "taesd.safetensors"}),
        ("sd-zoo-few-int8", {"precision": "int8", "tiny_vae": "taesd.safetensors"}),
    ],
)
def test_sd_zoo_is_loaded_and_started_with_what_a_contender_is(name, asked, options, monkeypatch):
    options = replace(options, tiny_vae="taesd.safetensors")
    loaded, typed = [], []
    monkeypatch.setattr("sd.load", lambda path, **given: loaded.append(given), raising=False)
    monkeypatch.setattr("sd.app.cli.main", lambda words: typed.append(words) or 0)
    contender = CONTENDERS[name](options)
    contender.load()
    contender.whole(64, 64, 4)
    assert loaded == [{"device": "cpu", "compile": False, **asked}]
    given = dict(zip(typed[0][2:-1:2], typed[0][3:-1:2], strict=True))
    flags = {f"--{name.replace('_', '-')}": value for name, value in asked.items()}
    way = {"--sampler": contender.way.sampler, "--guidance-scale": str(contender.way.guidance_scale)}
    assert given.items() >= (flags | way | {"--steps": "4", "--width": "64"}).items()
    assert ("--tiny-vae" in given) == ("tiny_vae" in asked)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("sd-zoo-int8", ["a.ckpt"]),
        ("sd-zoo-few", ["a.ckpt", "taesd.safetensors"]),
        ("sd.cpp", ["a.ckpt"]),
        ("openvino", ["a.ckpt", "theirs", "ov"]),
        ("openvino-int8", ["a.ckpt", "theirs", "ov", "unet-int8.xml"]),
        ("fastsd", ["taesd.safetensors", "a.ckpt", "theirs", "ov", "tiny_vae_decoder.xml"]),
        ("fastsd-int8", ["taesd.safetensors", "a.ckpt", "theirs", "ov", "unet-int8.xml", "tiny_vae_decoder.xml"]),
    ],
)
def test_the_files_of_a_contender_are_made_once_each_from_those_before(name, made, options, monkeypatch):
    done = []

    def make(path, *_):
        done.append(Path(path).name)
        Path(path).touch() if Path(path).suffix else Path(path).mkdir()
        if path == options.openvino:
            [Path(path, f"{network}.xml").touch() for network in ("text_encoder", "unet", "vae_decoder")]

    monkeypatch.setattr(benchmark_files, "make", make)
    layouts = sum(each in ("a.ckpt", "theirs", "ov") for each in made) + ("unet-int8.xml" in made) / 4
    assert benchmark_files.space_for(options, [name], 1e9) == layouts * 1e9
    benchmark_files.make_files(options, [name], "sd-v1", "tiny")
    assert done == made
    assert benchmark_files.missing_files(options, [name]) == []


def test_what_is_made_is_made_by_the_script_or_worker_for_it(options, monkeypatch):
    commands = []
    monkeypatch.setattr(benchmark_files, "run", lambda *words: commands.append(" ".join(words)))
    missing = benchmark_files.missing_files(options, ["fastsd-int8"])
    lost = [path for path in missing if Path(path).name == "text_encoder.xml"]
    for path in missing:
        if path in lost:  # of a folder that is there, so nothing makes it
            with pytest.raises(SystemExit, match=r"text_encoder.xml is missing. Remove .*ov: it is then made again"):
                benchmark_files.make(path, options, "sd-v1", "tiny")
        else:
            benchmark_files.make(path, options, "sd-v1", "tiny")
    expected = ["--family taesd", "--family sd-v1", "-m sd convert", " export ", " quantize ", " export-tiny "]
    assert len(lost) == 1
    assert all(words in command for words, command in zip(expected, commands, strict=True))


def test_psnr_by_hand():
    black = np.zeros((1, 8, 8, 3), np.uint8)
    assert psnr(black, black) is None
    assert psnr(black + 255, black) == pytest.approx(0)
    assert psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


def test_stable_diffusion_cpp_tells_its_parts_by_its_own_clock(options, monkeypatch):
    """A whole picture takes 1 s of text, 10 s a step and 5 s of decoding."""
    now = 0.0

    def generate_image(prompt, *, sample_steps, progress_callback, **given):
        nonlocal now
        now += 1
        progress_callback(0, sample_steps, 0.0)
        for step in range(sample_steps):
            now += 10
            progress_callback(step + 1, sample_steps, 10.0)
        now += 5
        return [given]

    monkeypatch.setattr(benchmark_sd_cpp, "time", SimpleNamespace(perf_counter=lambda: now))
    contender = CONTENDERS["sd.cpp"](options)
    contender.model = SimpleNamespace(generate_image=generate_image)
    contender.prepare(64, 32, 1)
    seconds = [answer_to(contender, {"unit": unit})["seconds"] for unit in ("encode_text", "decode")]
    assert [*seconds, answer_to(contender, {"unit": "steps", "count": 3})["seconds"]] == [1, 5, 30]
    (given,) = contender.pictures(2)
    assert given.items() >= {"width": 64, "height": 32, "cfg_scale": 7.5, "seed": 1}.items()
    assert "no latents" in answer_to(contender, {"unit": "latents", "path": "x.npy"})["error"]


def test_a_made_up_tiny_vae_is_read_here_and_by_diffusers(tmp_path, tiny_ckpt, monkeypatch, capsys):
    from diffusers import AutoencoderTiny
    from safetensors.torch import load_file

    import sd

    path = tmp_path / "taesd.safetensors"
    monkeypatch.setattr("sys.argv", ["make_checkpoint.py", str(path), "--family", "taesd"])
    make_checkpoint.main()
    assert AutoencoderTiny().load_state_dict(load_file(path))
    assert isinstance(sd.load(tiny_ckpt, tiny_vae=path, precision="fp32").tiny_vae, TinyVAE)
    for flags in (["--lcm"], ["--ema"], ["--size", "tiny"]):
        monkeypatch.setattr("sys.argv", ["make_checkpoint.py", str(path), "--family", "taesd", *flags])
        with pytest.raises(SystemExit):
            make_checkpoint.main()
        assert "a tiny VAE comes in one size" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("names", ["openvino,openvino-int8", "sd-zoo-few,fastsd,fastsd-int8"])
def test_openvino_in_8_bits_and_in_few_steps_is_compared_from_end_to_end(names, tmp_path, capsys):
    absent = [module for module in ("openvino", "nncf") if importlib.util.find_spec(module) is None]
    if absent:
        pytest.skip(f"{' and '.join(absent)} not installed: pip install openvino nncf")
    common = ["--tiny", "--precision", "fp32", "--device", "cpu", "--steps", "2", "--repeat", "1", "--psnr"]
    assert benchmark.main([*common, "--contenders", names, "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("left out")]
    assert sum(line.startswith("PSNR") for line in lines) == 2  # full precision and 8 bits
