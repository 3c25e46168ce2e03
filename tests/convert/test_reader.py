"""Opening a file: its kind, weights bit for bit as torch saved them, damage, and the contract of CheckpointFile."""

import collections
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import (
    FOUR_FLOATS,
    Payload,
    Record,
    call,
    checkpoint,
    checkpoint_records,
    dict_of,
    name,
    pickled,
    pretended,
    read_all,
    refused,
    storage,
    tensor,
    text,
    touch,
    write_zip,
)

import convert.files.reader
from convert.errors import (
    CheckpointError,
    CorruptFileError,
    UnsafeFileError,
    UnsupportedFileError,
    WeightMismatchError,
    named,
    shown,
)
from convert.files.reader import checksums_ahead, open_checkpoint
from convert.files.records import DTYPE_WIDTHS, GlobalName, Inert, StorageRecord, TensorRecord


def rebuilt(file, record: TensorRecord) -> torch.Tensor:
    """The tensor that a record describes, by torch's own rules for strides and offsets."""
    dtype, width = getattr(torch, record.dtype), DTYPE_WIDTHS[record.dtype]
    raw = bytearray(file.storage_bytes(record))
    if record.storage.byteorder != sys.byteorder:
        raw = b"".join(bytes(raw[start : start + width][::-1]) for start in range(0, len(raw), width))
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if len(raw) else torch.empty(0, dtype=dtype)
    return flat.as_strided(record.shape, record.stride, record.offset)


def bits(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(file, record: TensorRecord, expected: torch.Tensor) -> None:
    assert record.dtype == str(expected.dtype).removeprefix("torch.")
    assert record.shape == tuple(expected.shape)
    assert record.stride == tuple(expected.stride())
    assert record.numel == expected.numel()
    assert record.nbytes == expected.numel() * expected.element_size()
    assert record.is_contiguous == expected.is_contiguous()
    file.verify(record)
    assert bits(rebuilt(file, record)) == bits(expected)


def saved(tmp_path: Path, value: object, **options) -> Path:
    path = tmp_path / "model.ckpt"
    torch.save(value, path, **options)
    return path


def odd_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    picture = torch.randn(2, 3, 4, 5)
    return {
        "base": base,
        "same storage": base,
        "window": base[2:5, 3:7],
        "row": base[4],
        "transposed": base.T,
        "strided": base[::2, ::3],
        "channels last": picture.to(memory_format=torch.channels_last),
        "permuted": picture.permute(3, 1, 0, 2),
        "expanded": torch.randn(3, 1).expand(3, 1000),
        "size 1 with any stride": torch.randn(4, 4)[:1].as_strided((1, 4), (777, 1)),
        "0-d": torch.tensor(3.25),
        "0-d window": base[3, 3],
        "empty": torch.empty(0),
        "empty matrix": torch.empty(0, 5),
        "empty window": base[2:2],
        "empty behind nothing": torch.empty(0, 5)[:, 3:],
        "empty in the middle": torch.empty(3, 0, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "needs grad": torch.randn(3).requires_grad_(),
        "nan and infinity": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }


DTYPES = [name for name in DTYPE_WIDTHS if hasattr(torch, name)]


CONTAINERS = {"torch zip": {}, "torch stream": {"_use_new_zipfile_serialization": False}}  # options of torch.save


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("container", CONTAINERS)
def test_odd_but_genuine_tensors_are_read_bit_for_bit(tmp_path, container, protocol):
    tensors = odd_tensors()
    with open_checkpoint(saved(tmp_path, tensors, pickle_protocol=protocol, **CONTAINERS[container])) as file:
        assert file.container == container
        assert (file.metadata, file.foreign) == ({}, ())
        assert file.root.keys() == tensors.keys()
        assert file.root["base"].storage == file.root["transposed"].storage == file.root["row"].storage
        for name, expected in tensors.items():
            assert_same(file, file.root[name], expected)


def test_two_dtypes_may_look_at_one_untyped_storage(tmp_path):
    raw = torch.arange(16, dtype=torch.uint8)
    tensors = {"a": raw.view(torch.float8_e4m3fn), "b": raw.view(torch.uint16)}
    with open_checkpoint(saved(tmp_path, tensors)) as file:
        assert file.root["a"].storage == file.root["b"].storage
        for key, expected in tensors.items():
            assert_same(file, file.root[key], expected)


@pytest.mark.parametrize("options", CONTAINERS.values(), ids=CONTAINERS)
def test_a_training_checkpoint_is_read_whole(tmp_path, options):
    class ModelCheckpoint:
        pass

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(network.parameters())
    with torch.enable_grad():
        network[2](torch.randn(1, 4)).sum().backward()
    optimizer.step()
    weights = network.state_dict()
    assert weights._metadata
    callback = "pytorch_lightning.callbacks.model_checkpoint"
    with pretended(callback, ModelCheckpoint):
        value = {
            "epoch": 3,
            "global_step": 470000,
            "state_dict": weights,
            "callbacks": {ModelCheckpoint: {"best_model_score": np.float32(0.5), "current": torch.tensor(2.0)}},
            "optimizer_states": [optimizer.state_dict()],
        }
        path = saved(tmp_path, value, **options)
    with open_checkpoint(path) as file:
        assert file.root["global_step"] == 470000
        assert type(file.root["state_dict"]) is dict
        assert list(file.root["state_dict"]) == list(weights)
        for name, expected in weights.items():
            assert_same(file, file.root["state_dict"][name], expected)
        states = file.root["optimizer_states"][0]["state"]
        for index, state in optimizer.state_dict()["state"].items():
            assert_same(file, states[index]["exp_avg"], state["exp_avg"])
        scores = file.root["callbacks"][GlobalName(callback, "ModelCheckpoint")]
        assert scores["best_model_score"] == 0.5
        assert_same(file, scores["current"], torch.tensor(2.0))
        assert f"{callback}.ModelCheckpoint" in file.foreign


def test_the_vectors_of_a_textual_inversion_lie_in_the_state_of_its_placeholder(tmp_path):
    vectors = torch.randn(2, 768)
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    with open_checkpoint(saved(tmp_path, {"string_to_param": parameters, "name": "cat"})) as file:
        placeholder = file.root["string_to_param"]
        assert str(placeholder.name) == "torch.nn.modules.container.ParameterDict"
        assert_same(file, placeholder.state["_parameters"]["*"], vectors)


def test_values_beside_weights_are_plain_or_placeholders(tmp_path):
    value = {"size": torch.Size([1, 2]), "device": torch.device("cuda:0"), "dtype": torch.float16, "x": torch.ones(1)}
    with open_checkpoint(saved(tmp_path, value | {"bytes": torch.ones(2).untyped_storage()})) as file:
        assert type(file.root["size"]) is Inert
        assert type(file.root["device"]) is Inert
        assert file.root["dtype"] == GlobalName("torch", "float16")
        assert type(file.root["bytes"]) is StorageRecord
        assert file.foreign == ("torch.Size", "torch.device")


def test_storages_tagged_for_a_gpu_are_read(tmp_path):
    data = checkpoint(pickled(dict_of(weight=tensor(storage(location="cuda:3")))))
    (tmp_path / "model.ckpt").write_bytes(data)
    with open_checkpoint(tmp_path / "model.ckpt") as file:
        assert_same(file, file.root["weight"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, odd_tensors())
    finally:
        torch.serialization.set_crc32_options(True)
    with open_checkpoint(path) as file:
        assert file.root["base"].storage.crc is None
        for name, expected in odd_tensors().items():
            assert_same(file, file.root[name], expected)


def repacked(path: Path, method: int, drop: tuple[str, ...] = ()) -> None:
    """Write the records of a torch zip again with another program, without some of them; it adds folders."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        folder = records[0][0].partition("/")[0]
        for name in (f"{folder}/", f"{folder}/data/"):
            archive.writestr(zipfile.ZipInfo(name), b"")
        for name, data in records:
            if name.partition("/")[2] not in drop:
                archive.writestr(name, data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_files_of_the_oldest_zip_writer_and_repacked_ones_are_read(tmp_path, method):
    path = saved(tmp_path, odd_tensors())
    newer = ("byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")
    repacked(path, method, drop=newer)
    with open_checkpoint(path) as file:
        assert (file.root["base"].storage.deflated is None) == (method == zipfile.ZIP_STORED)
        for name, expected in odd_tensors().items():
            assert_same(file, file.root[name], expected)


def test_a_file_in_the_layout_of_sd_v1_opens_within_150_ms(tmp_path):
    name = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"  # a storage each
    weights = collections.OrderedDict((name.format(index), torch.zeros(2, 2)) for index in range(1145))
    path = saved(tmp_path, {"global_step": 1, "state_dict": weights})
    spent = []
    for _ in range(5):
        start = time.process_time()
        open_checkpoint(path).close()
        spent.append(time.process_time() - start)
    assert min(spent) < 0.15


# The contract of CheckpointFile


def test_bytes_can_be_changed_without_changing_the_file(tmp_path):
    path = saved(tmp_path, {"weight": torch.ones(4)})
    before = path.read_bytes()
    with open_checkpoint(path) as file:
        data = file.storage_bytes(file.root["weight"])
        assert not data.readonly
        data[0] = 7
        assert file.storage_bytes(file.root["weight"])[0] == 7
        del data
    assert path.read_bytes() == before


@pytest.mark.parametrize("options", CONTAINERS.values(), ids=CONTAINERS)
def test_stored_bytes_are_the_mapping_itself(tmp_path, options):
    with open_checkpoint(saved(tmp_path, {"weight": torch.ones(1000)}, **options)) as file:
        assert file.storage_bytes(file.root["weight"]).obj is file._mapping


def test_a_storage_is_verified_once_even_from_several_threads(tmp_path, monkeypatch):
    path = saved(tmp_path, {str(index): torch.full((1000,), float(index)) for index in range(8)})
    counted = []
    real = zlib.crc32

    def crc32(data):
        counted.append(len(data))
        time.sleep(0.005)
        return real(data)

    with open_checkpoint(path) as file:
        monkeypatch.setattr(convert.files.reader.zlib, "crc32", crc32)
        work = [threading.Thread(target=lambda: [*map(file.verify, file.root.values())]) for _ in range(4)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    assert counted == [4000] * 8


def test_checksums_are_checked_ahead_and_not_again(tmp_path, monkeypatch):
    path = saved(tmp_path, {str(index): torch.full((1000 * (index + 1),), float(index)) for index in range(8)})
    counted, all_of_them = [], threading.Event()
    real = zlib.crc32

    def crc32(data):
        counted.append(len(data))
        if len(counted) == 8:
            all_of_them.set()
        return real(data)

    with open_checkpoint(path) as file:
        monkeypatch.setattr(convert.files.reader.zlib, "crc32", crc32)
        with checksums_ahead(file, file.root.values()):
            assert all_of_them.wait(timeout=60)
        assert counted == [4000 * (index + 1) for index in reversed(range(8))]
        for record in file.root.values():
            file.verify(record)
        assert len(counted) == 8
        assert bytes(file.storage_bytes(file.root["7"])[:4]) == struct.pack("<f", 7)


def test_checking_ahead_ends_with_what_was_done_meanwhile(tmp_path, monkeypatch):
    path = saved(tmp_path, {str(index): torch.full((1000,), float(index)) for index in range(1000)})
    began, counted = threading.Event(), []

    def crc32(data):
        counted.append(len(data))
        began.set()
        time.sleep(0.005)
        return 0

    with open_checkpoint(path) as file:
        monkeypatch.setattr(convert.files.reader.zlib, "crc32", crc32)
        with checksums_ahead(file, file.root.values()):
            assert began.wait(timeout=60)
        after = len(counted)
        time.sleep(0.05)
        assert len(counted) == after < 1000


def half_damaged(folder, numbers):
    """A file with 100 good numbers, and so many of which one is not what was written."""
    path = saved(folder, {"good": torch.ones(100), "bad": torch.full((numbers,), 2.0)})
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<4f", 2, 2, 2, 2)) + 200] ^= 1
    path.write_bytes(content)
    return path


def test_a_damaged_weight_is_told_where_it_is_used_also_when_it_was_found_ahead(tmp_path):
    with open_checkpoint(half_damaged(tmp_path, 2000)) as file:
        with checksums_ahead(file, file.root.values()):
            while file.root["good"].storage.offset not in file._verified:  # the smaller one, so the last
                time.sleep(0.001)
        with pytest.raises(CorruptFileError, match=r"is damaged at byte \d+: wrong checksum in its record data/1"):
            file.verify(file.root["bad"])


def test_a_damaged_weight_is_found_when_it_is_verified_not_when_the_file_is_opened(tmp_path):
    with open_checkpoint(half_damaged(tmp_path, 100)) as file:
        file.verify(file.root["good"])
        for _ in range(2):
            with pytest.raises(CorruptFileError, match=r"is damaged at byte \d+: wrong checksum in its record data/1"):
                file.verify(file.root["bad"])


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="memory is counted by Linux")
def test_released_weights_give_their_memory_back_and_can_be_read_again(tmp_path):
    def resident() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Rss:")).split()[1]) * 1024

    with open_checkpoint(
        saved(tmp_path, {"before": torch.ones(3), "big": torch.ones(1 << 24), "after": torch.ones(3)})
    ) as file:
        before = resident()
        file.verify(file.root["big"])
        used = resident()
        file.release(file.root["big"])
        assert used - before > 60 << 20
        assert resident() - before < 8 << 20
        assert bytes(file.storage_bytes(file.root["big"])[-4:]) == struct.pack("<f", 1)
        assert bytes(file.storage_bytes(file.root["after"])) == struct.pack("<3f", 1, 1, 1)
        file.release(file.root["after"])


def test_inflated_storages_are_kept_until_they_are_released(tmp_path):
    path = saved(tmp_path, {"weight": torch.ones(1000)})
    repacked(path, zipfile.ZIP_DEFLATED)
    with open_checkpoint(path) as file:
        record = file.root["weight"]
        first = file.storage_bytes(record)
        assert not first.readonly
        assert first.obj is file.storage_bytes(record).obj
        file.release(record)
        again = file.storage_bytes(record)
        assert again.obj is not first.obj
        assert again == first


def test_closing_is_safe_while_bytes_are_in_use(tmp_path):
    file = open_checkpoint(saved(tmp_path, {"weight": torch.ones(4)}))
    data = file.storage_bytes(file.root["weight"])
    held = torch.frombuffer(data, dtype=torch.float32)
    file.close()
    file.close()
    assert held.tolist() == [1, 1, 1, 1]


def test_a_closed_file_lets_go_of_the_mapping(tmp_path):
    file = open_checkpoint(saved(tmp_path, {"weight": torch.ones(4)}))
    file.close()
    with pytest.raises(ValueError, match="released"):
        file.storage_bytes(file.root["weight"])


def test_path_and_size_are_those_of_the_file(tmp_path):
    path = saved(tmp_path, {"weight": torch.ones(4)})
    with open_checkpoint(str(path)) as file:
        assert file.path == path
        assert file.size == path.stat().st_size


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [((2, 3), (3, 1), True), ((2, 3), (1, 2), False), ((1, 3), (99, 1), True), ((), (), True), ((0, 3), (7, 9), True),
     ((2, 2), (0, 1), False), ((4,), (2,), False)],
)  # fmt: skip
def test_contiguous_means_row_major_without_gaps(shape, stride, expected):
    record = TensorRecord("float32", shape, stride, StorageRecord("0", 0, 1000, "little", None), 0)
    assert record.is_contiguous == expected
    if expected and 0 not in shape:
        assert torch.empty(1000).as_strided(shape, stride).is_contiguous()


# The kind of a file


def archive_of(writer) -> bytes:
    out = io.BytesIO()
    writer(out)
    return out.getvalue()


def tar(*names: str) -> bytes:
    def write(out):
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(name))

    return archive_of(write)


def a_zip(*names: str) -> bytes:
    return write_zip([Record(name, b"content") for name in names])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4265380512\n"
MODEL = checkpoint(pickled(dict_of(weight=tensor())))
LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"\x80\x02M\xe9\x03.\x80\x02}."
KINDS = {
    "LFS pointer": (POINTER, UnsupportedFileError, ["Git LFS pointer", f"{len(POINTER)} bytes", "4.27 GB"]),
    "HTML": (b"\n<!DOCTYPE html><html>Not found</html>", UnsupportedFileError, ["web page (HTML)", "Download"]),
    "HTML of a large page": (b"<html>" + "\u00e9".encode() * 5000, UnsupportedFileError, ["web page (HTML)"]),
    "JSON": (b'{"error":"Repository not found"}', UnsupportedFileError, ["JSON", "Repository not found", "Download"]),
    "text": (b"Access to model is restricted.\n", UnsupportedFileError, ["text", "Access to model", "Download"]),
    "zeros": (bytes(100_000), UnsupportedFileError, ["zero bytes", "Download the file itself"]),
    "one zero": (b"\0", UnsupportedFileError, ["zero bytes"]),
    "empty": (b"", UnsupportedFileError, ["empty (0 bytes)", "Download the file itself"]),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(30), UnsupportedFileError, ["7z archive", "Unpack it first"]),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(30), UnsupportedFileError, ["rar archive", "Unpack it first"]),
    "gzip": (gzip.compress(MODEL), UnsupportedFileError, ["gzip", "Unpack it first"]),
    "xz": (lzma.compress(MODEL), UnsupportedFileError, ["xz", "Unpack it first"]),
    "bzip2": (b"BZh91AY&SY" + bytes(30), UnsupportedFileError, ["bzip2", "Unpack it first"]),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(30), UnsupportedFileError, ["zstd", "Unpack it first"]),
    "tar": (tar("model.ckpt"), UnsupportedFileError, ["tar archive", "Unpack it first"]),
    "tar of early torch": (tar("sys_info", "pickle", "tensors", "storages"), UnsupportedFileError, ["tar", "2016"]),
    "npz": (archive_of(lambda out: np.savez(out, a=np.ones(3))), UnsupportedFileError, ["NumPy archive (npz)"]),
    "npy": (archive_of(lambda out: np.save(out, np.ones(3))), UnsupportedFileError, ["NumPy array (npy)"]),
    "npy of objects": (b"\x93NUMPY\x01\x00v\x00{'descr': '|O'", UnsupportedFileError, ["NumPy array (npy)"]),
    "gguf": (b"GGUF\3\0\0\0" + bytes(30), UnsupportedFileError, ["GGUF"]),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(30), UnsupportedFileError, ["HDF5"]),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(30), UnsupportedFileError, ["picture (PNG)"]),
    "JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF", UnsupportedFileError, ["picture (JPEG)"]),
    "GIF": (b"GIF89a" + bytes(30), UnsupportedFileError, ["picture (GIF)"]),
    "WebP": (b"RIFF\x24\0\0\0WEBPVP8 ", UnsupportedFileError, ["picture (WebP)"]),
    "PDF": (b"%PDF-1.7\n", UnsupportedFileError, ["PDF"]),
    "program": (b"\x7fELF\2\1\1" + bytes(30), UnsupportedFileError, ["program (ELF)"]),
    "Windows program": (b"MZ\x90\0" + bytes(60), UnsupportedFileError, ["program (Windows)"]),
    "noise": (bytes(range(128, 256)) * 4, UnsupportedFileError, ["not a checkpoint of a known kind", "80 81 82"]),
    "legacy stream": (LEGACY, CorruptFileError, ["does not say which version"]),
    "empty zip": (write_zip([]), UnsupportedFileError, ["empty zip archive"]),
    "zip of a model": (a_zip("folder/model.ckpt"), UnsupportedFileError, ["zip with model files", "unpack it"]),
    "zip of something": (a_zip("word/document.xml"), UnsupportedFileError, ["no checkpoint", "word/document.xml"]),
    "TorchScript": (
        write_zip([*checkpoint_records(pickled(b"}"), {}), Record("archive/code/__torch__.py", b"import os")]),
        UnsafeFileError,
        ["TorchScript", "program", "state_dict"],
    ),
    "TorchScript constants": (
        write_zip([*checkpoint_records(pickled(b"}"), {}), Record("archive/constants.pkl", b"x")]),
        UnsafeFileError,
        ["TorchScript", "program", "state_dict"],
    ),
    "bare pickle": (pickle.dumps({"weight": [1.0]}), UnsupportedFileError, ["bare pickle"]),
    "bare pickle that calls": (pickled(call("pkg", "run", text("x"))), UnsafeFileError, ['would call pkg.run("x")']),
    "bare pickle behind another": (b"\x80\2}." + pickled(name("os", "system")), UnsafeFileError, ["behind its end"]),
    "old pickle": (pickle.dumps(range(3), 0), UnsupportedFileError, ["bare pickle without any weights"]),
    "old pickle that calls": (b"cos\nsystem\n(S'id'\ntR", UnsafeFileError, ["os.system"]),
    "old pickle that makes": (b"(S'id'\nios\nsystem\n.", UnsafeFileError, ["os.system"]),
    "settings": (b'{"_class_name": "UNet2DConditionModel"}', UnsupportedFileError, ["settings", "Give the folder"]),
    "names of pets": (b"cats\ndogs\n", UnsupportedFileError, ["is text"]),
    "bare pickle with storages": (pickled(dict_of(weight=tensor())), UnsupportedFileError, ["storage 0"]),
    "cut zip": (MODEL[: len(MODEL) // 2], CorruptFileError, ["incomplete", "download it again"]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_files_are_recognised(tmp_path, kind, suffix):
    content, error, parts = KINDS[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    refused(path, error, f"model{suffix} ", *parts)


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_recognised_under_the_name_safetensors(tmp_path, kind):
    path = tmp_path / "model.SafeTensors"
    path.write_bytes(KINDS[kind][0])
    with pytest.raises((UnsupportedFileError, CorruptFileError, UnsafeFileError)):
        open_checkpoint(path)


def test_a_checkpoint_named_safetensors_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(MODEL)
    refused(path, UnsupportedFileError, "is named .safetensors", "zip archive")


def test_safetensors_are_read_under_any_name(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path = tmp_path / "model.ckpt"
    path.write_bytes(struct.pack("<Q", len(header)) + header + FOUR_FLOATS)
    with open_checkpoint(path) as file:
        assert file.container == "safetensors"
        assert bytes(file.storage_bytes(file.root["a"])) == FOUR_FLOATS


def test_folders_and_missing_files_are_said_to_be_that(tmp_path):
    refused(tmp_path, UnsupportedFileError, "is a folder")
    refused(tmp_path / "nothing.ckpt", UnsupportedFileError, "nothing.ckpt does not exist")
    refused(tmp_path / "nul\0.ckpt", UnsupportedFileError, "cannot be opened")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    refused(tmp_path / "pipe.ckpt", UnsupportedFileError, "is a pipe or a device")


def test_a_bare_pickle_of_many_gigabytes_costs_no_more_than_a_small_one(tmp_path):
    path = tmp_path / "model.ckpt"
    with open(path, "wb") as out:
        out.write(b"\x80\x02]")
        out.truncate(8 << 30)  # a hole
    start = time.process_time()
    refused(path, UnsafeFileError, "opcode 0x00 at byte 3")
    assert time.process_time() - start < 2


def test_a_hostile_file_name_is_escaped(tmp_path):
    path = tmp_path / "a\x1b[31m\u202eb\udc80.ckpt"
    path.write_bytes(b"text")
    refused(path, UnsupportedFileError, r"a\x1b[31m\u202eb\udc80.ckpt is text")


# Code in other containers


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "container", ["bare", "zip", "deflated zip", "legacy stream", "TorchScript", "safetensors", "tail"]
)
def test_code_never_runs_in_any_container_or_protocol(tmp_path, container, protocol):
    marker = tmp_path / "marker"
    bomb = pickle.dumps(touch(marker), protocol)
    path = tmp_path / ("model.safetensors" if container == "safetensors" else "model.ckpt")
    records = checkpoint_records(bomb, {})
    content = {
        "bare": bomb,
        "zip": write_zip(records),
        "deflated zip": write_zip([Record(record.name, record.data, method=8) for record in records]),
        "legacy stream": LEGACY + bomb,
        "TorchScript": write_zip([*records, Record("archive/code/a.py", b"")]),
        "safetensors": bomb,
        "tail": checkpoint(pickled(dict_of(weight=tensor()))) + bomb,
    }[container]
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert not marker.exists()
    if container == "bare":
        assert isinstance(caught.value, UnsafeFileError)
        assert f"{os.system.__module__}.system" in str(caught.value)
        assert "Nothing in it was run" in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("position", ["value", "key", "list", "before", "parameter"])
def test_code_beside_real_weights_is_refused(tmp_path, protocol, position):
    class Weight(torch.Tensor):
        def __reduce_ex__(self, protocol):
            return touch(tmp_path / "marker").__reduce__()

    bomb = touch(tmp_path / "marker")
    weights = {"a": torch.ones(2), "b": torch.zeros(3)}
    value = {
        "value": weights | {"c": bomb},
        "key": weights | {("k", 1): bomb},
        "list": [weights, [bomb]],
        "before": {"c": bomb} | weights,
        "parameter": weights | {"c": torch.ones(2).as_subclass(Weight)},
    }[position]
    refused(saved(tmp_path, value, pickle_protocol=protocol), UnsafeFileError, f"{os.system.__module__}.system")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("make", [
    lambda: torch.sparse_coo_tensor([[0]], [1.0], (2,)),
    lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    lambda: torch.empty(3, device="meta"),
    lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    lambda: torch.tensor([1 + 2j]).conj(),
    lambda: torch.nn.utils.rnn.pack_sequence([torch.ones(2)]),
], ids=["sparse", "quantised", "meta", "nested", "conjugated", "packed"])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_layouts_stay_unread_and_are_no_weights(tmp_path, make):
    with open_checkpoint(saved(tmp_path, {"weight": make(), "plain": torch.ones(2)})) as file:
        assert type(file.root["weight"]) is Inert
        assert_same(file, file.root["plain"], torch.ones(2))


@pytest.mark.filterwarnings("ignore")
def test_a_traced_program_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    refused(path, UnsafeFileError, "TorchScript", "program", "state_dict")


# Errors


def test_errors_are_value_errors_of_four_kinds():
    for kind in (UnsafeFileError, CorruptFileError, UnsupportedFileError, WeightMismatchError):
        assert issubclass(kind, CheckpointError)
        assert issubclass(kind, ValueError)


def test_names_are_kept_when_the_file_s_name_is_added():
    error = named(UnsafeFileError("names code: os.system", ("os.system",)), "m.ckpt")
    assert error.names == ("os.system",)
    assert str(error).startswith("m.ckpt names code: os.system.\nNothing in it was run.")


CONTROLS = [*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
INVISIBLE = [0x061C, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0xD800, 0xDFFF, 0xFEFF, 0xE0001]


def test_an_error_raised_while_a_file_is_in_use_gets_its_name_once(tmp_path):
    path = saved(tmp_path, {"weight": torch.ones(4)})
    with pytest.raises(WeightMismatchError) as caught, open_checkpoint(path):
        raise WeightMismatchError("lacks the tensor betas.")
    assert str(caught.value) == "model.ckpt lacks the tensor betas."
    path.write_bytes(path.read_bytes().replace(torch.ones(4).numpy().tobytes(), bytes(16)))
    with pytest.raises(CorruptFileError) as caught, open_checkpoint(path) as file:
        file.verify(file.root["weight"])
    assert str(caught.value).count("model.ckpt") == 1


@pytest.mark.parametrize("code", CONTROLS + INVISIBLE)
def test_characters_that_control_a_terminal_are_escaped(code):
    assert shown(f"a{chr(code)}b").isascii()
    assert shown(f"a{chr(code)}b").isprintable()
    assert len(shown(f"a{chr(code)}b")) > 3


def test_shown_text_is_capped():
    assert shown("h\u00e9llo w\u00f6rld \U0001f600") == "h\u00e9llo w\u00f6rld \U0001f600"
    assert shown("a" * 201) == "a" * 200 + "... (201 characters)"
    assert shown("\u202e" * 34) == r"\u202e" * 33 + "... (34 characters)"  # 6 each: escapes count as they are shown
    assert len(shown("\U000e0001" * 10**6)) < 230


# Damage


@pytest.fixture
def small(tmp_path):
    """A file, its bytes, and what is in it."""
    path = saved(tmp_path, {"alpha": torch.tensor([1.0, 2.0]), "beta": torch.tensor([[3, 4]], dtype=torch.int16)})
    return path, path.read_bytes(), contents_of(path)


def contents_of(path: Path) -> dict[str, tuple]:
    """Every tensor of a file, verified."""
    file = read_all(path)
    return {
        name: (record.dtype, record.shape, record.stride, record.offset, bytes(file.storage_bytes(record)))
        for name, record in file.root.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("bits_of_each", [1, 8])
def test_a_single_flipped_bit_is_refused_or_changes_nothing(small, bits_of_each):
    path, whole, expected = small
    tried = harmless = 0
    for position in range(len(whole)):
        if whole[position : position + 8] == b"ZZZZZZZZ":
            continue  # torch's padding
        for bit in range(8) if bits_of_each == 8 else [position % 8]:
            tried += 1
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with suppress(CheckpointError):
                assert contents_of(path) == expected, (position, bit)
                harmless += 1
    assert harmless < tried / 2  # versions, dates and attributes in the zip's headers


@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 8, 64])
def test_zeroed_ranges_are_refused_or_change_nothing(small, length):
    path, whole, expected = small
    starts = range(0, len(whole) - length, length)
    harmless = 0
    for start in starts:
        path.write_bytes(whole[:start] + bytes(length) + whole[start + length :])
        with suppress(CheckpointError):
            assert contents_of(path) == expected
            harmless += 1
    assert len(starts) - harmless > len(whole) // length // 4


def test_bytes_added_anywhere_are_damage_or_change_nothing(small):
    path, whole, expected = small
    accepted = set()
    for position in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:position] + b"\0" + whole[position:])
        with suppress(CorruptFileError, UnsupportedFileError):
            assert contents_of(path) == expected
            accepted.add(position)
    assert accepted <= {len(whole), len(whole) - 1}  # before a 0 that is the last byte


def test_payloads_in_the_extra_field_or_name_of_a_record_stay_there(tmp_path):
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Payload(os.system, f"touch '{marker}'"), 2)
    extra = struct.pack("<2H", 0x4246, len(bomb)) + bomb
    records = checkpoint_records(pickled(dict_of(weight=tensor())))
    records[2] = Record("archive/data/0", FOUR_FLOATS, local_extra=extra, central_extra=extra)
    (tmp_path / "model.ckpt").write_bytes(write_zip(records))
    with open_checkpoint(tmp_path / "model.ckpt") as file:
        assert bytes(file.storage_bytes(file.root["weight"])) == FOUR_FLOATS
    assert not marker.exists()
