"""`sd export`: what it refuses, what it says, and what onnxruntime makes of the folder."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from conftest import refused

import sd
from sd.app.cli import main
from sd.app.jobs import extras
from sd.sampling.noise import PictureNoise
from sd.sampling.schedule import alphas_cumprod
from sd.text.tokenizer import Tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
SETTINGS = ("config.json", "tokenizer.json")

needs_onnx = pytest.mark.skipif(
    bool(extras.missing_packages("onnx")), reason="the packages of sd-zoo[onnx] are not installed"
)


@pytest.fixture
def export(run, monkeypatch):
    """The command on a machine that has, or seems to have, what it needs."""
    monkeypatch.setattr(extras, "find_spec", lambda name: name)
    return lambda *arguments: run("export", *arguments)


def test_missing_packages_are_named_with_the_way_to_get_them(run, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    refused(run("export", "--onnx", "out"), "onnx, onnxscript and onnxruntime", "pip install 'sd-zoo[onnx]'")


def test_a_folder_of_somebody_elses_is_never_replaced(export, tmp_path, tiny_ckpt):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"format": "other"}')
    refused(export("--onnx", "mine", "-m", tiny_ckpt, "--force"), "mine", "is not a folder that sd export wrote")
    refused(export("--onnx", "no/such", "-m", tiny_ckpt), "no/such", "does not exist. Make it first")
    (tmp_path / "mine" / "config.json").write_text('{"format": "sd-zoo-onnx"}')
    refused(export("--onnx", "mine", "-m", tiny_ckpt), "exists already", "--force to replace it")
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_a_layer_that_the_text_encoder_lacks_is_refused(export, tiny_ckpt):
    refused(export("--onnx", "out", "-m", tiny_ckpt, "--clip-skip", "40"), "--clip-skip 40 is out of range", "layers")


@needs_onnx
@pytest.mark.slow
def test_a_file_that_computes_something_else_leaves_no_folder(run, tmp_path, tiny_ckpt, monkeypatch):
    monkeypatch.setattr("sd.runtime.onnx.export.LIMIT", 1e-12)
    code, lines, err = run("export", "--onnx", "out", "-m", tiny_ckpt, "--precision", "fp16")
    assert (code, lines) == (1, [])
    (found,) = re.findall(r"text_encoder.onnx differs from the network by (\S+), more than 1e-12", err)
    assert float(found) < 1e-5  # though its weights are stored in fp16
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The embedded model's folder, and what the command printed."""
    folder, printed = tmp_path_factory.mktemp("export") / "shapes-onnx", io.StringIO()
    with redirect_stdout(printed):
        assert main(["export", "--onnx", str(folder), "--json", "--quiet"]) == 0
    return folder, json.loads(printed.getvalue())


@needs_onnx
@pytest.mark.slow
def test_a_folder_has_what_a_program_needs(exported):
    import onnxruntime

    folder, printed = exported
    done = {each["name"]: each for each in printed["networks"]}
    assert [*done] == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert all(0 < each["difference"] <= 1e-4 for each in done.values())
    assert {each.name for each in folder.iterdir()} == {*(f"{name}.onnx" for name in done), *SETTINGS}
    about, model = json.loads((folder / "config.json").read_text()), sd.load()
    assert (about["family"], about["prediction"]) == (model.config.family, model.config.prediction)
    assert (np.float32(about["alphas_cumprod"]) == alphas_cumprod(model.config.schedule).numpy()).all()
    for name, each in about["networks"].items():
        assert done[name]["nbytes"] == (folder / each["file"]).stat().st_size
        session = onnxruntime.InferenceSession(folder / each["file"], providers=["CPUExecutionProvider"])
        for side, given in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            assert {it.name: it.shape for it in given} == {name: it["shape"] for name, it in each[side].items()}


@needs_onnx
@pytest.mark.slow
def test_the_documented_program_draws_our_picture_without_pytorch(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shapes-onnx").symlink_to(exported[0])
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    program = {}
    exec(compile(code, PAGE, "exec"), program)
    assert Path("picture.ppm").stat().st_size == 3 * 128 * 128 + len("P6 128 128 255\n")
    assert not {"torch", "sd", "PIL"} & set(re.findall(r"^(?:import|from) (\w+)", code, re.M))
    prompts = ["a red circle", "", "It's 3 BIG_stars, isn't it?!", "word " * 100]
    assert [program["tokenize"](prompt) for prompt in prompts] == Tokenizer()(prompts).tolist()
    prompt = "a red circle to the left of a white star on a blue background"
    theirs = program["draw"](prompt, PictureNoise([7], (4, 16, 16))().numpy())
    (ours,) = sd.load(device="cpu").txt2img(prompt, seed=7, steps=20, sampler="ddim")
    assert np.abs(theirs.astype(int) - np.asarray(ours).astype(int)).max() <= 2
    assert np.asarray(ours).std() > 20  # there is something to see
