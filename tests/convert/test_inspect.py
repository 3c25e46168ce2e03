"""What `sd inspect` says of sound, odd, incomplete and hostile files, and that it reads only what it is asked to."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile

import hostile
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from convert.actions.convert import convert
from convert.actions.inspect import inspect
from convert.checkpoint import POSITION_IDS
from convert.errors import CorruptFileError, UnsupportedFileError
from convert.files.arrays import FLOAT8, decoded, raw_pieces, rounded
from convert.files.hashing import old_hash
from convert.files.reader import open_checkpoint

UNET = "model.diffusion_model."
NORM = UNET + "input_blocks.1.0.in_layers.0.weight"


@pytest.fixture(autouse=True)
def _no_hash_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def part(report, name):
    (found,) = [p for p in (*report.components, *report.leftovers) if p.name == name]
    return found


# A complete checkpoint


def test_an_original_checkpoint_is_described(tiny_ckpt, tiny_state):
    report = inspect(tiny_ckpt)
    assert (report.family, report.layout, report.precision) == ("sd-v1", "original", "float32")
    assert (report.global_step, report.epoch) == (470_000, 0)
    assert (report.weights, report.other_weights) == ("model", "ema")
    assert report.ema_decay == pytest.approx(0.9999, abs=1e-7)
    assert report.ema_updates == 470_000
    assert report.bytes == tiny_ckpt.stat().st_size
    assert report.safe
    assert report.foreign == ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)
    assert report.problem is None
    assert (report.sha256, report.tensors_sha256, report.values) == (None, None, None)
    assert report.kind == "Stable Diffusion 1"


def test_every_tensor_is_counted_once_with_its_bytes(tiny_ckpt, tiny_state):
    report = inspect(tiny_ckpt)
    for name, prefix in (("UNet", UNET), ("VAE", "first_stage_model."), ("text encoder", "cond_stage_model.")):
        tensors = [value for key, value in tiny_state.items() if key.startswith(prefix) and key != POSITION_IDS]
        found = part(report, name)
        assert found.tensors == len(tensors)
        assert found.parameters == sum(value.numel() for value in tensors)
        assert found.bytes == 4 * found.parameters
    beside = part(report, "beside the weights")  # the score of a callback
    assert (beside.prefix, beside.tensors, beside.bytes) == ("callbacks", 1, 4)
    everything = sum(p.tensors for p in (*report.components, *report.leftovers))
    assert everything == len(tiny_state) + 1
    assert part(report, "EMA average of the UNet").tensors == 686
    assert part(report, "noise schedule").tensors == 12
    assert part(report, "position ids").dtypes == {"int64": 1}


def test_a_file_of_ours_is_described(tmp_path, tiny_ckpt):
    ours = tmp_path / "ours.safetensors"
    convert(tiny_ckpt, ours, precision="fp16")
    report = inspect(ours)
    assert (report.family, report.layout, report.precision) == ("sd-v1", "sd-zoo", "float16")
    assert report.metadata["source_file"] == "tiny.ckpt"
    assert report.global_step == 470_000
    assert {p.name for p in report.components} == {"UNet", "VAE", "text encoder"}
    assert report.leftovers == ()


def test_averaged_weights_alone_are_the_unet(tmp_path, tiny_state):
    state = {name: value for name, value in tiny_state.items() if not name.startswith(UNET)}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    report = inspect(tmp_path / "x.ckpt")
    assert (report.weights, report.problem) == ("ema", None)
    assert part(report, "UNet (EMA average)").tensors == 686


def test_an_optimizer_is_a_leftover_with_its_bytes_and_a_cycle_does_no_harm(tmp_path, plain):
    moments = {index: {"exp_avg": torch.zeros(10), "exp_avg_sq": torch.zeros(10)} for index in range(3)}
    optimizer = {"state": moments}
    optimizer["self"] = optimizer
    torch.save({"state_dict": plain, "optimizer_states": [optimizer, optimizer]}, tmp_path / "x.ckpt")
    found = part(inspect(tmp_path / "x.ckpt"), "beside the weights")
    assert (found.prefix, found.tensors, found.bytes) == ("optimizer_states", 6, 240)


# Hashes


def test_hashes_are_those_of_the_file(tiny_ckpt):
    data = tiny_ckpt.read_bytes()
    report = inspect(tiny_ckpt, hashed=True)
    assert report.sha256 == hashlib.sha256(data).hexdigest()
    assert report.old_hash == hashlib.sha256(data[1 << 20 : (1 << 20) + (1 << 16)]).hexdigest()[:8]


def test_a_file_that_ends_before_the_part_of_the_old_hash_has_none(tmp_path):
    for size, expected in ((1 << 20, None), ((1 << 20) + 5, hashlib.sha256(b"xxxxx").hexdigest()[:8])):
        (tmp_path / "short").write_bytes(b"x" * size)
        assert old_hash(tmp_path / "short") == expected


def test_a_hash_known_from_before_is_shown_without_reading(tmp_path, plain):
    save_file(plain, tmp_path / "x.safetensors")
    assert inspect(tmp_path / "x.safetensors").sha256 is None
    digest = inspect(tmp_path / "x.safetensors", hashed=True).sha256
    assert inspect(tmp_path / "x.safetensors").sha256 == digest
    os.utime(tmp_path / "x.safetensors", ns=(1, 1))
    assert inspect(tmp_path / "x.safetensors").sha256 is None


def test_a_published_file_is_recognised_by_its_hash(tmp_path, plain, monkeypatch):
    save_file(plain, tmp_path / "renamed.safetensors")
    known = "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"
    monkeypatch.setattr("convert.actions.inspect.file_sha256", lambda path: known)
    assert inspect(tmp_path / "renamed.safetensors", hashed=True).known == "v1-5-pruned-emaonly.safetensors"


@pytest.mark.slow
def test_the_tensors_hash_is_the_same_in_every_container_and_layout(tmp_path, tiny_ckpt, plain):
    ours, back, shuffled = (tmp_path / name for name in ("ours.safetensors", "back.ckpt", "shuffled.safetensors"))
    convert(tiny_ckpt, ours)
    convert(ours, back)
    items = list(plain.items())
    np.random.default_rng(0).shuffle(items)
    save_file(dict(items), shuffled)
    hashes = {inspect(path, tensors_hashed=True).tensors_sha256 for path in (tiny_ckpt, ours, back, shuffled)}
    assert len(hashes) == 1
    changed = plain | {NORM: plain[NORM].clone()}
    changed[NORM][0] = changed[NORM][0].nextafter(torch.tensor(9.0))
    save_file(changed, shuffled)
    assert inspect(shuffled, tensors_hashed=True).tensors_sha256 not in hashes


# Numbers


def test_bad_numbers_are_found_wherever_they_are(tmp_path, plain):
    state = {name: value.clone() for name, value in plain.items()}
    conv = UNET + "input_blocks.0.0.weight"
    state[conv][1, 2, 0, 1] = float("nan")
    state[conv][3, 0, 0, 0] = float("-inf")
    state[NORM] = state[NORM].half()
    state[NORM][-2:] = float("inf")
    state[UNET + "out.2.bias"].zero_()
    state[POSITION_IDS] = state[POSITION_IDS].half()
    state[POSITION_IDS][0, 76] = 75
    state[conv] = state[conv].to(memory_format=torch.channels_last)
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    values = inspect(tmp_path / "x.ckpt", deep=True).values
    assert values.nan == {conv: 1}
    assert values.infinite == {conv: 1, NORM: 2}
    assert values.zero == (UNET + "out.2.bias",)
    assert values.position_ids == {POSITION_IDS: 1}
    assert values.damaged == ()


def test_sound_numbers_raise_no_alarm(tiny_ckpt):
    values = inspect(tiny_ckpt, deep=True).values
    assert (values.nan, values.infinite, values.position_ids, values.damaged) == ({}, {}, {}, ())


def test_a_wrong_checksum_is_named_and_no_hash_is_made_up(tmp_path, plain):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": plain}, path)
    with open_checkpoint(path) as file:
        offset = file.root["state_dict"][NORM].storage.offset
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    report = inspect(path, deep=True)
    assert report.values.damaged == (NORM,)
    assert report.tensors_sha256 is None
    with pytest.raises(CorruptFileError, match="checksum"):
        inspect(path, tensors_hashed=True)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8),
        *(torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    ],
)
def test_numbers_are_read_as_torch_reads_them(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("convert.files.arrays.PIECE", 7)
    values = (torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    window = values.transpose(0, 2)[1:]
    torch.save({"x": values, "y": window}, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as file:
        for name, expected in (("x", values), ("y", window)):
            pieces = [decoded(raw, file.root[name].dtype).copy() for raw in raw_pieces(file, file.root[name])]
            if dtype.is_complex:
                expected = torch.view_as_real(expected)
            wide = expected.double() if dtype.is_floating_point or dtype.is_complex else expected.long()
            assert (np.concatenate(pieces).astype(wide.numpy().dtype) == wide.flatten().numpy()).all()
            assert len(pieces) > 1


@pytest.mark.parametrize("dtype", FLOAT8)
def test_all_256_values_of_8_bit_floats_are_those_of_torch(dtype):
    expected = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype)).float().numpy()
    assert np.array_equal(FLOAT8[dtype], expected, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_rounding_is_that_of_torch(dtype):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(2), dtype=torch.float64).float() * 8
    expected = values.to(getattr(torch, dtype)).double().numpy()
    ours = rounded(values.double().numpy(), dtype)
    error, least = np.abs(values.double().numpy() - ours), np.abs(values.double().numpy() - expected)
    assert (error == least).all()
    assert np.mean(ours == expected) > 0.999  # ties may go either way


# Other kinds of files


def test_a_lora_is_named_with_its_rank_and_modules(tmp_path, call):
    state = {}
    for module in ("lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"):
        state[f"{module}.lora_down.weight"] = torch.zeros(8, 64)
        state[f"{module}.lora_up.weight"] = torch.zeros(64, 8)
        state[f"{module}.alpha"] = torch.tensor(4.0)
    save_file(state, tmp_path / "lora.safetensors")
    report = inspect(tmp_path / "lora.safetensors")
    assert report.kind.startswith("LoRA")
    assert "rank 8" in report.evidence
    assert "1 module of the UNet, 1 module of the text encoder" in report.evidence
    assert report.family is None
    code, out, _ = call("inspect", "lora.safetensors")
    assert code == 0
    assert "LoRA" in out
    assert "adapter      for Stable Diffusion 1: LoRA (2 modules)" in out
    assert "of other widths" in out


def test_a_file_without_a_vae_is_still_described(tmp_path, plain):
    save_file({k: v for k, v in plain.items() if not k.startswith("first_stage")}, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors", deep=True)
    assert report.family is None
    assert "no VAE" in report.problem
    assert part(report, "UNet").tensors == 686
    assert len(report.tensors_sha256) == 64


# Safety


def test_a_hostile_pickle_is_reported_and_nothing_in_it_runs(tmp_path, call):
    marker = tmp_path / "marker"
    torch.save({"state_dict": {"x": torch.zeros(2)}, "y": hostile.touch(marker)}, tmp_path / "evil.ckpt")
    report = inspect(tmp_path / "evil.ckpt")
    assert not report.safe
    assert report.dangerous in (("posix.system",), ("nt.system",))
    code, out, _ = call("inspect", "evil.ckpt")
    assert code == 0
    assert "DANGEROUS" in out
    assert ".system" in out
    code, out, _ = call("inspect", "--scan", "evil.ckpt")
    assert code == 1
    assert ".system" in out
    code, out, _ = call("inspect", "--scan", "--json", "evil.ckpt")
    assert (code, json.loads(out)["safe"]) == (1, False)
    assert call("inspect", "--deep", "evil.ckpt")[0] == 0
    assert not marker.exists()


def test_what_other_programs_would_call_is_no_all_clear(tmp_path, call, plain):
    class ProxyCommand:
        pass

    with hostile.pretended("paramiko.proxy", ProxyCommand):
        torch.save({"state_dict": plain, "x": hostile.Payload(ProxyCommand, "touch x")}, tmp_path / "x.ckpt")
    told = 'paramiko.proxy.ProxyCommand("touch x")'
    code, out, err = call("inspect", "--scan", "x.ckpt")
    assert (code, out, err) == (1, f"x.ckpt is safe to read here; other programs would call {told}.\n", "")
    code, out, _ = call("inspect", "--scan", "--json", "x.ckpt")
    assert (code, json.loads(out)["safe"], json.loads(out)["calls"]) == (1, False, [told])
    code, out, _ = call("inspect", "x.ckpt")
    assert code == 0
    assert f"safe to read here; other programs would call {told}" in out
    assert call("convert", "x.ckpt", "x.safetensors")[0] == 0
    assert call("inspect", "--scan", "x.safetensors")[0] == 0


@pytest.mark.parametrize("flags", [[], ["--scan"], ["--deep"], ["--hash"], ["--json"], ["--keys"]])
@pytest.mark.parametrize(
    ("content", "text"),
    [(b"<html>", "web page"), (b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "LFS"), (b"", "empty")],
)
def test_what_is_no_checkpoint_gets_a_sentence(call, tmp_path, content, text, flags):
    (tmp_path / "x.ckpt").write_bytes(content)
    code, out, err = call("inspect", *flags, "x.ckpt")
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err


def test_no_all_clear_for_what_is_too_damaged_to_tell(call, tmp_path, tiny_ckpt):
    (tmp_path / "cut.ckpt").write_bytes(tiny_ckpt.read_bytes()[:-1000])
    code, out, err = call("inspect", "--scan", "cut.ckpt")
    assert (code, out) == (2, "")
    assert "cut.ckpt" in err
    with pytest.raises(UnsupportedFileError):
        inspect(tmp_path / "missing.ckpt")


@pytest.mark.parametrize("command", [["inspect", "--scan"], ["inspect"], ["convert"]])
def test_a_hole_of_zeros_is_damage_and_no_danger(call, tmp_path, tiny_ckpt, command):
    content = bytearray(tiny_ckpt.read_bytes())
    content[20_000_000:23_000_000] = bytes(3_000_000)
    (tmp_path / "hole.ckpt").write_bytes(content)
    code, out, err = call(*command, "hole.ckpt", *(["x.safetensors"] if command == ["convert"] else []))
    assert (code, out) == (2, "")
    assert "hole.ckpt is damaged at byte 20000000: " in err
    assert "download it again" in err


def test_what_changes_no_weight_is_told(call, tmp_path, tiny_ckpt):
    (tmp_path / "x.ckpt").write_bytes(tiny_ckpt.read_bytes() + b"\n")
    with zipfile.ZipFile(tmp_path / "x.ckpt", "a") as archive:
        archive.writestr("archive/.DS_Store", b"x")
    assert call("inspect", "--scan", "x.ckpt")[0] == 0
    code, out, _ = call("inspect", "x.ckpt")
    assert code == 0
    assert "ignored      the record archive/.DS_Store, which is not used" in out


def test_names_from_the_file_cannot_reach_the_terminal_raw(call, tmp_path):
    torch.save({"\x1b[2Jevil": torch.zeros(2), "\u202egnp.exe": torch.zeros(1)}, tmp_path / "x.pt")
    for flags in ([], ["--deep"], ["--keys"]):
        _, out, _ = call("inspect", *flags, "x.pt")
        assert out.replace("\n", "").isprintable()


# The command


def test_the_page_shows_what_there_is(call, tiny_ckpt):
    code, out, err = call("inspect", tiny_ckpt)
    assert (code, err) == (0, "")
    assert call("inspect", "--scan", tiny_ckpt)[0] == 0
    for text in ("tiny.ckpt", "sd-v1", "8,605,284", "470,000 steps", "ModelCheckpoint", "model_ema.", "--hash"):
        assert text in out
    assert max(map(len, out.splitlines())) < 140


def test_a_file_of_a_thousand_odd_names_has_a_page_all_the_same(call, tmp_path):
    save_file({f"odd{index}.x": torch.zeros(1) for index in range(1000)}, tmp_path / "x.safetensors")
    _, out, _ = call("inspect", "x.safetensors")
    assert len(out.splitlines()) < 40
    assert "and 980 more" in out


def test_keys_lists_every_tensor(call, tiny_ckpt, tiny_state):
    _, out, _ = call("inspect", "--keys", tiny_ckpt)
    for name, value in list(tiny_state.items())[::50]:
        (line,) = [line for line in out.splitlines() if line.split() and line.split()[0] == name]
        assert ("x".join(map(str, value.shape)) or "one number") in line


def test_json_is_one_object_with_the_same_facts(call, tiny_ckpt):
    _, out, _ = call("inspect", "--json", "--keys", tiny_ckpt)
    (line,) = out.splitlines()
    data = json.loads(line)
    assert data["family"] == "sd-v1"
    assert data["components"][0]["parameters"] == 8605284
    assert data["tensors"][NORM] == {"dtype": "float32", "shape": [32]}


def test_inspecting_needs_neither_torch_nor_numpy_nor_the_weights(tmp_path):
    """4 GB of zeros, of which none is stored or read."""
    path = tmp_path / "large.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (4 << 30))
    code = (
        "import sys, time; from sd.app.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'numpy', 'PIL', 'tqdm'} & set(sys.modules); "
        "print('seconds', time.process_time()); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code, "inspect", path], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "4.29 GB" in result.stdout
    assert float(result.stdout.split()[-1]) < 0.5  # of the processor's time: the machine may be busy


@pytest.mark.parametrize("word", ["module.", "_orig_mod."])
def test_words_of_training_frameworks_in_the_names_change_nothing(tmp_path, plain, word):
    paths = tmp_path / "plain.ckpt", tmp_path / "wrapped.ckpt"
    for path, prefix in zip(paths, ("", word), strict=True):
        torch.save({"state_dict": {prefix + name: value for name, value in plain.items()}}, path)
    expected, found = map(inspect, paths)
    assert (found.kind, found.evidence, found.family) == (expected.kind, expected.evidence, expected.family)
    assert (found.components, found.leftovers) == (expected.components, expected.leftovers)
    assert found.kind == "Stable Diffusion 1"
