"""One hash over the tensors of a file, the same in every container and layout.

Two files have the same hash exactly if they hold the same tensors: names, precisions, shapes and every bit. Order,
container, metadata and other contents do not matter.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby

from convert.checkpoint import Checkpoint
from convert.errors import CheckpointError
from convert.files.reader import CheckpointFile
from convert.files.records import TensorRecord, trimmed
from convert.layouts.names import PREFIXES, ema_name
from convert.layouts.original_layout import networks_in
from convert.layouts.wrapping import all_tensors, unwrap


def tensors_of(root: object) -> dict[str, TensorRecord]:
    """The tensors of a file by name: the weights of a model, from inside their wrapper, else all that there are."""
    try:
        return unwrap(root, networks_in).tensors
    except CheckpointError:
        return all_tensors(root)


def original_weights(checkpoint: Checkpoint) -> dict[str, TensorRecord]:
    """The weights of a model by their original names, whatever layout they are in.

    Where several of ours form one original tensor, they keep our names.
    """
    return {name: checkpoint.tensors[ours] for ours, name in _original_names(checkpoint).items()}


def _original_names(checkpoint: Checkpoint) -> dict[str, str]:
    shared = Counter(original.name for original in checkpoint.names.values())
    originals = {ours: checkpoint.names[ours].name for ours in checkpoint.tensors}
    return {ours: name if shared[name] == 1 else ours for ours, name in originals.items()}


def names_among_everything(checkpoint: Checkpoint) -> dict[str, str]:
    """Our name of each weight -> its name in `everything`."""
    averaged = checkpoint.weights == "ema" and bool(checkpoint.extras)  # then the extras have the plain names
    return {
        ours: ema_name(name) if averaged and name.startswith(PREFIXES["unet"]) else name
        for ours, name in _original_names(checkpoint).items()
    }


def everything(checkpoint: Checkpoint) -> dict[str, TensorRecord]:
    """A model and the tensors beside it, by the names of the original layout."""
    names = names_among_everything(checkpoint)
    return {name: checkpoint.tensors[ours] for ours, name in names.items()} | checkpoint.extras


def tensor_digests(file: CheckpointFile, tensors: Mapping[str, TensorRecord]) -> list[tuple[str, TensorRecord, str]]:
    """Name, description and sha256 of each tensor: row by row, little-endian, whatever its order in the file.

    Reads all of them, one storage after the other. Raises CorruptFileError for a wrong checksum.
    """
    from convert.files.arrays import raw_pieces  # numpy takes a tenth of a second to import: not before it is needed

    entries = []
    for group in by_storage(tensors):
        for name, record in group:
            file.verify(record)
            digest = hashlib.sha256()
            for piece in raw_pieces(file, record):
                digest.update(piece)
            entries.append((name, record, digest.hexdigest()))
        file.release(record)
    return entries


def set_sha256(entries: Iterable[tuple[str, TensorRecord, str]]) -> str:
    """One hash for many tensors: sha256 over the sorted lines of JSON ["name", "dtype", [shape], "sha256"].

    Shapes are `trimmed`.
    """
    lines = [json.dumps([name, record.dtype, trimmed(record.shape), digest]) + "\n" for name, record, digest in entries]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def by_storage(tensors: Mapping[str, TensorRecord]) -> list[list[tuple[str, TensorRecord]]]:
    """The tensors in the order of the file, those that share a storage together."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].storage.offset, item[1].offset, item[0]))
    return [list(group) for _, group in groupby(ordered, key=lambda item: item[1].storage)]
