"""From one layout to another: the tensors of a model, copied as they are unless another precision is asked for."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint import FORMAT, Checkpoint, match_shapes, read_checkpoint
from convert.diffusers_writer import WEIGHTS, write_settings
from convert.reader import CheckpointFile, open_checkpoint
from convert.target import PICKLES, TargetError, check_original_has_room, check_target, layout_of
from convert.writing import (
    CHUNK,
    PRECISIONS,
    Plan,
    Reporting,
    converted,
    our_metadata,
    plan_weights,
    publisher_metadata,
    write_pickle,
    write_plan,
)
from sd.files import folder_written_whole, written_whole


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done."""

    checkpoint: Checkpoint
    layout: str  # of the new file
    tensors: int
    nbytes: int  # of all tensors
    parameters: int


def convert(
    source: Path,
    target: Path,
    *,
    layout: str | None = None,
    precision: str = "keep",
    weights: str = "auto",
    force: bool = False,
    on_bytes: Callable[[int], None] | None = None,
    on_start: Callable[[int], None] | None = None,
) -> Conversion:
    """Write the model of one file as another, complete or not at all.

    source     a file, or a folder of the diffusers library
    target     `.safetensors`; or `.ckpt` or `.pt`, a pickle in the original layout; or a folder for diffusers' layout
    layout     "sd-zoo", "original" or "diffusers"; by default the original one for a pickle and for what is ours, else
               ours
    precision  "keep", or "fp32", "fp16", "bf16" for all tensors
    weights    "model", "ema", or "auto": the model's own unless the file has only averaged ones
    force      replace the target if it exists; of folders, only one with a diffusers model in it
    on_start, on_bytes  called with the number of bytes that will be, and that were just written

    Raises `convert.errors.CheckpointError` for the source; TargetError, FileExistsError or OSError for the target.
    """
    if precision != "keep" and precision not in PRECISIONS:
        raise TargetError(f"precision must be keep, {', '.join(PRECISIONS)}, got {precision!r}")
    check_target(source, target, layout, force)
    with open_checkpoint(source) as file:
        checkpoint = read_checkpoint(file, weights=weights)
        layout = layout_of(target, layout, checkpoint.layout)
        checkpoint = match_shapes(checkpoint, _shapes(checkpoint))
        if layout == "original":
            check_original_has_room(checkpoint)
        plan = plan_weights(checkpoint, layout, precision)
        total = sum(planned.nbytes for planned in plan.values())
        _check_disk(target, total)
        if on_start:
            on_start(total)
        reporting = Reporting(total, on_bytes)
        if layout == "diffusers":
            with folder_written_whole(target, force=force) as folder:
                _write_folder(folder, reporting, file, checkpoint, plan, precision)
        else:
            with written_whole(target, force=force) as reporting.out:
                _write_file(target.suffix.lower(), reporting, file, checkpoint, plan, layout, precision)
        reporting.report(total)  # tensors that share their bytes are written once
    return Conversion(
        checkpoint=checkpoint,
        layout=layout,
        tensors=len(plan),
        nbytes=total,
        parameters=sum(planned.record.numel for planned in plan.values()),
    )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    from sd.networks import build_networks, parameter_shapes  # torch takes a second to import: not before it is needed

    return parameter_shapes(build_networks(checkpoint.config))


def _check_disk(target: Path, needed: int) -> None:
    folder = target.resolve().parent
    free = shutil.disk_usage(folder).free
    if free < needed + CHUNK:
        raise OSError(f"{folder} has {free / 1e9:.2f} GB free, the file needs {needed / 1e9:.2f} GB.")


def _write_file(
    suffix: str,
    reporting: Reporting,
    file: CheckpointFile,
    checkpoint: Checkpoint,
    plan: Plan,
    layout: str,
    precision: str,
) -> None:
    if suffix in PICKLES:
        beside = {"global_step": checkpoint.global_step or 0, "native_size": checkpoint.config.native_size}
        write_pickle(reporting, converted(file, plan, precision), beside)
        return
    own = our_metadata(file, checkpoint, precision) if layout == FORMAT else {"format": "pt"}
    write_plan(reporting, file, plan, precision, publisher_metadata(file) | own)


def _write_folder(
    folder: Path, reporting: Reporting, file: CheckpointFile, checkpoint: Checkpoint, plan: Plan, precision: str
) -> None:
    write_settings(folder, checkpoint.config)
    for component, place in WEIGHTS.items():
        prefix = f"{component}."
        mine = {name.removeprefix(prefix): planned for name, planned in plan.items() if name.startswith(prefix)}
        with written_whole(folder / place) as reporting.out:
            write_plan(reporting, file, mine, precision, {"format": "pt"})
