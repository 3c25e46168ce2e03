"""`sd export`: what it refuses, what it says, and what onnxruntime makes of the folder."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import refused

from sd.app.cli import export as command
from sd.sampling.schedule import alphas_cumprod

needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, command.NEEDED)), reason="the packages of sd-zoo[onnx] are not installed"
)


@pytest.fixture
def export(run, monkeypatch):
    """The command on a machine that has, or seems to have, what it needs."""
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    return lambda *arguments: run("export", *arguments)


def test_missing_packages_are_named_with_the_way_to_get_them(run, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
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
    code, lines, err = run("export", "--onnx", "out", "-m", tiny_ckpt)
    assert (code, lines) == (1, [])
    assert "text_encoder.onnx differs from the network by" in err
    assert list(tmp_path.iterdir()) == []


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_folder_has_what_a_program_needs(run, tmp_path, tiny_ckpt, model, precision):
    import onnxruntime

    code, (line,), err = run("export", "--onnx", "out", "-m", tiny_ckpt, "--precision", precision, "--json")
    assert code == 0, err
    done = {each["name"]: each for each in json.loads(line)["networks"]}
    assert [*done] == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert all(0 < each["difference"] <= 1e-4 for each in done.values())
    assert "unet.onnx" in err
    files = {each.name: each.stat().st_size for each in (tmp_path / "out").iterdir()}
    assert {*files} == {*(f"{name}.onnx" for name in done), "config.json", "tokenizer.json"}
    parameters = sum(each.numel() for each in model.unet.parameters())
    assert files["unet.onnx"] == pytest.approx({"fp32": 4, "fp16": 2}[precision] * parameters, rel=0.1)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (about["family"], about["prediction"], about["latent_scale"]) == ("sd-v1", "eps", 0.18215)
    assert (np.float32(about["alphas_cumprod"]) == alphas_cumprod(model.config.schedule).numpy()).all()
    for each in about["networks"].values():
        session = onnxruntime.InferenceSession(tmp_path / "out" / each["file"], providers=["CPUExecutionProvider"])
        assert [given.name for given in session.get_inputs()] == [*each["inputs"]]
        assert [given.name for given in session.get_outputs()] == [*each["outputs"]]
    assert run("export", "--onnx", "out", "-m", tiny_ckpt)[0] == 2  # it exists
