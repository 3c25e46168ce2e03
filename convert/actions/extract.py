"""The difference between two models as a LoRA: of each layer, the matrix of low rank that is nearest to it.

By the Eckart-Young theorem that is the singular value decomposition, cut off behind the rank. Errors are measured on
the factors as they are written, rounding included.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from convert.actions.diff import block_of
from convert.actions.extraction import Extraction, Sums
from convert.actions.respell import check_adapter_target
from convert.actions.second_model import OpenModel
from convert.actions.target import TargetError
from convert.actions.writing import PRECISIONS
from convert.adapters.model_metadata import model_metadata
from convert.adapters.values import to_write
from convert.adapters.writing import Module, write_adapter
from convert.checkpoint import Checkpoint
from convert.errors import WeightMismatchError, shown
from convert.files.tensors import in_range
from convert.layouts.adapter_names import adapted_family, modules
from convert.layouts.names import DEPTH_NETWORK, FIRST_CONV
from convert.other_vae import opened_model
from sd.files import remove_leftovers

OVERSAMPLING = 16  # further columns of the random sketch, and
ITERATIONS = 3  # products with the matrix, after which the error is within a percent of the smallest one


def extract(
    base: Path,
    tuned: Path,
    target: Path,
    *,
    rank: int = 16,
    conv_rank: int | None = None,
    full: bool = False,
    weights: str = "auto",
    precision: str = "fp16",
    spelling: str = "kohya",
    force: bool = False,
    on_start: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Extraction:
    """Write the difference between two models, as closely as a rank allows; nothing if they are the same.

    rank       of linear layers, at least 1; a small layer has at most its own
    conv_rank  of convolutions, flattened to (outputs, inputs * kernel); 0 leaves them out; None: as `rank`
    full       also write differences of biases and norms, which only kohya's spelling has names for
    weights    of the second model's UNet, as in `read_checkpoint`
    precision  of the factors, a key of PRECISIONS
    on_start, on_bytes  called with the number of bytes that will be, and that were just compared

    Raises CheckpointError for the models, TargetError, FileExistsError or OSError for the target.
    """
    conv_rank = rank if conv_rank is None else conv_rank
    if rank < 1 or conv_rank < 0:
        raise TargetError(f"ranks are 1 or more, for convolutions 0 or more, got {rank} and {conv_rank}.")
    if full and spelling != "kohya":
        raise TargetError(f"the spelling of {spelling} has no names for biases and norms. Leave out --full.")
    check_adapter_target([base, tuned], target, spelling, force)
    remove_leftovers([target])
    with ExitStack() as stack:
        both = ((base, "auto"), (tuned, weights))
        sides = [OpenModel(*stack.enter_context(opened_model(path, which))) for path, which in both]
        _check_alike(*sides)
        work = _Work(*sides, rank, conv_rank, full, getattr(torch, PRECISIONS[precision]))
        found = work.run(on_start, on_bytes)
        if work.written:
            metadata = _metadata(base, tuned, target, sides[1].checkpoint, rank, conv_rank)
            family = adapted_family(sides[0].checkpoint.config)
            found.tensors = write_adapter(target, work.written, family, spelling, metadata, force=force)
    return found


def nearest_of_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors (o, r) and (r, n) whose product is the matrix of that rank nearest to (o, n), or nearly so.

    They share the singular values evenly, so that neither leaves the range of float16.

    Large matrices are first projected on the space that a random sketch of them spans: Halko, Martinsson and Tropp,
    "Finding Structure with Randomness" (2011), algorithms 4.4 and 5.1.
    """
    sketch = rank + OVERSAMPLING
    if min(matrix.shape) <= 4 * sketch:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], sketch, generator=generator))
        for _ in range(ITERATIONS):
            across, _ = torch.linalg.qr(matrix.T @ basis)
            basis, _ = torch.linalg.qr(matrix @ across)
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


@dataclass
class _Work:
    base: OpenModel
    tuned: OpenModel
    rank: int
    conv_rank: int
    full: bool
    dtype: torch.dtype
    written: list[Module] = field(default_factory=list)

    def run(self, on_start: Callable[[int], None] | None, on_bytes: Callable[[int], None] | None) -> Extraction:
        found = Extraction()
        records = self.tuned.checkpoint.tensors
        if on_start:
            on_start(sum(record.nbytes for record in records.values()))
        weights = modules(adapted_family(self.base.checkpoint.config))
        for target in dict.fromkeys(name.rpartition(".")[0] for name in records):
            names = [name for leaf in ("weight", "bias") if (name := f"{target}.{leaf}") in records]
            parts: dict[str, Tensor] = {}
            for name in names:
                if pair := self._pair(name, found):
                    self._take(name, target if target in weights else None, *pair, parts, found)
                self.base.release(name)
                self.tuned.release(name)
                if on_bytes:
                    on_bytes(records[name].nbytes)
            if parts:
                self._write(target, parts)
        if (a := self.base.checkpoint.config.prediction) != (b := self.tuned.checkpoint.config.prediction):
            found.notes.append(
                f"predicts {b}, the first model {a}. A LoRA does not say so: use it with --prediction {b}."
            )
        return found

    def _pair(self, name: str, found: Extraction) -> tuple[Tensor, Tensor] | None:
        """A tensor of the first model and the difference, in float32; None if they differ by precision at most."""
        if name not in self.base.checkpoint.tensors:
            return None
        a, b = self.base.read(name), self.tuned.read(name)
        if a.shape != b.shape:
            found.not_held.setdefault("tensor of another shape", Sums()).tensors += 1
            return None
        if _same_but_rounded(a, b):
            found.rounded += a.dtype != b.dtype
            return None
        if name.startswith("vae."):
            found.vae += 1
            return None
        return a.float(), b.float() - a.float()

    def _take(
        self, name: str, target: str | None, base: Tensor, change: Tensor, parts: dict[str, Tensor], found: Extraction
    ) -> None:
        """Put the parts that hold a difference beside those of its module, and add up what they lack."""
        if not change.isfinite().all():
            raise WeightMismatchError(f"differs by NaN or infinity in {shown(name)}, which a LoRA cannot hold.")
        sums = Sums(1, _square(base), _square(change), _square(change))
        rank = self.conv_rank if change.ndim > 2 else self.rank
        matrix = change.flatten(1) if change.ndim > 1 else change
        if target and change.ndim > 1 and rank:
            up, down = (part.to(self.dtype) for part in nearest_of_rank(matrix, min(rank, *matrix.shape)))
            parts["up"] = up.reshape(*up.shape, *(1 for _ in change.shape[2:]))
            parts["down"] = down.reshape(len(down), *change.shape[1:])
            sums.left = _square(matrix - up.float() @ down.float())
        elif target and change.ndim == 1 and self.full:
            part = "weight" if name.endswith(".weight") else "bias"
            parts[part] = change.to(self.dtype)
            sums.left = _square(change - parts[part].float())
        else:
            found.not_held.setdefault(_kind(name, target, change), Sums()).add(sums)
            return
        found.blocks.setdefault(_block(self.base.checkpoint, name), Sums()).add(sums)

    def _write(self, target: str, parts: Mapping[str, Tensor]) -> None:
        if not all(in_range(tensor, tensor.dtype) for tensor in parts.values()):
            raise WeightMismatchError(f"differs too much for the precision in {target}. Use --precision fp32.")
        rank = len(parts["down"]) if "down" in parts else None
        self.written.append(
            Module(
                target=target,
                kind="lora" if rank else "full",
                parts={part: to_write(tensor) for part, tensor in parts.items()},
                rank=rank,
                alpha=None if rank is None else float(rank),
            )
        )


def _same_but_rounded(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal at the precision of the less precise one."""
    narrow = min((a, b), key=lambda tensor: tensor.dtype.itemsize).dtype
    return torch.equal(a.to(narrow), b.to(narrow))


def _square(tensor: Tensor) -> float:
    """The squared norm, summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _kind(name: str, target: str | None, change: Tensor) -> str:
    """What a tensor that a LoRA does not hold is, in words."""
    if name.startswith(f"{DEPTH_NETWORK[0]}."):
        return "weight of the depth network"
    if not target:
        return "embedding"
    if change.ndim > 1:
        return "convolution"
    return "bias" if name.endswith(".bias") and "norm" not in target.rpartition(".")[2] else "norm"


def _block(checkpoint: Checkpoint, ours: str) -> tuple[str, str]:
    return block_of(checkpoint.names[ours].name)


def _check_alike(base: OpenModel, tuned: OpenModel) -> None:
    """Raises WeightMismatchError for models of different architectures."""
    a, b = base.checkpoint, tuned.checkpoint
    other = [name for name, record in a.tensors.items() if name in b.tensors and record.shape != b.tensors[name].shape]
    other += sorted(a.tensors.keys() ^ b.tensors.keys())
    if any(name != f"{FIRST_CONV}.weight" for name in other):
        raise tuned.not_like(base.file, other)


def _metadata(
    base: Path, tuned: Path, target: Path, checkpoint: Checkpoint, rank: int, conv_rank: int
) -> dict[str, str]:
    """What kohya's scripts and readers of modelspec find in a LoRA."""
    config = checkpoint.config
    convolutions = {"conv_dim": str(conv_rank), "conv_alpha": str(conv_rank)} if conv_rank else {}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        **({"ss_network_args": json.dumps(convolutions)} if convolutions else {}),
        "ss_sd_model_name": shown(base.name),
        "ss_output_name": shown(target.stem),
        **model_metadata(config, "lora"),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": shown(target.stem),
        "modelspec.description": f"{shown(tuned.name)} - {shown(base.name)}",
        "modelspec.resolution": f"{config.native_size}x{config.native_size}",
    }
