"""From one layout to another: no value changes unless a precision is asked for, and no half file stays."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_checkpoint
import pytest
import safetensors.torch
import torch
from conftest import TINY
from safetensors import safe_open

import sd
from convert.convert import convert
from convert.errors import CheckpointError, WeightMismatchError
from convert.names import original_names

WEIGHTS = {name.name for name in original_names(TINY).values()}


def same_bits(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.shape == theirs[name].shape, name
        assert torch.equal(value.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_original_to_ours_and_back_gives_the_same_bits(tmp_path, tiny_state, tiny_ckpt, suffix):
    ours, back = tmp_path / "ours.safetensors", tmp_path / f"back{suffix}"
    assert convert(tiny_ckpt, ours).layout == "sd-zoo"
    assert convert(ours, back).layout == "original"
    read = safetensors.torch.load_file(back) if suffix == ".safetensors" else torch.load(back)["state_dict"]
    same_bits(read, {name: tiny_state[name] for name in WEIGHTS})


def test_a_mixed_precision_file_keeps_each_tensors_own(tmp_path, tiny_state):
    state = {
        n: v.half() if n.startswith("model.diff") else v.bfloat16() if "first" in n else v
        for n, v in tiny_state.items()
    }
    source, ours, back = (tmp_path / name for name in ("x.ckpt", "ours.safetensors", "back.safetensors"))
    make_checkpoint.save_original(source, state)
    convert(source, ours)
    convert(ours, back)
    same_bits(safetensors.torch.load_file(back), {name: state[name] for name in WEIGHTS})


def test_our_file_says_what_it_is_and_where_it_came_from(tmp_path, tiny_ckpt):
    path = tmp_path / "ours.safetensors"
    done = convert(tiny_ckpt, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert len(file.keys()) == done.tensors == len(WEIGHTS)
    assert metadata["format"] == "sd-zoo"
    assert metadata["family"] == "sd-v1"
    assert metadata["weights"] == "model"
    assert metadata["precision"] == "float32"
    assert metadata["global_step"] == "470000"
    assert metadata["source_file"] == "tiny.ckpt"
    assert metadata["source_sha256"] == hashlib.sha256(tiny_ckpt.read_bytes()).hexdigest()
    assert json.loads(metadata["config"])["unet"]["width"] == 32


def test_our_file_makes_the_same_picture(tmp_path, tiny_ckpt):
    path = tmp_path / "ours.safetensors"
    convert(tiny_ckpt, path)
    options = {"steps": 2, "seed": 3, "width": 64, "height": 64}
    (first,), (second,) = (sd.load(file).txt2img("a horse", **options) for file in (tiny_ckpt, path))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_precision_rounds_every_tensor_once(tmp_path, tiny_state, tiny_ckpt, precision, dtype):
    path = tmp_path / "x.safetensors"
    done = convert(tiny_ckpt, path, layout="original", precision=precision)
    same_bits(safetensors.torch.load_file(path), {name: tiny_state[name].to(dtype) for name in WEIGHTS})
    assert done.nbytes == 2 * done.parameters


def test_averaged_weights_are_taken_when_asked_for(tmp_path, tiny_state, tiny_ckpt):
    path = tmp_path / "x.safetensors"
    convert(tiny_ckpt, path, layout="original", weights="ema")
    name = "model.diffusion_model.out.2.weight"
    read = safetensors.torch.load_file(path)[name]
    assert torch.equal(read, tiny_state["model_ema.diffusion_modelout2weight"])
    assert not torch.equal(read, tiny_state[name])


def test_tensors_that_lie_in_another_order_are_written_row_by_row(tmp_path, tiny_state):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state = {**tiny_state, name: tiny_state[name].to(memory_format=torch.channels_last)}
    source, target = tmp_path / "x.ckpt", tmp_path / "y.safetensors"
    make_checkpoint.save_original(source, state)
    convert(source, target, layout="original")
    assert torch.equal(safetensors.torch.load_file(target)[name], tiny_state[name])


def test_progress_adds_up_to_the_announced_bytes(tmp_path, tiny_ckpt):
    announced, written = [], []
    done = convert(tiny_ckpt, tmp_path / "x.safetensors", on_start=announced.append, on_bytes=written.append)
    assert announced == [done.nbytes] == [sum(written)]


def test_data_is_aligned_for_mapping(tmp_path, tiny_ckpt):
    path = tmp_path / "x.safetensors"
    convert(tiny_ckpt, path)
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0


def test_an_existing_file_is_kept_unless_forced(tmp_path, tiny_ckpt):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="exists already"):
        convert(tiny_ckpt, path)
    assert path.read_bytes() == b"precious"
    convert(tiny_ckpt, path, force=True)
    assert path.stat().st_size > 1_000_000


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, tiny_ckpt, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match=r"has 0\.00 GB free, the file needs 0\.0\d GB"):
        convert(tiny_ckpt, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.pt", {}, "must end in .safetensors or .ckpt"),
        ("x.ckpt", {}, "only the original layout has"),
        ("x.safetensors", {"precision": "fp8"}, "precision must be keep, fp32, fp16, bf16"),
        ("x.safetensors", {"layout": "diffusers"}, "layout must be one of sd-zoo, original"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, tiny_ckpt, name, options, message):
    with pytest.raises(ValueError, match=message):
        convert(tiny_ckpt, tmp_path / name, **options)
    assert os.listdir(tmp_path) == []


def test_a_damaged_source_leaves_no_file(tmp_path, tiny_ckpt):
    data = bytearray(tiny_ckpt.read_bytes())
    data[len(data) // 2] ^= 4
    source = tmp_path / "damaged.ckpt"
    source.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        convert(source, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == ["damaged.ckpt"]


def test_a_killed_conversion_leaves_no_file_under_the_final_name(tmp_path, tiny_ckpt):
    target = tmp_path / "x.safetensors"
    code = (
        "import sys, time; from pathlib import Path; from convert.convert import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), on_bytes=lambda n: (print(n, flush=True), time.sleep(0.01)))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tiny_ckpt, target], stdout=subprocess.PIPE)
    child.stdout.readline()
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not target.exists()
    assert convert(tiny_ckpt, target).tensors == len(WEIGHTS)


def rewritten(path: Path, change) -> Path:
    """A file of ours with its metadata changed."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    change(metadata, config)
    metadata.setdefault("config", json.dumps(config))
    target = path.with_name("changed.safetensors")
    safetensors.torch.save_file(safetensors.torch.load_file(path), target, metadata)
    return target


@pytest.fixture(scope="module")
def ours(tmp_path_factory, tiny_ckpt):
    path = tmp_path_factory.mktemp("ours") / "ours.safetensors"
    convert(tiny_ckpt, path)
    return path


def set_config(part, name, value):
    def change(metadata, config):
        del metadata["config"]
        config[part][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metadata, _: metadata.update(format_version="9"), "version 9 of the sd-zoo format"),
        (lambda metadata, _: metadata.update(config="{"), "no usable config"),
        (lambda metadata, _: metadata.update(config="[]"), "no usable config"),
        (set_config("unet", "width", 64), "do not bear out"),
        (set_config("unet", "depths", [10**9] * 4), "does not fit into"),
        (set_config("text_encoder", "layers", 10**12), "does not fit into"),
        (set_config("text_encoder", "layers", 3), "lacks 16 of the"),
        (set_config("text_encoder", "heads", 2), "do not bear out"),
        (set_config("vae", "latent_scale", 0.0), "do not bear out"),
        (set_config("vae", "latent_scale", float("nan")), "do not bear out"),
        (set_config("unet", "colour", 1), "no usable config"),
    ],
)
def test_a_config_that_the_tensors_do_not_bear_out_is_refused(ours, change, message):
    with pytest.raises(CheckpointError, match=message):
        sd.load(rewritten(ours, change))


def test_the_other_weights_are_not_in_a_file_of_ours(ours):
    with pytest.raises(WeightMismatchError, match="holds the model weights, not the ema ones"):
        sd.load(ours, weights="ema")


def test_converted_file_loads_without_the_package_that_wrote_it(ours):
    assert safetensors.torch.load_file(ours)["unet.input_blocks.0.conv.weight"].shape == (32, 4, 3, 3)
