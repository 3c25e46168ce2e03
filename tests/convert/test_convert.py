"""From one layout to another: no value changes unless a precision is asked for, and no half file stays."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import make_checkpoint
import pytest
import reference
import safetensors.torch
import torch
from conftest import TINY
from safetensors import safe_open

import convert.files.reader as convert_reader
import sd
from convert.actions.convert import TargetError, convert
from convert.actions.original_writer import schedule_buffers, write_original
from convert.checkpoint import read_checkpoint
from convert.errors import CheckpointError, WeightMismatchError
from convert.files.reader import open_checkpoint, release_after_last
from convert.files.records import StorageRecord, TensorRecord
from convert.files.tensors import in_range
from convert.layouts.names import original_names

WEIGHTS = {name.name for name in original_names(TINY).values()}


def same_bits(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.shape == theirs[name].shape, name
        assert torch.equal(value.flatten().view(torch.uint8), theirs[name].flatten().view(torch.uint8)), name


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
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0  # aligned for mapping
    assert json.loads(metadata.pop("config")) == json.loads(json.dumps(TINY.to_dict()))
    assert metadata == {
        **{"format": "sd-zoo", "format_version": "1", "family": "sd-v1", "weights": "model", "precision": "float32"},
        **{"global_step": "470000", "source_file": "tiny.ckpt"},
        "source_sha256": hashlib.sha256(tiny_ckpt.read_bytes()).hexdigest(),
    }


@pytest.mark.slow
def test_the_hash_of_the_source_can_be_left_out_but_a_known_one_is_noted(tmp_path, call, tiny_ckpt, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "ours.safetensors"

    def noted(*flags: str) -> str | None:
        assert call("convert", tiny_ckpt, path, "--force", *flags)[0] == 0
        with safe_open(path, "pt") as file:
            return file.metadata().get("source_sha256")

    assert noted("--no-hash") is None
    assert noted() == noted("--no-hash") == hashlib.sha256(tiny_ckpt.read_bytes()).hexdigest()


@pytest.mark.slow
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


def test_tensors_that_lie_in_another_order_are_written_row_by_row(tmp_path, tiny_state):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state = {**tiny_state, name: tiny_state[name].to(memory_format=torch.channels_last)}
    source, target = tmp_path / "x.ckpt", tmp_path / "y.safetensors"
    make_checkpoint.save_original(source, state)
    convert(source, target, layout="original")
    assert torch.equal(safetensors.torch.load_file(target)[name], tiny_state[name])


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_progress_tells_what_was_written_and_adds_up_to_the_announced_bytes(tmp_path, tiny_ckpt, suffix):
    announced, told, on_disk = [], [], []

    def on_bytes(count):
        (unfinished,) = tmp_path.iterdir()
        told.append(count)
        on_disk.append(unfinished.stat().st_size)

    done = convert(tiny_ckpt, tmp_path / f"x{suffix}", layout="original", on_start=announced.append, on_bytes=on_bytes)
    assert announced == [done.nbytes] == [sum(told)]
    assert len(told) > 1
    buffered = 1 << 17
    assert all(sum(told[: index + 1]) <= size + buffered for index, size in enumerate(on_disk))


@pytest.fixture
def sharing(tmp_path, tiny_state):
    """A file whose first 20 weights are windows into one storage that has other numbers, too."""
    state = {name: tiny_state[name] for name in sorted(WEIGHTS)}
    shared = list(state)[:20]
    storage = torch.cat([torch.full((1_000_000,), 7.0), *(state[name].flatten() for name in shared)])
    start = 1_000_000
    for name in shared:
        count = state[name].numel()
        state[name] = storage[start : start + count].view(state[name].shape)
        start += count
    torch.save(state, tmp_path / "sharing.ckpt")
    return tmp_path / "sharing.ckpt"


def test_windows_into_a_shared_storage_are_written_without_the_rest_of_it(tmp_path, tiny_state, sharing):
    target = tmp_path / "x.ckpt"
    done = convert(sharing, target, layout="original")
    same_bits(torch.load(target)["state_dict"], {name: tiny_state[name] for name in WEIGHTS})
    assert target.stat().st_size < done.nbytes + 1_000_000


def test_a_deflated_storage_that_tensors_share_is_inflated_once(tmp_path, tiny_state, sharing, monkeypatch):
    source, target = tmp_path / "deflated.ckpt", tmp_path / "x.safetensors"
    with zipfile.ZipFile(sharing) as old, zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED, compresslevel=0) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    inflated = []
    inflate = convert_reader.inflate
    monkeypatch.setattr(convert_reader, "inflate", lambda *args: inflated.append(args[2]) or inflate(*args))
    convert(source, target, layout="original")
    assert len(inflated) == len(WEIGHTS) - 20 + 1
    same_bits(safetensors.torch.load_file(target), {name: tiny_state[name] for name in WEIGHTS})


def test_a_shared_storage_is_released_once_after_its_last_user():
    shared, own = (StorageRecord(key, 0, 8, "little", None) for key in "01")
    records = [TensorRecord("float32", (1,), (1,), storage, 0) for storage in [shared] * 200 + [own]]
    released = []
    release = release_after_last(SimpleNamespace(release=released.append), records)
    release(records[-1])
    assert released == [records[-1]]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(release, records[1:-1]))
    assert len(released) == 1
    release(records[0])
    assert released == [records[-1], records[0]]


@pytest.mark.parametrize(
    ("precision", "value", "suffix"), [("fp16", 70000.0, ".ckpt"), ("bf16", float("nan"), ".safetensors")]
)
def test_values_that_a_precision_has_no_room_for_are_refused(tmp_path, tiny_state, precision, value, suffix):
    names = ["model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias"]
    state = {name: torch.full_like(tiny_state[name], value) if name in names else tiny_state[name] for name in WEIGHTS}
    source, target = tmp_path / "x.ckpt", tmp_path / f"y{suffix}"
    torch.save(state, source)
    message = f"x.ckpt holds values that are NaN, infinite or beyond {precision} in 2 weights: "
    with pytest.raises(WeightMismatchError, match=message) as caught:
        convert(source, target, layout="original", precision=precision)
    assert all(name in str(caught.value) for name in names)
    assert os.listdir(tmp_path) == ["x.ckpt"]
    convert(source, target, layout="original")  # the same bits, whatever they say


@pytest.mark.parametrize(
    ("values", "stored", "wanted", "fits"),
    [
        ([65504.0, -65504.0], torch.float32, torch.float16, True),
        ([65520.0], torch.float32, torch.float16, False),
        ([-1e6], torch.bfloat16, torch.float16, False),
        ([1e300], torch.float64, torch.float32, False),
        ([float("inf")], torch.bfloat16, torch.float32, False),
        ([float("nan"), 1.0], torch.float16, torch.bfloat16, False),
        ([448.0], torch.float8_e4m3fn, torch.float16, True),
        ([float("nan")], torch.float8_e5m2, torch.float32, False),
        ([], torch.float32, torch.float16, True),
    ],
)
def test_range_of_a_precision(values, stored, wanted, fits):
    assert in_range(torch.tensor(values, dtype=torch.float64).to(stored), wanted) == fits


def test_a_link_to_the_source_is_the_source(tmp_path, tiny_ckpt):
    (tmp_path / "y.ckpt").symlink_to(tiny_ckpt)
    with pytest.raises(TargetError, match="is the source itself"):
        convert(tiny_ckpt, tmp_path / "y.ckpt", layout="original", force=True)


def test_numbers_beside_the_weights_stand_in_a_ckpt_as_in_the_source(tmp_path, tiny_state):
    source, ours, target = tmp_path / "x.ckpt", tmp_path / "x.safetensors", tmp_path / "y.ckpt"
    beside = {"global_step": 12, "native_size": 256, "guidance_scale": 3.5}
    torch.save({"state_dict": {name: tiny_state[name] for name in WEIGHTS}, **beside}, source)
    convert(source, ours)
    for each in (source, ours):
        convert(each, target, layout="original", force=True)
        assert {key: value for key, value in torch.load(target).items() if key != "state_dict"} == beside


def test_numbers_beside_the_weights_stand_in_the_metadata_of_safetensors(tmp_path, tiny_state):
    source, target, ours = tmp_path / "x.ckpt", tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    beside = {"native_size": 256, "guidance_scale": 10 / 3}
    torch.save({"state_dict": {name: tiny_state[name] for name in WEIGHTS}, "global_step": 12, **beside}, source)
    convert(source, target, layout="original")
    convert(target, ours)
    for each in (source, target, ours):
        with open_checkpoint(each) as file:
            found = read_checkpoint(file)
            assert (found.global_step, found.config) == (12, replace(TINY, **beside))
    with safe_open(ours, "pt") as file:
        assert not beside.keys() & file.metadata().keys()  # they are in its config


def test_a_source_name_that_is_no_text_gives_a_file_that_can_be_read(tmp_path, tiny_ckpt):
    source, target = tmp_path / os.fsdecode(b"\xff.ckpt"), tmp_path / "x.safetensors"
    shutil.copy(tiny_ckpt, source)
    convert(source, target)
    with safe_open(target, "pt") as file:
        assert file.metadata()["source_file"] == "\\udcff.ckpt"


def test_original_files_are_written_as_safetensors_too(tmp_path, tiny_state):
    path = tmp_path / "x.safetensors"
    write_original(path, tiny_state)
    same_bits(safetensors.torch.load_file(path), tiny_state)
    with pytest.raises(ValueError, match="no place for global_step"):
        write_original(path, tiny_state, force=True, global_step=1)


def test_schedule_tables_are_right_to_the_last_bits_of_float32():
    tables = schedule_buffers(TINY.schedule)
    bars = reference.alphas_cumprod()
    previous = [1.0, *bars[:-1]]
    expected = {
        "betas": reference.betas(),
        "alphas_cumprod": bars,
        "posterior_variance": [
            beta * (1 - before) / (1 - bar) for beta, bar, before in zip(reference.betas(), bars, previous, strict=True)
        ],
    }
    for name, values in expected.items():
        assert tables[name].dtype == torch.float32
        torch.testing.assert_close(
            tables[name].double(), torch.tensor(values, dtype=torch.float64), rtol=2**-24, atol=0
        )


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


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_disk_that_fills_up_meanwhile_is_named_as_such(tmp_path, tiny_ckpt, suffix):
    def on_bytes(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        convert(tiny_ckpt, tmp_path / f"x{suffix}", layout="original", on_bytes=on_bytes)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.bin", {}, "must end in .safetensors, .ckpt or .pt"),
        ("x.ckpt", {"layout": "sd-zoo"}, "only the original layout can be"),
        ("no/x.safetensors", {}, "the folder of .* does not exist"),
        ("x.safetensors", {"precision": "fp8"}, "precision must be keep, fp32, fp16, bf16"),
        ("x.safetensors", {"layout": "kohya"}, "layout must be one of sd-zoo, original, diffusers"),
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
        "import sys, time; from pathlib import Path; from convert.actions.convert import convert\n"
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
        if part is None or name is None:
            config[part or name] = value
        else:
            config[part][name] = value

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metadata, _: metadata.update(format_version="9"), "version 9 of the sd-zoo format"),
        (lambda metadata, _: metadata.update(config="{"), "no usable config"),
        (lambda metadata, _: metadata.update(config="[]"), "no usable config"),
        (set_config("unet", "width", 64), "contradicts its tensors"),
        (set_config("unet", "depths", [10**9] * 4), "has 1000000000 transformer blocks per residual; 0 to 32"),
        (set_config("unet", "multipliers", [1] * 300), "has 300 UNet levels; 1 to 8"),
        (set_config("unet", "multipliers", []), "has 0 UNet levels"),
        (set_config("unet", "depths", [1]), "different numbers of levels"),
        (set_config("unet", "residuals_per_level", -1), "has -1 UNet residuals"),
        (set_config("unet", "width", 32.0), "no usable config"),
        (set_config("unet", "middle_depth", True), "no usable config"),
        (set_config("unet", "multipliers", [1, 2, 4, 4.0]), "no usable config"),
        (set_config("unet", "multipliers", "1244"), "no usable config"),
        (set_config("unet", None, []), "no usable config"),
        (set_config("schedule", "timesteps", 0), "has 0 for timesteps in its metadata; it must be 1 to 10000"),
        (set_config("schedule", "timesteps", 10**9), "for timesteps"),
        (set_config("schedule", "timesteps", 1000.0), "no usable config"),
        (set_config("schedule", "beta_start", 0.5), "has 0.5 and 0.012 for beta_start and beta_end"),
        (set_config("schedule", "beta_start", 0.0), "for beta_start"),
        (set_config("schedule", "beta_end", 1.0), "for beta_start and beta_end"),
        (set_config("schedule", "beta_end", float("nan")), "for beta_start and beta_end"),
        (set_config("schedule", "beta_start", 0), "no usable config"),
        (set_config(None, "prediction", "x_0\x1b[2J"), r"has x_0\\x1b\[2J for prediction"),
        (set_config(None, "prediction", None), "no usable config"),
        (set_config(None, "native_size", 100), "has 100 for native_size"),
        (set_config(None, "native_size", 8), "has 8 for native_size"),
        (set_config(None, "native_size", 8192), "has 8192 for native_size"),
        (set_config(None, "guidance_scale", -1.0), "has -1.0 for guidance_scale"),
        (set_config(None, "guidance_scale", float("nan")), "has nan for guidance_scale"),
        (set_config(None, "guidance_scale", 4), "no usable config"),
        (set_config(None, "family", "\x1b[2J"), "contradicts its tensors"),
        (set_config("text_encoder", "activation", "relu\x1b"), r"has relu\\x1b for activation"),
        (set_config("text_encoder", "pad_token", 0), "contradicts its tensors"),
        (set_config("unet", "groups", 16), "contradicts its tensors"),
        (lambda metadata, _: metadata.update(config="[" * 100_000), "it is not JSON"),
        (lambda metadata, _: metadata.update(weights="both\x1b[2J"), r"its weights are 'both\\x1b\[2J'"),
        (set_config("text_encoder", "layers", 3), "lacks 16 of the"),
        (set_config("text_encoder", "heads", 3), "they must divide it"),
        (set_config("vae", "latent_scale", 0.0), "has 0.0 for latent_scale"),
        (set_config("vae", "latent_scale", float("nan")), "has nan for latent_scale"),
        (set_config("vae", "latent_scale", 1), "no usable config"),
        (set_config("unet", "colour", 1), "no usable config"),
    ],
)
def test_a_config_that_the_tensors_do_not_bear_out_is_refused(ours, change, message):
    with open_checkpoint(rewritten(ours, change)) as file, pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(file)
    assert str(caught.value).isprintable()


def test_what_no_shape_tells_comes_from_the_metadata(ours):
    def change(metadata, config):
        del metadata["config"]
        config |= {"prediction": "v", "native_size": 768}
        config["schedule"]["beta_end"] = 0.02
        config["vae"]["latent_scale"] = 0.13

    with open_checkpoint(rewritten(ours, change)) as file:
        config = read_checkpoint(file).config
    assert config == replace(
        TINY,
        prediction="v",
        native_size=768,
        schedule=replace(TINY.schedule, beta_end=0.02),
        vae=replace(TINY.vae, latent_scale=0.13),
    )


def test_the_other_weights_are_not_in_a_file_of_ours(ours):
    with pytest.raises(WeightMismatchError, match="holds the model weights, not the ema ones"):
        sd.load(ours, weights="ema")
