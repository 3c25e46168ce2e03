"""Merge models: a weighted sum of two, or what one has more than another added to a third; block by block if asked.

    weighted sum      A + w (B - A)
    add difference    A + w (B - C)

The VAE is that of A. Sums are in float32 and rounded once.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from convert.actions.second_model import OpenModel
from convert.actions.target import TargetError
from convert.actions.writing import Changes, stated_json
from convert.checkpoint import Checkpoint
from convert.errors import shown
from convert.files.hashing import file_sha256, old_hash
from convert.files.reader import CheckpointFile
from convert.layouts.names import DEPTH_NETWORK, FIRST_CONV
from convert.other_vae import opened_model
from sd.config import ModelConfig
from sd.networks.block_plan import block_plan

if TYPE_CHECKING:
    from torch import Tensor

RECIPE, MODELS = "sd_merge_recipe", "sd_merge_models"  # in a file's metadata, as the AUTOMATIC1111 web UI writes them
FIRST_WEIGHT = f"{FIRST_CONV}.weight"
KEPT = ("vae", DEPTH_NETWORK[0])  # networks that stay those of the first model


@dataclass(frozen=True)
class Share:
    """How much of the second model there is in the result: 0 none of it, 1 all, in a weighted sum."""

    base: float  # in the text encoder
    blocks: tuple[float, ...] = ()  # in the blocks of the UNet, IN00 ..., M00, OUT00 ...; (): as in the text encoder

    def of(self, ours: str, config: ModelConfig) -> float:
        """In a weight by our name. As in other programs, the UNet's embeddings count as IN00 and its end as the last
        OUT."""
        component, block, number = (*ours.split("."), "")[:3]
        if component in KEPT:
            return 0.0
        if component != "unet" or not self.blocks:
            return self.base
        plan = [row.name for row in block_plan(config.unet)]
        names = {"out": plan[-1], "middle_block": "middle_block", "time_embed": plan[0], "label_emb": plan[0]}
        return self.blocks[plan.index(names.get(block, f"{block}.{number}"))]


class Merging:
    """The changes of a merge, for `convert.actions.convert.convert`, whose source is the first model.

    second, third  models; without a third one the result is a weighted sum
    hashed         read the files for their sha256, which the result's metadata note
    """

    def __init__(self, second: Path, third: Path | None, share: Share, *, hashed: bool = True):
        self.reads = [second, *([third] if third else [])]
        self.share, self.hashed = share, hashed
        self.merged: dict[str, int] = Counter()  # component -> tensors that were merged
        self.kept: dict[str, int] = Counter()  # component -> those that are as in the first model
        self.channels = 0  # that only the first model's first convolution reads

    @contextmanager
    def __call__(self, source: CheckpointFile, checkpoint: Checkpoint) -> Iterator[Changes]:
        """Raises WeightMismatchError for models that cannot be merged, TargetError if nothing would change."""
        config, blocks = checkpoint.config, len(block_plan(checkpoint.config.unet))
        if self.share.blocks and len(self.share.blocks) != blocks:
            raise TargetError(
                f"the UNet has {blocks} blocks, so --block-weights takes {blocks} numbers, or {blocks + 1} with that "
                f"of the text encoder in front; got {len(self.share.blocks)}."
            )
        with ExitStack() as stack:
            others = [OpenModel(*stack.enter_context(opened_model(path))) for path in self.reads]
            for other in others:
                _check_alike(source, checkpoint, other)
            _check_difference(others)
            values = {}
            for ours, record in checkpoint.tensors.items():
                component = ours.partition(".")[0]
                if share := self.share.of(ours, config):
                    values[ours] = partial(_sum, ours, share, others)
                    self.merged[component] += 1
                    if ours == FIRST_WEIGHT:
                        self.channels = record.shape[1] - others[0].checkpoint.tensors[ours].shape[1]
                else:
                    self.kept[component] += 1
            if not values:
                raise TargetError("every weight is 0, so the result would be the first model. Give others.")
            yield Changes(values=values, metadata=self._metadata(source, others))

    def _metadata(self, source: CheckpointFile, others: Sequence[OpenModel]) -> dict[str, str]:
        """The recipe, and the models with their own recipes."""
        recipe: dict[str, object] = {
            "type": "sd-zoo",
            "interp_method": "Add difference" if len(others) == 2 else "Weighted sum",
            "multiplier": self.share.base,
        }
        if self.share.blocks:
            recipe["block_weights"] = self.share.blocks
        models: dict[str, object] = {}
        files = [source, *(other.file for other in others)]
        for place, file in zip(("primary", "secondary", "tertiary"), files, strict=False):
            digest = file_sha256(file.path) if self.hashed and file.path.is_file() else None
            recipe[f"{place}_model_hash"] = digest
            mine = {"name": shown(file.path.name), RECIPE: stated_json(file.metadata, RECIPE)}
            before = stated_json(file.metadata, MODELS)
            models |= before if isinstance(before, dict) else {}
            if file.path.is_file():
                mine["legacy_hash"] = old_hash(file.path)
            models[digest or mine["name"]] = mine
        return {RECIPE: json.dumps(recipe), MODELS: json.dumps(models)}


def _sum(ours: str, share: float, others: Sequence[OpenModel], value: "Tensor") -> "Tensor":
    """The new value of a weight, in float32; in float64 if the first model has it so."""
    import torch

    dtype = torch.promote_types(value.dtype, torch.float32)
    base = value.to(dtype)
    second = _copy(others[0], ours, dtype)
    first = base if base.shape == second.shape else base[:, : second.shape[1]]
    if len(others) == 2:
        new = torch.add(first, second.sub_(_copy(others[1], ours, dtype)), alpha=share)
    else:
        new = torch.lerp(first, second, share)  # which is exactly the second one at 1
    return new if first is base else torch.cat([new, base[:, second.shape[1] :]], dim=1)


def _copy(model: OpenModel, ours: str, dtype) -> "Tensor":
    """A weight in memory of its own."""
    value = model.read(ours).to(dtype, copy=True)
    model.release(ours)
    return value


def _check_alike(source: CheckpointFile, first: Checkpoint, other: OpenModel) -> None:
    """Raises WeightMismatchError, with the name of the other model, if it cannot be merged with the first one."""
    a, b, theirs = first.config, other.checkpoint.config, other.checkpoint.tensors
    called = shown(source.called)
    wrong = [
        ours
        for ours, record in first.tensors.items()
        if ours.partition(".")[0] not in KEPT and (ours not in theirs or record.shape != theirs[ours].shape)
    ]
    if any(name != FIRST_WEIGHT for name in wrong):
        raise other.not_like(source, wrong)
    if wrong and (b.unet.in_channels != b.unet.out_channels or a.unet.in_channels < b.unet.in_channels):
        raise other.fault(
            f"reads {b.unet.in_channels} channels, {called} {a.unet.in_channels}. The model that reads more than the "
            "latents must be the first one"
        )
    if a.prediction != b.prediction:
        raise other.fault(f"predicts {b.prediction}, {called} {a.prediction}; a sum of them would predict neither")
    if bool(a.schedule.sigma_max) != bool(b.schedule.sigma_max):
        told = {True: "sigma", False: "a timestep"}
        raise other.fault(
            f"has a UNet that is told {told[bool(b.schedule.sigma_max)]}, that of {called} "
            f"{told[bool(a.schedule.sigma_max)]}; a sum of them would understand neither"
        )


def _check_difference(others: Sequence[OpenModel]) -> None:
    """Raises WeightMismatchError if the second and third model read different channels."""
    channels = [other.checkpoint.config.unet.in_channels for other in others]
    if len(set(channels)) > 1:
        first = shown(others[0].file.called)
        raise others[1].fault(f"reads {channels[1]} channels, {first} {channels[0]}, so they cannot be subtracted")
