"""The noise schedule that a file states, in tensors that are not weights and in metadata.

    v_pred              a tensor without elements: the UNet predicts the velocity
    ztsnr               a tensor without elements: the schedule ends in pure noise (Lin et al., 2023)
    modelspec.*         in the metadata of safetensors: the prediction, in several spellings
    alphas_cumprod      the schedule itself, as a table

Files that state nothing have the schedule and the prediction of their family.
"""

import struct
from collections.abc import Mapping
from dataclasses import replace

from convert.files.reader import CheckpointFile
from convert.files.records import TensorRecord
from sd.config import ModelConfig, ScheduleConfig

PREDICTS_V, ENDS_IN_NOISE = "v_pred", "ztsnr"
MARKERS = {PREDICTS_V, ENDS_IN_NOISE}
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "ss_prediction_type")
PREDICTIONS = {
    **dict.fromkeys(("v", "v_pred", "v_prediction", "v-prediction"), "v"),
    **dict.fromkeys(("epsilon", "eps"), "eps"),
}
NUMBERS = {"float64": "d", "float32": "f", "float16": "e"}
TOLERANCE = 0.02  # half precision changes the entries by less than a tenth of it


def with_schedule(
    config: ModelConfig, file: CheckpointFile, tensors: Mapping[str, TensorRecord]
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config with the prediction that the file states, and notes for the user about its schedule."""
    stated = next((file.metadata[key] for key in PREDICTION_KEYS if file.metadata.get(key)), "")
    prediction = "v" if PREDICTS_V in tensors else PREDICTIONS.get(stated.strip().lower(), config.prediction)
    config = replace(config, prediction=prediction)
    if ENDS_IN_NOISE in tensors:
        return config, ("trained with a noise schedule that ends in pure noise (ztsnr); the usual schedule is used.",)
    return config, _table_notes(config.schedule, file, tensors.get("alphas_cumprod"))


def _table_notes(schedule: ScheduleConfig, file: CheckpointFile, record: TensorRecord | None) -> tuple[str, ...]:
    """A sentence if the table in the file clearly differs from the schedule that will be used."""
    if record is None or record.dtype not in NUMBERS or record.shape != (schedule.timesteps,):
        return ()
    if not record.is_contiguous or record.offset:
        return ()
    file.verify(record)
    order = "<" if record.storage.byteorder == "little" else ">"
    found = struct.unpack_from(f"{order}{schedule.timesteps}{NUMBERS[record.dtype]}", file.storage_bytes(record))
    for step, (value, usual) in enumerate(zip(found, alphas_cumprod(schedule), strict=True)):
        if not abs(value - usual) <= TOLERANCE * usual:
            return (
                f"its table alphas_cumprod is not that of its family: "
                f"entry {step} is {value:.4g}, usually {usual:.4g}. The usual schedule is used.",
            )
    return ()


def alphas_cumprod(schedule: ScheduleConfig) -> list[float]:
    """Signal power by timestep: Ho et al. (2020), eq. 4; the roots of the variances rise evenly."""
    start, end = schedule.beta_start**0.5, schedule.beta_end**0.5
    bars, bar = [], 1.0
    for step in range(schedule.timesteps):
        bar *= 1 - (start + (end - start) * step / max(1, schedule.timesteps - 1)) ** 2
        bars.append(bar)
    return bars
