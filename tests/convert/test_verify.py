"""Reading back what was written; everything beside a model that is kept; the hash of a set of tensors."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import refused
from test_convert import WEIGHTS, same_bits

import convert.actions.verify as verifying
import convert.actions.writing as writing
from convert.actions.convert import convert
from convert.actions.inspect import inspect
from convert.actions.target import MismatchError, TargetError
from convert.actions.tensor_set import set_sha256, tensor_digests, tensors_of
from convert.errors import CheckpointError
from convert.files.arrays import rounded
from convert.files.reader import open_checkpoint
from sd.app.cli import main

ROOT = Path(__file__).parents[2]


def hash_by_definition(state):
    """sha256 over the sorted lines ["name", "dtype", [shape], "sha256"], without axes of length 1 at the end."""
    lines = []
    for name, value in state.items():
        shape = list(value.shape)
        while shape and shape[-1] == 1:
            shape.pop()
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        dtype = str(value.dtype).removeprefix("torch.")
        lines.append(json.dumps([name, dtype, shape, hashlib.sha256(data).hexdigest()]) + "\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def hash_of_file(path):
    with open_checkpoint(path) as file:
        return set_sha256(tensor_digests(file, tensors_of(file.root)))


@pytest.fixture(scope="module")
def weights_hash(tiny_state):
    return hash_by_definition({name: tiny_state[name] for name in WEIGHTS})


# Reading back


@pytest.mark.slow
def test_the_hash_of_the_weights_is_the_same_after_each_step_of_a_round_trip(tmp_path, tiny_ckpt, weights_hash):
    steps = [("ours.safetensors", "sd-zoo"), ("a.ckpt", "original"), ("folder", "diffusers"), ("b.ckpt", "original")]
    source = tiny_ckpt
    for name, layout in steps:
        done = convert(source, tmp_path / name, layout=layout, verify=True)
        assert done.verified.tensors_sha256 == weights_hash
        assert (done.verified.same, done.verified.rounded) == (970, 0)
        source = tmp_path / name
    assert hash_of_file(tmp_path / "a.ckpt") == hash_of_file(tmp_path / "b.ckpt") == weights_hash
    assert inspect(tmp_path / "folder", tensors_hashed=True).tensors_sha256 == weights_hash


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (torch.float64, "float16"),
        (torch.float64, "bfloat16"),
        (torch.float32, "float16"),
        (torch.float32, "bfloat16"),
        (torch.float16, "bfloat16"),
        (torch.bfloat16, "float32"),
    ],
)
def test_what_torch_rounds_is_what_is_expected_when_reading_back(source, wanted):
    """Also between two neighbours, and where float64 is rounded twice: first to float32."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(20_000, generator=generator, dtype=torch.float64)
    near = [1 + 2**-11, 1 + 2**-11 + 2**-30, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 2**-8 + 2**-30, 2.0**-25, 1e4, 1e-5]
    ties = torch.tensor(near, dtype=torch.float64)
    stored = torch.cat([values, ties, -ties]).to(source)
    written = stored.to(getattr(torch, wanted)).double().numpy()
    assert np.array_equal(verifying.as_written(stored.double().numpy(), wanted), written)
    if (source, wanted) == (torch.float64, "float16"):
        assert not np.array_equal(rounded(stored.double().numpy(), wanted), written)


def test_rounded_weights_are_compared_number_by_number(tmp_path, tiny_ckpt):
    done = convert(tiny_ckpt, tmp_path / "x.safetensors", precision="fp16", verify=True)
    assert (done.verified.same, done.verified.rounded) == (0, 970)


@pytest.fixture
def faulty(monkeypatch):
    """Writing changes one bit of the last number of one tensor, as a bad disk might."""

    def change(wanted):
        converted = writing.converted

        def spoiled(*arguments):
            for name, tensor in converted(*arguments):
                if name == wanted:
                    tensor = tensor.clone()
                    tensor.view(torch.uint8).flatten()[-tensor.element_size()] ^= 1
                yield name, tensor

        monkeypatch.setattr("convert.files.reader.CheckpointFile.span", lambda self, record: None)
        for module in ("convert.actions.writing", "convert.actions.convert"):
            monkeypatch.setattr(f"{module}.converted", spoiled)

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "options"),
    [
        ("unet.out.conv.bias", "x.safetensors", {}),
        ("first_stage_model.quant_conv.bias", "x.ckpt", {}),
        ("unet.out.conv.bias", "x.safetensors", {"precision": "bf16"}),
        ("extra.betas", "x.safetensors", {"keep_all": True}),
        ("encoder.conv_in.bias", "x.safetensors", {"part": "vae", "layout": "original"}),
    ],
)
def test_one_wrong_bit_is_found_and_nothing_stays(tmp_path, tiny_ckpt, faulty, name, target, options):
    faulty(name)
    convert(tiny_ckpt, tmp_path / target, **options)  # unnoticed
    before = (tmp_path / target).read_bytes()
    with pytest.raises(MismatchError, match="differs from the source in 1 tensor and was removed"):
        convert(tiny_ckpt, tmp_path / target, verify=True, force=True, **options)
    assert os.listdir(tmp_path) == [target]
    assert (tmp_path / target).read_bytes() == before  # what was there stays


def test_what_was_copied_wrong_is_found(tmp_path, tiny_ckpt, monkeypatch):
    copy, places = writing.copy_bytes, []

    def spoiled(source, offset, out, count):
        places.append(out.tell())
        done = copy(source, offset, out, count)
        if len(places) == 3:
            out.flush()
            os.pwrite(out.fileno(), b"\x55\xaa", places[-1])
        return done

    monkeypatch.setattr(writing, "copy_bytes", spoiled)
    with pytest.raises(MismatchError, match="differs from the source in 1 tensor and was removed"):
        convert(tiny_ckpt, tmp_path / "x.safetensors", verify=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fault", [errno.EXDEV, errno.ENOSPC])
def test_where_the_system_cannot_copy_bytes_are_read_and_written(tmp_path, tiny_ckpt, monkeypatch, fault):
    convert(tiny_ckpt, tmp_path / "copied.safetensors")

    def refuse(*_):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    if fault == errno.ENOSPC:
        with pytest.raises(OSError, match="No space left"):
            convert(tiny_ckpt, tmp_path / "x.safetensors")
        return
    convert(tiny_ckpt, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "copied.safetensors").read_bytes()


def test_a_same_precision_conversion_needs_no_torch(tmp_path, tiny_ckpt):
    code = (
        "import sys; from convert.actions.convert import convert; from pathlib import Path\n"
        "convert(Path(sys.argv[1]), Path('x.safetensors')); assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tiny_ckpt)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_wrong_folder_does_not_stay(tmp_path, tiny_ckpt, faulty):
    faulty("quant_conv.bias")
    with pytest.raises(MismatchError, match=r"1 tensor and was removed: first_stage_model\.quant_conv\.bias"):
        convert(tiny_ckpt, tmp_path / "x", layout="diffusers", verify=True)
    assert os.listdir(tmp_path) == []


def test_the_command_says_what_it_compared_and_ends_with_1_where_that_differs(
    tmp_path, tiny_ckpt, weights_hash, faulty, capsys
):
    assert main(["convert", str(tiny_ckpt), str(tmp_path / "x.ckpt"), "--verify"]) == 0
    assert f"sd: verified: read back 970 tensors bit for bit; weights {weights_hash}\n" in capsys.readouterr().err
    faulty("first_stage_model.quant_conv.bias")
    assert main(["convert", str(tiny_ckpt), str(tmp_path / "y.ckpt"), "--verify"]) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "y.ckpt: the new file differs from the source in 1 tensor and was removed" in streams.err
    assert os.listdir(tmp_path) == ["x.ckpt"]


# Everything beside the model


@pytest.fixture(scope="module")
def full_state(tiny_state):
    """A file of a training, with all that may lie beside the model."""
    return tiny_state | {
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.3.num_batches_tracked": torch.tensor(7),
        "scale_factor": torch.tensor(0.18215),
        "ztsnr": torch.zeros(0),
    }


@pytest.fixture(scope="module")
def full(tmp_path_factory, full_state):
    path = tmp_path_factory.mktemp("full") / "full.ckpt"
    torch.save({"state_dict": full_state, "global_step": 12}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["model", pytest.param("ema", marks=pytest.mark.slow)])
def test_everything_comes_back_as_it_was(tmp_path, full, full_state, weights):
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.ckpt"
    kept = convert(full, ours, keep_all=True, weights=weights, verify=True)
    done = convert(ours, back, verify=True)
    same_bits(torch.load(back)["state_dict"], full_state)
    assert torch.load(back)["global_step"] == 12
    assert kept.left_out == done.left_out == 0
    expected = hash_by_definition(full_state)
    assert {kept.verified.everything_sha256, done.verified.everything_sha256, hash_of_file(back)} == {expected}
    assert inspect(ours, tensors_hashed=True).everything_sha256 == hash_of_file(full) == expected


def test_averaged_weights_alone_stay_averaged_weights(tmp_path, tiny_state):
    state = {name: value for name, value in tiny_state.items() if not name.startswith("model.diffusion_model.")}
    torch.save(state, tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", tmp_path / "ours.safetensors", keep_all=True)
    convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors")
    same_bits(safetensors.torch.load_file(tmp_path / "back.safetensors"), state)


def test_a_file_that_keeps_everything_is_the_same_model(tmp_path, full, weights_hash):
    done = convert(full, tmp_path / "x.safetensors", keep_all=True, verify=True)
    report = inspect(tmp_path / "x.safetensors")
    assert done.verified.tensors_sha256 == weights_hash
    assert (report.problem, report.layout, report.family) == (None, "sd-zoo", "sd-v1")
    leftovers = {part.name: part.tensors for part in report.leftovers}
    assert leftovers["EMA average of the UNet"] == 686
    assert leftovers["noise schedule"] == 13


def test_what_is_left_out_is_told(full, run):
    _, _, err = run("convert", full, "x.safetensors")
    assert "left out: 705 tensors outside the model (--keep-all keeps them)" in err
    _, _, err = run("convert", full, "y.safetensors", "--keep-all")
    assert "left out" not in err
    assert "ignored" not in err


def test_a_precision_changes_weights_and_nothing_else_beside_them(tmp_path, full, full_state):
    convert(full, tmp_path / "x.safetensors", layout="original", keep_all=True, precision="fp16", verify=True)
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    changed = {n for n in full_state if n in WEIGHTS or n.startswith("model_ema.diffusion_model")}
    same_bits(found, {n: value.half() if n in changed else value for n, value in full_state.items()})


def test_what_has_no_place_for_it_is_refused(tmp_path, full, run):
    with pytest.raises(TargetError, match="diffusers layout cannot keep the tensors beside"):
        convert(full, tmp_path / "x", layout="diffusers", keep_all=True)
    with pytest.raises(TargetError, match="nothing to choose"):
        convert(full, tmp_path / "x.ckpt", weights="ema", keep_all=True)
    refused(run("convert", full, "x.ckpt", "--only", "vae", "--keep-all"), "leave out --keep-all")
    assert os.listdir(tmp_path) == []


def test_a_weight_that_also_lies_beside_the_model_is_refused(tmp_path, tiny_ckpt):
    from safetensors import safe_open

    convert(tiny_ckpt, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    name = "first_stage_model.quant_conv.bias"
    safetensors.torch.save_file(tensors | {f"extra.{name}": torch.ones(8)}, tmp_path / "y.safetensors", metadata)
    with pytest.raises(CheckpointError, match=f"y.safetensors holds {name} twice"):
        convert(tmp_path / "y.safetensors", tmp_path / "z.ckpt")
