"""Models trained with zero terminal SNR: what their files say is what pictures are made with, unless told otherwise."""

import json

import make_checkpoint
import pytest
import torch
from conftest import TINY, refused, settings_of
from safetensors.torch import save_file

import sd

QUICK = ("-W", 64, "-H", 64, "--steps", 2, "-s", 1, "-q")
MARKERS = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "m.safetensors"
    save_file(make_checkpoint.made_up_state_dict(TINY) | MARKERS, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "begins"), [((), True), (("--no-zero-terminal-snr",), False), (("--prediction", "eps"), False)]
)
def test_pictures_begin_where_the_file_says_and_again_with_like(path, run, tmp_path, flags, begins):
    code, _, err = run("txt2img", "x", "-m", path, *QUICK[:-1], *flags, "-o", "a.png")
    assert code == 0
    assert settings_of(tmp_path / "a.png")["zero_terminal_snr"] is begins
    assert ("--schedule trailing --guidance-rescale 0.7" in err) is ("--prediction" not in flags)
    assert run("txt2img", "--like", "a.png", "-m", path, "-q", "-o", "b.png")[0] == 0
    assert settings_of(tmp_path / "b.png")["zero_terminal_snr"] is begins
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.slow
def test_lines_of_a_file_and_python_say_otherwise_one_by_one(path, run, tmp_path):
    flags = ("--no-zero-terminal-snr", "--zero-terminal-snr false", "--zero-terminal-snr")
    lines = [
        '{"prompt": "x"}',
        '{"prompt": "x", "zero_terminal_snr": false}',
        *(f"--prompt x {flag}" for flag in flags),
    ]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    assert run("txt2img", "--from-file", "lines.txt", "-m", path, *QUICK, "-o", "{index}.png")[0] == 0
    made = [settings_of(file)["zero_terminal_snr"] for file in sorted(tmp_path.glob("[0-9].png"))]
    assert made == [True, False, False, False, True]
    model, options = sd.load(path), {"width": 64, "height": 64, "steps": 2, "seed": 1}
    pictures = [model.txt2img("x", **options, **more)[0] for more in ({}, {"zero_terminal_snr": False})]
    assert [json.loads(picture.info["sd"])["zero_terminal_snr"] for picture in pictures] == [True, False]
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_a_key_of_json_that_would_mean_its_opposite_is_refused(path, run, tmp_path):
    (tmp_path / "lines.txt").write_text('{"prompt": "x", "no-zero-terminal-snr": true}')
    refused(run("txt2img", "--from-file", "lines.txt", "-m", path, *QUICK), "no-zero-terminal-snr", "zero_terminal_snr")


def test_pure_noise_is_refused_where_the_model_is_told_to_predict_eps(path, run):
    flags = ("--prediction", "eps", "--zero-terminal-snr")
    refused(run("txt2img", "x", "-m", path, *QUICK, *flags), "zero-terminal-snr", "predicts eps")
