"""From a tensor's description to its numbers: each dtype, byte order and place in the file, bit for bit."""

import io
import json
import math
import struct

import numpy as np
import pytest
import torch
from hostile import as_big_endian
from test_reader import DTYPES, bits

from convert.files.arrays import raw_pieces
from convert.files.reader import open_checkpoint
from convert.files.records import DTYPE_WIDTHS
from convert.files.safetensors_reader import DTYPES as SAFETENSORS_DTYPES
from convert.files.tensors import as_tensor

NAMES = {ours: theirs for theirs, ours in SAFETENSORS_DTYPES.items()}


def numbers(dtype: str, count: int) -> torch.Tensor:
    """Values whose bytes all differ, so that a swapped one shows."""
    width = DTYPE_WIDTHS[dtype]
    raw = torch.arange(count * width, dtype=torch.uint8)
    return (raw % 2 if dtype == "bool" else raw + 1).view(getattr(torch, dtype))


def views(dtype: str) -> dict[str, torch.Tensor]:
    """Windows into one storage of twelve numbers."""
    whole = numbers(dtype, 12)
    square = whole.reshape(3, 4)
    return {
        "whole": whole,
        "window": square[1:, 1:3],
        "transposed": square.T,
        "every other": whole[1::2],
        "repeated": whole[3:4].expand(5),
        "one": square[2, 3],
        "none": square[:0],
    }


def assert_read_exactly(path, tensors):
    with open_checkpoint(path) as file:
        assert file.root.keys() == tensors.keys()
        for name, expected in tensors.items():
            found = as_tensor(file, file.root[name])
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert bits(found) == bits(expected), name
            pieces = [piece.tobytes() for piece in raw_pieces(file, file.root[name])]
            assert b"".join(pieces) == bits(expected), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["little", "big", "stream"])
def test_each_dtype_of_each_byte_order_and_container_is_read_exactly(tmp_path, dtype, order):
    tensors = views(dtype)
    out = io.BytesIO()
    torch.save(tensors, out, _use_new_zipfile_serialization=order != "stream")
    content = out.getvalue()
    if order == "big":
        parts = 2 if dtype.startswith("complex") else 1
        content = as_big_endian(content, lambda key: DTYPE_WIDTHS[dtype] // parts)
    (tmp_path / "model.ckpt").write_bytes(content)
    assert_read_exactly(tmp_path / "model.ckpt", tensors)


def test_a_big_endian_number_by_hand(tmp_path):
    out = io.BytesIO()
    torch.save({"w": torch.tensor([1.0, -2.5])}, out)
    content = as_big_endian(out.getvalue(), lambda key: 4)
    assert struct.pack(">2f", 1.0, -2.5) in content
    (tmp_path / "model.ckpt").write_bytes(content)
    with open_checkpoint(tmp_path / "model.ckpt") as file:
        assert as_tensor(file, file.root["w"]).tolist() == [1.0, -2.5]
        assert [piece.view("<f4").tolist() for piece in raw_pieces(file, file.root["w"])] == [[1.0, -2.5]]


@pytest.mark.parametrize("before", range(8))
def test_safetensors_that_lie_at_any_byte_are_read_exactly(tmp_path, before):
    """Old writers did not align their tensors."""
    tensors = {"before": torch.arange(before, dtype=torch.uint8)}
    tensors |= {dtype: numbers(dtype, 6).reshape(2, 3) for dtype in DTYPES if dtype in NAMES}
    header, data = {}, b""
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        span = [len(data), len(data) + tensor.numel() * DTYPE_WIDTHS[dtype]]
        header[name] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": span}
        data += bits(tensor)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    assert_read_exactly(tmp_path / "x.safetensors", tensors)


def test_what_is_written_to_a_tensor_stays_out_of_the_file(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.ones(8)}, path)
    before = path.read_bytes()
    with open_checkpoint(path) as file:
        tensor = as_tensor(file, file.root["w"])
        tensor[:] = math.pi
        assert np.allclose(tensor.numpy(), math.pi)
    assert path.read_bytes() == before
