"""Add adapters to the weights of a model while it is converted.

What an adapter adds to a weight is a formula of `sd.networks.adapters`, which is handed in: there are no networks here.
Every change reads the weight of the source, so the order of adapters does not matter. Changes are summed and added in
float32.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from convert.actions.target import TargetError
from convert.actions.writing import Changes, stated_json
from convert.adapters.adapter import Adapter, Change, open_adapter, read_adapter, weights_file
from convert.checkpoint import Checkpoint
from convert.errors import counted, shown, shown_list
from convert.families.family import ALONE
from convert.files.hashing import file_sha256
from convert.files.reader import CheckpointFile, errors_named

if TYPE_CHECKING:
    from torch import Tensor

WeightChange = Callable[..., "Tensor"]  # `sd.networks.adapters.weight_change.weight_change`
NOTED = "adapters"  # in a file's metadata: JSON, what was added to its weights


@dataclass(frozen=True)
class Strengths:
    """An adapter to add, and how much of it."""

    path: Path
    unet: float = 1.0
    text_encoder: float = 1.0

    def of(self, target: str) -> float:
        return self.unet if target.startswith("unet.") else self.text_encoder


@dataclass(kw_only=True)
class Added:
    """What an adapter changed."""

    strengths: Strengths
    adapter: Adapter
    modules: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # by component
    tensors: int = 0
    elsewhere: int = 0  # modules of networks that are not written
    biases: list[str] = field(default_factory=list)  # of modules that have no bias: stored names

    @property
    def problems(self) -> Iterator[str]:
        """What of the file is not in the new weights, one sentence each whose subject is the file."""
        yield from self.adapter.problems
        if self.biases:
            number = counted(len(self.biases), "module")
            yield f"has a bias for {number} without one, left out: {shown_list(self.biases)}."
        if self.elsewhere:
            yield f"also changes {counted(self.elsewhere, 'module')} of networks that are not written."
        if self.adapter.words:
            yield (
                f"brings {counted(len(self.adapter.words), 'word')} along, which a model cannot store: "
                f"{shown_list(tuple(self.adapter.words))}."
            )


Step = Callable[["Tensor"], "Tensor"]  # the weight in float32 -> what to add to it


class Baking:
    """The changes of adapters, for `convert.actions.convert.convert`."""

    def __init__(self, adapters: Sequence[Strengths], weight_change: WeightChange):
        self.adapters, self.weight_change = adapters, weight_change
        self.reads = [adapter.path for adapter in adapters]
        self.added: list[Added] = []  # as soon as the model is known

    @contextmanager
    def __call__(self, source: CheckpointFile, checkpoint: Checkpoint) -> Iterator[Changes]:
        """Raises CheckpointError for a file that is no such model's adapter, TargetError if nothing would change."""
        from convert.adapters.values import check_values  # imports torch

        with ExitStack() as stack:
            steps: dict[str, list[Step]] = defaultdict(list)
            for strengths in self.adapters:
                file = stack.enter_context(open_adapter(strengths.path))
                with errors_named(file):
                    added = Added(strengths=strengths, adapter=read_adapter(file, checkpoint.config))
                    check_values(file, added.adapter)
                self._add(added, file, checkpoint, steps)
                self.added.append(added)
            metadata = {NOTED: _noted(source.metadata, self.adapters)}
            yield Changes(values={ours: partial(_sum, parts) for ours, parts in steps.items()}, metadata=metadata)

    def _add(self, added: Added, file: CheckpointFile, checkpoint: Checkpoint, steps: dict[str, list[Step]]) -> None:
        """Collect what one adapter adds, by the name of the weight."""
        for change in added.adapter.changes:
            component = change.target.partition(".")[0]
            if checkpoint.part not in (None, component):
                added.elsewhere += 1
                continue
            added.modules[component] += 1
            if not (strength := added.strengths.of(change.target)):
                continue
            if change.tensors.keys() != {"bias"}:
                steps[f"{change.target}.weight"].append(partial(self._weight, file, change, strength))
                added.tensors += 1
            if "bias" in change.tensors:
                bias = f"{change.target}.bias"
                if bias not in checkpoint.tensors:
                    added.biases.append(change.stored)
                    continue
                steps[bias].append(partial(_bias, file, change, strength))
                added.tensors += 1
        if not added.modules and added.elsewhere:
            raise TargetError(
                f"{shown(added.adapter.name)} changes nothing in the {ALONE[checkpoint.part]}, the network that --only "
                "writes. Leave out --only, or --lora."
            )

    def _weight(self, file: CheckpointFile, change: Change, strength: float, base: "Tensor") -> "Tensor":
        from convert.adapters.values import tensors_of

        return self.weight_change(
            change.kind,
            tensors_of(file, change),
            base,
            scale=change.scale,
            strength=strength,
            on_input=change.on_input,
            constraint=change.constraint,
        )


def _bias(file: CheckpointFile, change: Change, strength: float, base: "Tensor") -> "Tensor":
    from convert.files.tensors import as_tensor

    return strength * as_tensor(file, change.tensors["bias"]).float().reshape(base.shape)


def _sum(steps: Sequence[Step], weight: "Tensor") -> "Tensor":
    """The weight with all changes added, in float32; in float64 if it is stored so."""
    import torch

    base = weight.to(torch.promote_types(weight.dtype, torch.float32))
    total = steps[0](base)
    for step in steps[1:]:
        total += step(base)
    return base + total


def _noted(before: Mapping[str, str], adapters: Sequence[Strengths]) -> str:
    """JSON of the adapters in a file: those that its source had already, and the new ones."""
    found = stated_json(before, NOTED)
    new = [
        {
            "name": shown(adapter.path.name),
            "strength": adapter.unet,
            "text_encoder_strength": adapter.text_encoder,
            "sha256": file_sha256(weights_file(adapter.path)),
        }
        for adapter in adapters
    ]
    return json.dumps([*(found if isinstance(found, list) else []), *new])
