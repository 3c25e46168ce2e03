"""What the .yaml beside a file says of it: its prediction and its noise levels, as in the original training code."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from convert.errors import shown
from convert.files.yaml_scalars import YamlError, read_scalars
from sd.config import ScheduleConfig

PARAMETERS = "model.params."
IN_YAML = ("model.target", *(PARAMETERS + name for name in ("parameterization", "linear_start", "linear_end")))


@dataclass(kw_only=True)
class Beside:
    """What such a .yaml says."""

    name: str
    scalars: dict[str, str] = field(default_factory=dict)
    prediction: str = ""  # "eps", "v" or "x0"; empty where it does not say
    problem: str = ""  # why it is ignored


def read_yaml(path: Path, meanings: Mapping[str, str]) -> Beside:
    """Read it.

    meanings  of predictions as others write them
    """
    name = shown(path.name)
    try:
        scalars = read_scalars(path, IN_YAML)
    except YamlError as error:
        return Beside(name=name, problem=str(error))
    stated = scalars.get(PARAMETERS + "parameterization", "")
    prediction = meanings.get(stated.strip().lower(), "")
    if stated and not prediction:
        return Beside(name=name, problem=f"has {shown(stated, 40)!r} for parameterization; eps, v or x0 is expected")
    return Beside(name=name, scalars=scalars, prediction=prediction)


def with_range(schedule: ScheduleConfig, beside: Beside) -> tuple[ScheduleConfig, str]:
    """The schedule with the noise levels that the .yaml states, and a sentence if they differ or cannot be used."""
    texts = [beside.scalars.get(PARAMETERS + name) for name in ("linear_start", "linear_end")]
    try:
        start, end = (
            usual if text is None else float(text)
            for text, usual in zip(texts, (schedule.beta_start, schedule.beta_end), strict=True)
        )
    except ValueError:
        start, end = 0.0, 0.0
    if not 0 < start <= end < 1:
        given = " and ".join(f"{shown(text, 40)}" for text in texts if text)
        return (
            schedule,
            f"the noise levels in {beside.name} beside it are ignored: {given} do not rise between 0 and 1.",
        )
    if (start, end) == (schedule.beta_start, schedule.beta_end):
        return schedule, ""
    return (
        replace(schedule, beta_start=start, beta_end=end),
        f"noise from {start:g} to {end:g}, as {beside.name} beside it says (usually {schedule.beta_start:g} to "
        f"{schedule.beta_end:g}).",
    )
