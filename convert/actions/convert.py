"""Convert a model from one layout to another; values stay as they are unless a precision is given."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from convert.actions.diffusers_writer import WEIGHTS, write_settings, write_text
from convert.actions.target import (
    PICKLES,
    TargetError,
    check_extras,
    check_original_has_room,
    check_prediction,
    check_target,
    check_yaml_beside,
    layout_of,
)
from convert.actions.writing import (
    CHUNK,
    PRECISIONS,
    Changes,
    Plan,
    Reporting,
    converted,
    kept_in_folders,
    our_metadata,
    plan_weights,
    publisher_metadata,
    write_pickle,
    write_plan,
)
from convert.checkpoint import FORMAT, Checkpoint, match_shapes, read_checkpoint
from convert.families.family import ALONE
from convert.files.reader import CheckpointFile, errors_named, open_checkpoint
from convert.layouts.names import folder_of, parameter_shapes
from convert.layouts.wrapping import numbers_of
from convert.other_vae import read_with_vae
from convert.single_part import read_part
from sd.files import folder_written_whole, remove_leftovers, written_whole

if TYPE_CHECKING:
    from convert.actions.verify import Verified


class Changing(Protocol):
    """What changes a model while it is written: adapters, or another model that it is merged with."""

    reads: Sequence[Path]  # the files that the new values come from

    def __call__(self, file: CheckpointFile, checkpoint: Checkpoint) -> AbstractContextManager[Changes]:
        """The changes of the model in an open file; the context keeps at hand what they are computed from."""


PLAIN = {"format": "pt"}  # the metadata by which other programs know that tensors are torch's


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of a conversion."""

    checkpoint: Checkpoint
    layout: str  # of the new file
    tensors: int
    nbytes: int  # of all tensors
    parameters: int
    left_out: int  # tensors beside the model that were not written
    changed: int  # tensors with new values
    verified: "Verified | None"


def convert(
    source: Path,
    target: Path,
    *,
    layout: str | None = None,
    precision: str = "keep",
    weights: str = "auto",
    prediction: str = "auto",
    variant: str | None = None,
    part: str | None = None,
    vae: Path | None = None,
    changing: Changing | None = None,
    keep_all: bool = False,
    verify: bool = False,
    hash_source: bool = True,
    force: bool = False,
    on_bytes: Callable[[int], None] | None = None,
    on_start: Callable[[int], None] | None = None,
) -> Conversion:
    """Write the model of one file to another, completely or not at all.

    source     a file, or a folder of the diffusers library
    target     `.safetensors`; or `.ckpt` or `.pt`, a pickle in the original layout; or a folder for diffusers' layout
    layout     "sd-zoo", "original" or "diffusers"; by default the original one for a pickle and for what is ours, else
               ours
    precision  "keep", or "fp32", "fp16", "bf16" for all tensors
    weights    "model", "ema", or "auto": the model's own unless the file has only averaged ones
    prediction what the UNet predicts: "eps", "v", "x0", or "auto", as the file, a .yaml beside it or its family says
    variant    of a folder's weights: "fp16", "non_ema", ...; by default the plain ones, or those that there are
    part       a key of `ALONE`: that network alone, which may be all that the source has
    vae        a file or folder whose VAE is taken in place of the model's own
    changing   gives new values for weights: see `Changing`
    keep_all   also write the tensors beside the model; those that a file of ours holds always return to the original
               layout
    verify     read all of it back and compare it with the source, before it gets its name
    hash_source  compute the sha256 of the source, for the metadata of our layout and the card of a folder, unless it
               is cached
    force      replace the target if it exists; of folders, only one with a diffusers model in it
    on_start, on_bytes  called with the number of bytes that will be, and that were just written

    Raises `convert.errors.CheckpointError` for a source; TargetError, FileExistsError or OSError for the target;
    MismatchError if the new file differs from its source.
    """
    if precision != "keep" and precision not in PRECISIONS:
        raise TargetError(f"precision must be keep, {', '.join(PRECISIONS)}, got {precision!r}")
    if part is not None and part not in ALONE:
        raise TargetError(f"the part must be one of {', '.join(ALONE)}, got {part!r}")
    if part and (vae or keep_all):
        raise TargetError(f"--only writes one part alone: leave out {'--vae' if vae else '--keep-all'}.")
    for path in (source, *([vae] if vae else []), *(changing.reads if changing else ())):
        check_target(path, target, layout, part, force)
    remove_leftovers([target])
    with ExitStack() as stack:
        other = stack.enter_context(open_checkpoint(vae)) if vae else None
        file = stack.enter_context(open_checkpoint(source, variant=variant))
        if other:
            file, checkpoint = read_with_vae(file, other, weights=weights, prediction=prediction)
            stack.enter_context(errors_named(file))
        elif part:
            checkpoint = read_part(file, part, weights=weights, prediction=prediction)
        else:
            checkpoint = read_checkpoint(file, weights=weights, prediction=prediction)
        layout = layout_of(target, layout, checkpoint.layout)
        returning = layout == "original" and checkpoint.layout == FORMAT
        if not (keep_all or returning):
            kept = kept_in_folders(checkpoint) if layout == "diffusers" else {}
            left_out, checkpoint = len(checkpoint.extras) - len(kept), replace(checkpoint, extras=kept)
        else:
            left_out, checkpoint = 0, replace(checkpoint, unknown=())
        shapes = parameter_shapes(checkpoint.config, checkpoint.part)
        checkpoint = match_shapes(checkpoint, shapes)
        if layout == "original":
            check_original_has_room(checkpoint)
            check_yaml_beside(target, checkpoint)
            check_prediction(target, checkpoint)
        if keep_all or returning:
            check_extras(checkpoint, layout, weights)
        changes = stack.enter_context(changing(file, checkpoint)) if changing else Changes()
        stack.enter_context(errors_named(file))  # not with the name of another file that is open for the changes
        plan = plan_weights(checkpoint, layout, precision, changes.values)
        total = sum(planned.nbytes for planned in plan.values())
        _check_disk(target, total)
        if on_start:
            on_start(2 * total if verify else total)
        reporting = Reporting(total, on_bytes)

        def finish(path: Path) -> "Verified | None":
            reporting.report(total)  # tensors that share their bytes are written once
            verified = None
            if verify:
                from convert.actions.verify import verify as read_back  # numpy takes a tenth of a second to import

                dtype = PRECISIONS.get(precision)
                verified = read_back(path, file, checkpoint, dtype=dtype, values=changes.values, on_bytes=on_bytes)
            stack.close()  # checks the sources' lengths: what happens to them from here on does no harm
            return verified

        if layout == "diffusers":
            with folder_written_whole(target, force=force) as folder:
                own = our_metadata(file, checkpoint, precision, hash_source)
                _write_folder(folder, reporting, file, checkpoint, plan, precision, own, changes.metadata)
                verified = finish(folder)
        else:
            with written_whole(target, force=force) as reporting.out:
                if target.suffix.lower() in PICKLES:
                    beside = {"global_step": 0} | _beside(checkpoint) | changes.metadata
                    write_pickle(reporting, converted(file, plan, precision), beside)
                else:
                    if layout == FORMAT:
                        own = our_metadata(file, checkpoint, precision, hash_source)
                    else:
                        own = PLAIN | {name: str(number) for name, number in _beside(checkpoint).items()}
                    says_x0 = {"modelspec.prediction_type": "x0"} if checkpoint.config.prediction == "x0" else {}
                    metadata = publisher_metadata(file, checkpoint) | own | says_x0 | changes.metadata
                    write_plan(reporting, file, plan, precision, metadata)
                reporting.out.flush()
                verified = finish(Path(reporting.out.name))
    return Conversion(
        checkpoint=checkpoint,
        layout=layout,
        tensors=len(plan),
        nbytes=total,
        parameters=sum(record.numel for record in checkpoint.tensors.values()),
        left_out=left_out,
        changed=len(changes.values),
        verified=verified,
    )


def _check_disk(target: Path, needed: int) -> None:
    folder = target.absolute().parent
    free = shutil.disk_usage(folder).free
    if free < needed + CHUNK:
        raise OSError(f"{folder} has {free / 1e9:.2f} GB free, the file needs {needed / 1e9:.2f} GB.")


def _beside(checkpoint: Checkpoint) -> dict[str, int | float]:
    """What the original layout has beside the weights: the training steps, if known, and what no shape shows."""
    step = {} if checkpoint.global_step is None else {"global_step": checkpoint.global_step}
    return step if checkpoint.part else step | numbers_of(checkpoint.config)


def _write_folder(
    folder: Path,
    reporting: Reporting,
    file: CheckpointFile,
    checkpoint: Checkpoint,
    plan: Plan,
    precision: str,
    own: Mapping[str, str | Callable[[], str]],
    metadata: Mapping[str, str],
) -> None:
    """Settings, weights with the metadata of what was changed, and the card.

    own  what a file of ours would hold in its metadata; hashes may still be computed
    """
    from convert.actions.model_card import CARD, model_card

    loader = write_settings(folder, checkpoint.config, checkpoint.part, ends_in_noise=checkpoint.said.ends_in_noise)
    only = checkpoint.part and folder_of(checkpoint.config, checkpoint.part)
    for component, place in WEIGHTS.items():
        if only not in (None, component):
            continue
        place = Path(place).name if checkpoint.part else place
        prefix = f"{component}."
        mine = {name.removeprefix(prefix): planned for name, planned in plan.items() if name.startswith(prefix)}
        if not mine:  # few models have a depth network
            continue
        with written_whole(folder / place) as reporting.out:
            write_plan(reporting, file, mine, precision, {**PLAIN, **metadata})
    own = {name: value if isinstance(value, str) else value() for name, value in own.items()}
    stated = publisher_metadata(file, checkpoint) | metadata
    write_text(folder / CARD, model_card(checkpoint, loader, own, stated, file.metadata))
