"""A folder of the diffusers library: JSON that lists the components, and the weights of each.

    model_index.json                        which pipeline it is for, which class each component is of
    unet/config.json                        settings
    unet/diffusion_pytorch_model.safetensors    weights; or .bin, a pickle; or several files and an index of them
    vae/ text_encoder/                      likewise
    text_encoder_2/ depth_estimator/        likewise, of few models
    scheduler/scheduler_config.json         the noise schedule

One component may also stand alone, in a folder with its config.json and its weights. No class is looked up; the safety
checker, the tokenizer's tables and all other files are not read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import UnsupportedFileError, shown
from convert.families.table import family_of_pipeline, refusal
from convert.files.folder_kinds import INDEX, is_there, missing, not_a_model, other_format, read_json
from convert.files.folder_weights import FolderWeights
from convert.files.limits import LIMITS, check_limit
from convert.files.records import TensorRecord
from convert.layouts.diffusers_names import COMPONENTS
from convert.layouts.names import DEPTH_ESTIMATOR, SECOND_TEXT

if TYPE_CHECKING:
    from convert.files.reader import CheckpointFile

CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
SECOND_CLASS = "CLIPTextModelWithProjection"  # of a text_encoder_2, which XL has
DEPTH_CLASS = "DPTForDepthEstimation"  # of a depth_estimator, which few models have

OF_ONE = CLASSES | {SECOND_TEXT[0]: SECOND_CLASS}  # component that may stand alone in a folder -> its class
OF_ONE |= {"tiny_vae": "AutoencoderTiny"}
OPTIONAL = {SECOND_TEXT[0]: SECOND_CLASS, DEPTH_ESTIMATOR: DEPTH_CLASS}


@dataclass(frozen=True, kw_only=True)
class FolderContents:
    files: "list[CheckpointFile]"  # the open files of weights; `StorageRecord.file` counts them
    root: dict[str, TensorRecord]  # `<component>.<name in its file>`
    configs: dict[str, dict]  # by component, "scheduler" included where there is one
    component: str | None = None  # the one that stands alone, if it does
    absent: dict[str, str] = field(default_factory=dict)  # component that a model has -> why it cannot be read
    notes: tuple[str, ...] = ()  # which of several weights were taken


def read_folder(
    folder: Path, open_file: "Callable[[Path, str], CheckpointFile]", variant: str | None = None
) -> FolderContents:
    """Read and check the JSON, open the files of weights. Components that are not there are no error.

    open_file  opens one file of weights, given what to call it in errors
    variant    of the weights to take, where a component has it: "fp16", "non_ema", ...

    Raises CheckpointError.
    """
    alone = component_alone(folder)
    absent: dict[str, str] = {}
    if alone:
        configs = {alone: read_json(folder / "config.json", "config.json")}
    else:
        configs, absent = _read_configs(folder)
    weights = FolderWeights(folder, open_file, variant)
    try:
        for component in [alone] if alone else [name for name in (*COMPONENTS, *OPTIONAL) if name in configs]:
            if why := weights.read(component, "" if alone else f"{component}/"):
                absent[component] = why
        if not weights.files:
            raise UnsupportedFileError(next(iter(absent.values())))
        notes = (*weights.notes(), *_unused_averages(folder))
    except BaseException:
        for file in weights.files:
            file.close()
        raise
    check_limit("tensors", len(weights.root), LIMITS.tensors)
    return FolderContents(
        files=weights.files, root=weights.root, configs=configs, component=alone, absent=absent, notes=notes
    )


def component_alone(folder: Path) -> str | None:
    """The component of a folder that holds one component only. Raises CheckpointError for damaged settings."""
    if (folder / INDEX).is_file() or not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json", "config.json")
    stated = config.get("architectures", [config.get("_class_name")])
    return next((component for component, kind in OF_ONE.items() if stated == [kind]), None)


def _read_configs(folder: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """The settings of every component that is there; and why each of the others cannot be read."""
    index = _read_index(folder)
    configs, absent = {}, {}
    for component in COMPONENTS:
        place = folder / component
        entry = index.get(component) if index else ["diffusers", CLASSES[component]]
        if type(entry) is not list or len(entry) != 2 or not any(entry):
            absent[component] = f"has no {component} in its {INDEX}. Use the folder of a complete model"
        elif entry[1] != CLASSES[component]:
            absent[component] = _other_class(component, entry[1])
        elif not place.is_dir():
            absent[component] = _without(folder, component)
        elif not is_there(place / "config.json"):
            absent[component] = f"has no {component}/config.json. Download the folder again, with all its files"
        else:
            config = read_json(place / "config.json", f"{component}/config.json")
            stated = config.get("architectures", [config.get("_class_name", CLASSES[component])])
            if index or stated == [CLASSES[component]]:
                configs[component] = config
            else:
                absent[component] = _other_class(component, stated)
    if not configs:
        averaged = next((why for component, why in absent.items() if (folder / f"{component}_ema").is_dir()), None)
        why = other_format(folder) or next(iter(absent.values())) if index else not_a_model(folder)
        raise UnsupportedFileError(averaged or why)
    for component, kind in OPTIONAL.items():
        if index.get(component) == ["transformers", kind]:
            name = f"{component}/config.json"
            configs[component] = read_json(folder / name, name)
    if SECOND_TEXT[0] in configs and index.get("text_encoder") == [None, None]:  # the refiner has that one only
        absent.pop("text_encoder")
    if (folder / "scheduler").is_dir():
        name = "scheduler/scheduler_config.json"
        configs["scheduler"] = read_json(folder / name, name)
    return configs, absent


def _other_class(component: str, kind: object) -> str:
    kind = kind[0] if type(kind) is list and len(kind) == 1 else kind
    return f"has a {component} of the class {shown(str(kind), 60)}; only {CLASSES[component]} is supported"


def _without(folder: Path, component: str) -> str:
    """Say that a component has no folder, and where else its weights may be."""
    averaged = f"{component}_ema"
    if (folder / averaged).is_dir():
        return f"has no folder {component}, but {averaged}. Give that folder, with --only {component}"
    return (
        f"has no {component}: its folder {component} {missing(folder / component)}. Use the folder of a complete model"
    )


def _unused_averages(folder: Path) -> Iterator[str]:
    """Say that averaged weights beside the plain ones, as training writes them, are not used."""
    for component in COMPONENTS:
        averaged = folder / f"{component}_ema"
        if averaged.is_dir() and (folder / component).is_dir():
            yield f"using {component}, not the average over the training in {averaged.name}"


def foreign_component(config: dict) -> str:
    """What the folder of a component is that no model here has."""
    from convert.families.additions import family_of_class

    stated = config.get("architectures") or [config.get("_class_name", "of a class that is not named")]
    kind = shown(str(stated[0] if type(stated) is list else stated), 60)
    row = family_of_class(kind)
    if row and not row.config:
        return refusal(row, [f"its config.json names {kind}"])
    return (
        f"is the folder of one component ({kind}), which is no part of Stable Diffusion 1, 2 or XL. Give the folder or "
        "the file of a whole model"
    )


def _read_index(folder: Path) -> dict:
    """The list of components; {} where there is none, as in a checkpoint that a training wrote."""
    if not is_there(folder / INDEX):
        if (folder / "config.json").is_file():
            raise UnsupportedFileError(foreign_component(read_json(folder / "config.json", "config.json")))
        return {}
    index = read_json(folder / INDEX, INDEX)
    pipeline = index.get("_class_name")
    if type(pipeline) is not str:
        raise UnsupportedFileError(f"has a {INDEX} that does not name a pipeline, so it is not a diffusers model")
    family = family_of_pipeline(pipeline)
    if family and not family.config:
        raise UnsupportedFileError(
            f"is a folder for {family.title}: its {INDEX} names {shown(pipeline, 60)}. {family.why_not}"
        )
    return index
