"""Which model a job runs, on what and how: decided from the request and the checkpoint's header, then loaded."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import counted, shown, shown_list
from convert.layouts.noise_schedule import prediction_text
from sd.app.errors import UsageError
from sd.app.jobs.request import Events, ModelRequest
from sd.files import embedded_model

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from convert.checkpoint import Checkpoint
    from convert.files.reader import CheckpointFile
    from sd.app.jobs.embeddings import Learned
    from sd.config import ModelConfig
    from sd.pipeline.stable_diffusion import StableDiffusion
    from sd.runtime.device import RunOptions


@contextmanager
def opened(
    request: ModelRequest, task: str | None
) -> "Iterator[tuple[Checkpoint, Callable[[], Callable[[Events], StableDiffusion]]]]":
    """What a file says of its model, to check a run against, and how to load it while the file is open.

    The function that is yielded picks the device, which imports PyTorch, and returns one that loads the model.

    Raises UsageError where the model is for another task; None is any.
    """
    from convert.families.table import task_refusal
    from convert.files.reader import checksums_ahead, open_checkpoint
    from convert.other_vae import opened_model

    wanted = (request.weights, request.prediction, request.variant, request.vae)
    with opened_model(request.file, *wanted) as (file, checkpoint):
        if refusal := task_refusal(checkpoint.config, task):
            raise UsageError(refusal + (" Give one with -m FILE." if request.file == embedded_model() else ""))

        if request.tiny_vae:
            from convert.tiny_vae import read_tiny_vae, require_decoder

            with open_checkpoint(request.tiny_vae) as tiny_vae:
                require_decoder(read_tiny_vae(tiny_vae), checkpoint.config)

        with ExitStack() as stack:

            def prepare() -> "Callable[[Events], StableDiffusion]":
                stack.enter_context(checksums_ahead(file, checkpoint.tensors.values()))  # while PyTorch is imported
                device, dtype = pick_device_and_precision(request, checkpoint.config)
                return partial(load_model, request, file, checkpoint, device, dtype)

            yield checkpoint, prepare


def opened_refiner(
    request: ModelRequest,
) -> "AbstractContextManager[tuple[Checkpoint, Callable] | None]":
    """The same for the refiner, None where none is asked for."""
    if request.refiner is None:
        return nullcontext()
    defaults = {"weights": "auto", "prediction": "auto", "variant": None, "refiner": None, "like": ""}
    defaults |= {"vae": None, "tiny_vae": None}
    return opened(replace(request, file=request.refiner, **defaults), None)


def pick_device_and_precision(request: ModelRequest, config: "ModelConfig") -> "tuple[torch.device, torch.dtype]":
    """Those asked for, or those of the picture whose settings are used again. Imports PyTorch, a second or two."""
    from sd.runtime.device import pick_device, pick_precision

    try:
        device = pick_device(request.device)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from None
    precision = request.precision
    if precision == "auto" and request.made_with.get("device") == device.type:
        before = {name for name in made_with(request, "precision").values() if name in ("fp32", "fp16", "bf16")}
        precision = before.pop() if len(before) == 1 else precision
    return device, pick_precision(device, precision, config.unet.width)


def made_with(request: ModelRequest, name: str) -> dict:
    """What the picture whose settings are used again was made with, by a name in its exact settings; {} without one."""
    value = request.made_with.get(name)
    return value if isinstance(value, dict) else {}


def run_options(request: ModelRequest, device: "torch.device", events: Events) -> "RunOptions":
    """Those asked for, and those of the picture whose settings are used again, since they change rounding.

    Raises SettingError for a combination that is impossible, and where --compile cannot work.
    """
    from sd.runtime.device import RunOptions
    from sd.runtime.gpu.compile import problem_of, require_compiler

    events = events if request.like else Events()  # of a refiner, nothing is said twice
    given = {name for name in RunOptions.names() if getattr(request, name)}
    before = made_with(request, "run")
    again = {name for name in RunOptions.names() if before.get(name) is True} - given
    if "int8" in given | again:
        from sd.runtime.cpu.int8 import problem_of as int8_problem_of
        from sd.runtime.cpu.int8 import require_int8

        if "int8" in given:
            require_int8(device)
        elif request.precision != "auto":
            again.remove("int8")
        elif problem := int8_problem_of(device):
            again.remove("int8")
            events.warn(f"{request.like} was made with --precision int8, which is left out: it {problem}.")
    if "compile" in given and "low_memory" in again:
        again.remove("low_memory")
        events.warn(f"{request.like} was made with --low-memory, which is left out: it does not go with --compile.")
    if "compile" in given and "int8" in again:
        again.remove("int8")
        events.warn(f"{request.like} was made with --precision int8, which is left out: it does not go with --compile.")
    elif "compile" in again:
        other = {"low_memory": "--low-memory", "int8": "--precision int8"}
        others = [flag for name, flag in other.items() if name in given | again]
        problem = f"does not go with {others[0]}." if others else problem_of(device)
        if problem:
            again.remove("compile")
            events.warn(f"{request.like} was made with --compile, which is left out: it {problem}")
    for name in sorted(again):
        flag = "--precision int8" if name == "int8" else f"--{name.replace('_', '-')}"
        events.note(f"{flag}, as {request.like} was made")
    options = RunOptions(**dict.fromkeys(given | again, True))
    if options.compile:
        require_compiler(device)
    return options


def load_model(
    request: ModelRequest,
    file: "CheckpointFile",
    checkpoint: "Checkpoint",
    device: "torch.device",
    dtype: "torch.dtype",
    events: Events,
) -> "StableDiffusion":
    """The model in a file that was opened and checked already."""
    from sd.pipeline.runner import precision_name
    from sd.runtime.cpu.process_memory import keep_freed_memory
    from sd.runtime.loading import from_checkpoint

    options = run_options(request, device, events)
    if device.type == "cpu" and not options.low_memory:
        keep_freed_memory()
    total = sum(record.nbytes for record in checkpoint.tensors.values())
    with events.stage("loading", total, "B") as advance:
        model = from_checkpoint(file, checkpoint, device, dtype, options, advance)
    if request.tiny_vae:
        from sd.runtime.tiny_vae import load_tiny_vae

        load_tiny_vae(request.tiny_vae, model, dtype)
        whole = " (whole: --tiled-vae is only for the VAE)" if options.tiled_vae else ""
        events.note(f"decoding with the tiny VAE {shown(request.tiny_vae.name)}{whole}")
    announce_compiling(model, events)
    warnings = checkpoint.said.warnings
    if checkpoint.said.is_guess:
        from sd.runtime.trial import warnings_after_trial

        warnings = warnings_after_trial(model, checkpoint.said)
    for line in warnings:
        events.warn(f"{shown(request.file.name)}: {line}")
    another = "; -m FILE takes another" if request.file == embedded_model() else ""
    precision = "int8" if options.int8 else precision_name(dtype)
    for line in describe(request.file, checkpoint, f"{precision} on {device.type}{another}"):
        events.note(line)
    return model


def teach_words(model: "StableDiffusion", learned: "Learned") -> None:
    """Have the model know the words that the run's prompts use, and of an earlier run those of its adapters only."""
    bundled = [word for word in model.words if word.bundled]
    if learned.words or len(bundled) < len(model.words):
        from sd.pipeline.learning import teach

        teach(model, [*learned.words, *bundled])


def describe(path: Path, checkpoint: "Checkpoint", how: str) -> Iterator[str]:
    """What was read from a file, which of its weights are used, and what was left out."""
    weights = f"{checkpoint.weights} weights"
    if checkpoint.other_weights:
        weights += f" (--weights {checkpoint.other_weights} takes the others)"
    own = ", the embedded model of drawn shapes" if path == embedded_model() else ""
    yield f"{shown(path.name)}{own}: {checkpoint.config.family}, {weights}, {how}"
    if checkpoint.said.outside:
        yield f"predicts {prediction_text(checkpoint.config.prediction, checkpoint.said.why)}"
    if checkpoint.config.unet.guidance_width:
        default = checkpoint.few_steps.kind.flags
        yield f"a latent consistency model, whose UNet takes the guidance scale as an input: by default, {default}"
    yield from checkpoint.notes
    if checkpoint.unknown:
        number = counted(len(checkpoint.unknown), "tensor")
        yield f"ignored {number} outside the model: {shown_list(checkpoint.unknown)}"


def announce_compiling(model: "StableDiffusion", events: Events) -> None:
    """Have the model say so before it compiles anything, which takes a while."""

    def on_compile(shape: "torch.Size") -> None:
        height, width = (side * model.config.vae.factor for side in shape[-2:])
        events.note(
            f"compiling for {width}x{height}, {counted(shape[0], 'prediction')} at a time: once for each batch size, "
            "image size and prompt length; takes minutes the first time on this machine"
        )

    model.runner.on_compile = on_compile
    model.runner.on_build = lambda: events.note("compiling faster code for this processor: once, a few seconds")
