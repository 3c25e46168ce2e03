"""What a model was trained to predict and at which noise levels, where neither names nor shapes tell.

`statement` looks in this order, and the first that tells counts:

    the caller          --prediction
    metadata            modelspec.* of safetensors, in several spellings; the settings of a folder; the config of ours
    a .yaml beside it   model.params.parameterization, as in the original training code
    marker tensors      v_pred, ztsnr: without elements; edm_* with noise levels: see `convert.layouts.noise_levels`
    the file's name     of one-step networks that predict x0: see `convert.families.few_step_names`
    the training step   of version 2, whose families differ in nothing else
    pure noise          of version 2: noise levels that end in it, where eps would say nothing of the picture
    a rule of thumb     of version 2: how far the biases of one norm are spread
    a trial             of version 2, once its weights are read: see `sd.runtime.trial`
    the family          the usual prediction of its row in `convert.families.table`

What tells something else than what counts is named in a warning.
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from convert.errors import shown
from convert.files.reader import CheckpointFile
from convert.files.records import TensorRecord
from sd.config import ModelConfig, ScheduleConfig

if TYPE_CHECKING:
    from convert.layouts.noise_levels import Continuous
    from convert.layouts.yaml_beside import Beside

PREDICTS_V, ENDS_IN_NOISE = "v_pred", "ztsnr"
MARKERS = {  # tensors that only say something -> what
    PREDICTS_V: "marker of v-prediction",
    ENDS_IN_NOISE: "marker of zero terminal SNR",
}
WITH_NUMBERS = {  # of models without timesteps: see `convert.layouts.noise_levels`
    "edm_mean": "means of the latents",
    "edm_std": "deviations of the latents",
    "edm_vpred.sigma_max": "highest sigma",
    "edm_vpred.sigma_min": "lowest sigma",
}
MARKERS |= WITH_NUMBERS
PREDICTIONS = {  # as others write it -> as we do
    **dict.fromkeys(("v", "v_pred", "v_prediction", "v-prediction", "vpred", "velocity"), "v"),
    **dict.fromkeys(("eps", "epsilon", "noise", "eps_pred"), "eps"),
    **dict.fromkeys(("x0", "x_0", "x_start", "sample"), "x0"),  # the picture itself
}
METADATA = {  # of safetensors: key -> what its values mean
    **dict.fromkeys(("modelspec.prediction_type", "modelspec.predict_key", "ss_prediction_type"), PREDICTIONS),
    "modelspec.architecture": {"stable-diffusion-v2-768-v": "v", "stable-diffusion-v2-512": "eps"},
    "ss_v_parameterization": {"true": "v", "false": "eps"},
}
TRUE_IN_METADATA = ("zero_terminal_snr", "ss_zero_terminal_snr")  # the first is ours
STEPS = {875_000: "eps", 110_000: "v", 140_000: "v"}  # of version 2's published training runs: 2.0 base, 2.1, 2.0
# The published v models have larger biases here than the eps models: ComfyUI, comfy/supported_models.py, class SD20.
SPREAD_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SPREAD_OF_V = 0.09
RULE_OF_THUMB = "the spread of the biases in one of its norms"
ENDS_IN_NOISE_NOTE = {  # by whether it predicts v
    True: "trained with noise levels that end in pure noise (ztsnr), so pictures begin there: best with --schedule "
    "trailing --guidance-rescale 0.7; --no-zero-terminal-snr turns it off.",
    False: "trained with noise levels that end in pure noise (ztsnr), but it predicts eps: pictures begin as usual.",
}
NO_GUESS = "nothing tells whether it predicts eps or v. If pictures are noise, give --prediction."
FAMILY, SCHEDULER = "its family", "its scheduler_config.json"
SUFFIXES = (".yaml", ".yml")
NUMBERS = {"float64": "d", "float32": "f", "float16": "e", "bfloat16": "H"}  # the last: the upper half of a float32
MOST = 1 << 16  # numbers in a tensor that is read for what it says
TOLERANCE = 0.02  # half precision changes the entries by less than a tenth of it


class Evidence(NamedTuple):
    prediction: str  # "eps", "v", "x0" or "edm", as in `sd.config`
    why: str  # "m.yaml beside it", after "as ... says"
    outside: bool = False  # the file itself does not tell


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What counts, and what is to be said about it."""

    prediction: str | None  # "eps", "v", "x0" or "edm"; None where nothing tells
    why: str  # the evidence, in words: "m.yaml beside it"
    outside: bool = False  # it was found beside the file, or the caller gave it
    schedule: ScheduleConfig
    noise: tuple[float, float] | None = None  # its first and last variance, where a .yaml beside the file told them
    ends_in_noise: bool = False  # trained with zero terminal SNR
    levels: "Continuous | None" = None  # what its tensors state, if it has no timesteps
    warnings: tuple[str, ...] = ()  # for the user, a sentence each
    notes: tuple[str, ...] = ()

    @property
    def begins_at_noise(self) -> bool:
        """Whether pictures begin at pure noise, as in the training; eps says nothing of a picture there."""
        return self.ends_in_noise and self.prediction == "v"

    @property
    def is_guess(self) -> bool:
        """Whether nothing states what it predicts."""
        return self.prediction is None or self.why == RULE_OF_THUMB

    def applied_to(self, config: ModelConfig) -> ModelConfig:
        config = replace(config, schedule=self.schedule, prediction=self.prediction or config.prediction)
        return self.levels.applied_to(config) if self.levels else config


def prediction_text(prediction: str | None, why: str) -> str:
    """A prediction and its evidence, for a reader: "v, as m.yaml beside it says"."""
    if prediction is None:
        return "eps or v: nothing tells which; --prediction chooses"
    return f"{prediction}, as {'usual in its family' if why == FAMILY else f'{why} says'}"


def guess(prediction: str, why: str) -> str:
    """The warning that a prediction is only guessed."""
    other = "v" if prediction == "eps" else "eps"
    return (
        f"nothing states whether it predicts eps or v; {prediction} is a guess, {why}. If pictures are noise, give "
        f"--prediction {other}."
    )


def yaml_of(file: Path) -> Path | None:
    """The .yaml that has the name of a single file, if there is one."""
    paths = [file.with_suffix(suffix) for suffix in SUFFIXES]
    return next((path for path in paths if path != file and os.path.lexists(path)), None)


def statement(
    file: CheckpointFile,
    tensors: Mapping[str, TensorRecord],
    schedule: ScheduleConfig,
    *,
    usual: str,
    step: int | None = None,
    asked: str = "auto",
    own: Evidence | None = None,
    named: Evidence | None = None,
    ends_in_noise: bool = False,
) -> Statement:
    """What a file states of its prediction and its noise levels.

    tensors        all of them, by their original names
    schedule       the family's, or the one that the settings of a folder state
    usual          the family's prediction; "" where its models differ
    step           of the training, where the file has it
    asked          what the caller asks for, or "auto"
    own            what the settings of a folder or the config of ours state
    named          what the file's name says
    ends_in_noise  these state zero terminal SNR

    Raises UnsupportedFileError for noise levels that cannot be used.
    """
    usual_schedule, beside, problem = schedule, None, ""
    if not (own or file.configs) and (path := yaml_of(file.path)):
        from convert.layouts.yaml_beside import read_yaml, with_range

        beside = read_yaml(path, PREDICTIONS)
        schedule, problem = with_range(schedule, beside)
    table, notes = _table_notes(schedule, file, tensors.get("alphas_cumprod"))
    levels = None
    if numbers := {name: _stated(file, tensors[name]) for name in WITH_NUMBERS if name in tensors}:
        from convert.layouts.noise_levels import continuous

        levels = continuous(numbers, schedule)
    metadata = {name: file.metadata.get(name, "").strip().lower() == "true" for name in TRUE_IN_METADATA}
    ends_in_noise = ends_in_noise or table or ENDS_IN_NOISE in tensors or any(metadata.values())
    found = [*_evidence(file, tensors, beside, usual, step, asked, own, named)]
    if levels and asked == "auto":
        found = [Evidence(levels.prediction, f"its tensor {levels.mark}")]  # whatever metadata say: "epsilon", too
    if not found and not usual:
        spread = _spread(file, tensors.get(SPREAD_BIAS))
        if ends_in_noise:
            found = [Evidence("v", "its noise schedule, which ends in pure noise,")]
        elif spread is not None:
            found = [Evidence("v" if spread > SPREAD_OF_V else "eps", RULE_OF_THUMB)]
    first = found[0] if found else None
    warnings = [f"{beside.name} beside it is ignored: it {beside.problem}."] if beside and beside.problem else []
    for key, value in file.metadata.items():
        if METADATA.get(key) is PREDICTIONS and value.strip().lower() not in PREDICTIONS:
            warnings.append(f"{key} in its metadata is ignored: {shown(value, 40)!r} is none of eps, v and x0.")
    for other in found[1:]:
        if other.prediction != first.prediction:
            warnings.append(f"predicts {first.prediction}, as {first.why} says; {other.why} says {other.prediction}.")
    if first and first.why == RULE_OF_THUMB:
        warnings.append(guess(first.prediction, f"by {RULE_OF_THUMB}"))
    if not first and not usual:
        warnings.append(NO_GUESS)
    warnings += [problem] if problem else []
    prediction = first.prediction if first else usual or None
    if levels:
        notes = (levels.note,)
    elif ends_in_noise:
        notes = (ENDS_IN_NOISE_NOTE[prediction == "v"],)
    return Statement(
        prediction=prediction,
        why=first.why if first else FAMILY if usual else "nothing tells",
        outside=bool(first and first.outside),
        schedule=levels.schedule if levels else schedule,
        noise=None if schedule == usual_schedule else (schedule.beta_start, schedule.beta_end),
        ends_in_noise=ends_in_noise,
        levels=levels,
        warnings=tuple(warnings),
        notes=notes,
    )


def _evidence(
    file: CheckpointFile,
    tensors: Mapping[str, TensorRecord],
    beside: "Beside | None",
    usual: str,
    step: int | None,
    asked: str,
    own: Evidence | None,
    named: Evidence | None,
) -> Iterator[Evidence]:
    """What tells, the most reliable first."""
    if asked != "auto":
        yield Evidence(asked, "--prediction", outside=True)
    if own:
        yield own
    for key, meanings in METADATA.items():
        if value := meanings.get(file.metadata.get(key, "").strip().lower()):
            yield Evidence(value, f"{key} in its metadata")
    if beside and beside.prediction:
        yield Evidence(beside.prediction, f"{beside.name} beside it", outside=True)
    if PREDICTS_V in tensors:
        yield Evidence("v", f"its tensor {PREDICTS_V}")
    if named:
        yield named
    if not usual and beside and not beside.prediction and "ldm" in beside.scalars.get("model.target", ""):
        yield Evidence("eps", f"{beside.name} beside it, without a parameterization,", outside=True)
    if not usual and step in STEPS:
        yield Evidence(STEPS[step], f"its training of {step:,} steps")


def _spread(file: CheckpointFile, record: TensorRecord | None) -> float | None:
    """The standard deviation of a vector; None if it cannot be read."""
    values = numbers_in(file, record)
    if not values:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def numbers_in(file: CheckpointFile, record: TensorRecord | None) -> tuple[float, ...]:
    """The numbers of a small tensor, whatever its shape; none if it is missing or unusual."""
    if record is None or record.dtype not in NUMBERS or not record.is_contiguous or record.numel > MOST:
        return ()
    file.verify(record)
    order = "<" if record.storage.byteorder == "little" else ">"
    width = struct.calcsize(NUMBERS[record.dtype])
    data = file.storage_bytes(record)[record.offset * width :]
    count = record.numel
    numbers = struct.unpack_from(f"{order}{count}{NUMBERS[record.dtype]}", data)
    if record.dtype == "bfloat16":
        return struct.unpack(f"{count}f", struct.pack(f"{count}I", *(half << 16 for half in numbers)))
    return numbers


def _stated(file: CheckpointFile, record: TensorRecord) -> tuple[float, ...]:
    """The numbers of a marker: none if it has no elements, not a number if they cannot be read."""
    return numbers_in(file, record) or (math.nan,) * bool(record.numel)


def _table_notes(
    schedule: ScheduleConfig, file: CheckpointFile, record: TensorRecord | None
) -> tuple[bool, tuple[str, ...]]:
    """Whether the table in the file ends in pure noise; a sentence if it differs otherwise from what will be used."""
    found = numbers_in(file, record)
    if len(found) != schedule.timesteps:
        return False, ()
    usual = alphas_cumprod(schedule)
    if _is_near(found, ending_in_noise(usual)):
        return True, ()
    for step, (value, expected) in enumerate(zip(found, usual, strict=True)):
        if not abs(value - expected) <= TOLERANCE * expected:
            return False, (
                f"its table alphas_cumprod is not that of its family: "
                f"entry {step} is {value:.4g}, usually {expected:.4g}. The usual schedule is used.",
            )
    return False, ()


def _is_near(found: tuple[float, ...], expected: list[float]) -> bool:
    return all(abs(a - b) <= TOLERANCE * b + 1e-6 for a, b in zip(found, expected, strict=True))


def alphas_cumprod(schedule: ScheduleConfig) -> list[float]:
    """Signal power by timestep: Ho et al. (2020), eq. 4; the roots of the variances rise evenly."""
    start, end = schedule.beta_start**0.5, schedule.beta_end**0.5
    bars, bar = [], 1.0
    for step in range(schedule.timesteps):
        bar *= 1 - (start + (end - start) * step / max(1, schedule.timesteps - 1)) ** 2
        bars.append(bar)
    return bars


def ending_in_noise(bars: list[float]) -> list[float]:
    """The same, moved and scaled so that the first entry stays and the last is 0: Lin et al. (2023), algorithm 1."""
    roots = [bar**0.5 for bar in bars]
    first, last = roots[0], roots[-1]
    return [((root - last) * first / (first - last)) ** 2 for root in roots] if first > last else bars
