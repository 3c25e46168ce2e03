"""From a tensor's description to a torch tensor over the bytes of the mapped file."""

import torch
from torch import Tensor

from convert.reader import CheckpointFile
from convert.records import DTYPE_WIDTHS, TensorRecord


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
        data = data.unflatten(0, (-1, width)).flip(1).flatten()
    elif data.data_ptr() % width:
        data = data.clone()  # old safetensors files do not align their tensors
    return data.view(dtype).as_strided(record.shape, record.stride, record.offset)
