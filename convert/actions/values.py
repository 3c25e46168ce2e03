"""Find NaN, infinity and other faults in the numbers of a file. Needs numpy, not torch."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from convert.actions.tensor_set import by_storage
from convert.errors import CheckpointError
from convert.files.arrays import decoded, raw_pieces
from convert.files.reader import CheckpointFile
from convert.files.records import TensorRecord


@dataclass(frozen=True, kw_only=True)
class Values:
    """Faults by tensor name, with how many numbers each affects."""

    nan: dict[str, int]
    infinite: dict[str, int]
    zero: tuple[str, ...]  # nothing but zeros
    position_ids: dict[str, int]  # damaged ones: they should count from 0
    damaged: tuple[str, ...]  # of a storage with a wrong checksum


def look_at_values(file: CheckpointFile, tensors: Mapping[str, TensorRecord]) -> Values:
    """Read every number of the tensors, one storage after the other."""
    nan, infinite, zero, position_ids, damaged = {}, {}, [], {}, []
    for group in by_storage(tensors):
        for name, record in group:
            try:
                file.verify(record)
                file.storage_bytes(record)
            except CheckpointError:
                damaged.append(name)
                continue
            counted = _count(file, record, name.endswith("position_ids"))
            for table, number in zip((nan, infinite, position_ids), counted[:3], strict=True):
                if number:
                    table[name] = number
            if counted[3]:
                zero.append(name)
        file.release(record)
    return Values(nan=nan, infinite=infinite, zero=tuple(zero), position_ids=position_ids, damaged=tuple(damaged))


def _count(file: CheckpointFile, record: TensorRecord, counts_up: bool) -> tuple[int, int, int, bool]:
    """How many numbers are NaN, infinite, and not what counting from 0 gives; whether all are 0."""
    nan = infinite = wrong = position = 0
    zero = record.numel > 0
    for raw in raw_pieces(file, record):
        values = decoded(raw, record.dtype)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            nan += int(np.isnan(values).sum())
            infinite += int(np.isinf(values).sum())
        if counts_up and record.shape:
            places = np.arange(position, position + len(values)) % record.shape[-1]
            wrong += int((values != places).sum())
        position += len(values)
        zero = zero and not values.any()
    return nan, infinite, wrong, zero
