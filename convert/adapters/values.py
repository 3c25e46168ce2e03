"""The numbers of an adapter, as tensors."""

import torch
from torch import Tensor

from convert.adapters.adapter import Adapter, Change
from convert.adapters.writing import Values
from convert.errors import WeightMismatchError, counted, shown_list
from convert.files.reader import CheckpointFile
from convert.files.tensors import as_tensor, in_range, raw_bytes


def tensors_of(file: CheckpointFile, change: Change) -> dict[str, Tensor]:
    """What changes one module, by part, over the bytes of the open file."""
    return {part: as_tensor(file, record) for part, record in change.tensors.items()}


def to_write(tensor: Tensor) -> Values:
    """A tensor, for `convert.adapters.writing`."""
    return Values(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), lambda: [raw_bytes(tensor)])


def check_values(file: CheckpointFile, adapter: Adapter) -> None:
    """Raises CorruptFileError for a wrong checksum, WeightMismatchError for values that are NaN or infinite."""
    unusable = []
    for change in adapter.changes:
        for part, record in change.tensors.items():
            file.verify(record)
            if not in_range(as_tensor(file, record), torch.float32):
                unusable.append(adapter.stored_names[change.target, part])
    if unusable:
        raise WeightMismatchError(
            f"holds NaN or infinite values in {counted(len(unusable), 'tensor')}: {shown_list(unusable)}. "
            "It is damaged."
        )
