"""A model whose weights another model is compared with or added to, one by one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.checkpoint import Checkpoint, match_shapes
from convert.errors import WeightMismatchError, counted, named, shown, shown_list
from convert.files.reader import CheckpointFile
from convert.layouts.names import parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class OpenModel:
    """An open file, and the model in it with weights of the shapes that its networks have."""

    file: CheckpointFile
    checkpoint: Checkpoint

    def __post_init__(self) -> None:
        self.checkpoint = match_shapes(self.checkpoint, parameter_shapes(self.checkpoint.config))

    def read(self, ours: str) -> "Tensor":
        """A weight, over the bytes of the file."""
        from convert.files.tensors import as_tensor

        record = self.checkpoint.tensors[ours]
        self.file.verify(record)
        return as_tensor(self.file, record)

    def release(self, ours: str) -> None:
        """Give the memory of a weight back, if there is such a weight."""
        if record := self.checkpoint.tensors.get(ours):
            self.file.release(record)

    def not_like(self, first: CheckpointFile, weights: Sequence[str]) -> WeightMismatchError:
        """The error for weights that this model and the first one do not both have in one shape."""
        return self.fault(
            f"is not built like {shown(first.called)}: {counted(len(weights), 'weight')} of another shape, or in one "
            f"of them only: {shown_list(weights)}"
        )

    def fault(self, problem: str) -> WeightMismatchError:
        return named(WeightMismatchError(problem), self.file.called)
