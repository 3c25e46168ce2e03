"""Torch tensors over the bytes of a mapped file."""

import os

import torch
from torch import Tensor

from convert.errors import CorruptFileError, WeightMismatchError, counted, named, shown_list
from convert.files.reader import SHORTER, CheckpointFile
from convert.files.records import DTYPE_WIDTHS, TensorRecord


def as_tensor(file: CheckpointFile, record: TensorRecord) -> Tensor:
    """The tensor, over the file's own bytes where they can be used as they lie, else over a copy.

    Changing it never changes the file. The bytes are not checked here: see `CheckpointFile.verify`.
    """
    dtype = getattr(torch, record.dtype)
    if record.numel == 0:
        return torch.empty(record.shape, dtype=dtype)
    width = DTYPE_WIDTHS[record.dtype]
    data = torch.frombuffer(file.storage_bytes(record), dtype=torch.uint8)
    data = data[: len(data) // width * width]
    if record.storage.byteorder == "big" and width > 1:
        number = width // 2 if dtype.is_complex else width  # a complex one is two, in the same order everywhere
        data = data.unflatten(0, (-1, number)).flip(1).flatten()
    elif data.data_ptr() % width:
        data = data.clone()  # old safetensors files do not align their tensors
    return data.view(dtype).as_strided(record.shape, record.stride, record.offset)


def read_tensor(file: CheckpointFile, record: TensorRecord) -> Tensor:
    """The tensor as it is on the disk, whatever was written to the bytes in memory; like `as_tensor` in other respects.

    Tensors that are deflated, or not stored row by row, are read from memory.
    """
    span = file.span(record)
    if span is None or record.numel == 0 or not hasattr(os, "preadv"):
        return as_tensor(file, record)
    file.check_length()
    tensor = torch.empty(record.shape, dtype=getattr(torch, record.dtype), device="cpu")
    rest, offset = raw_bytes(tensor), span.offset
    while len(rest):
        done = os.preadv(span.descriptor, [rest], offset)
        if not done:
            raise named(CorruptFileError(SHORTER), file.called)
        rest, offset = rest[done:], offset + done
    return tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def in_range(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values of a floating-point tensor are finite and stay so in another precision."""
    if tensor.numel() == 0:
        return True
    widened = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # aminmax does not know float8
    least, largest = (value.item() for value in widened.aminmax())
    limit = torch.finfo(dtype).max
    return -limit <= least and largest <= limit  # False with NaN, too


def out_of_range(names: list[str], precision: str) -> WeightMismatchError:
    """The error for weights that are not `in_range`."""
    advice = "It is damaged" if precision == "fp32" else "It is damaged, or needs --precision fp32"
    return WeightMismatchError(
        f"holds values that are NaN, infinite or beyond {precision} in {counted(len(names), 'weight')}: "
        f"{shown_list(names)}. {advice}."
    )
